from __future__ import annotations

import hashlib
import json
import os
import stat
import time
import zlib
from pathlib import Path

import pytest

from reward_service import auth
from reward_service.auth import KeyRing, Scope
from reward_service.errors import StartError
from reward_service.home import prepare_home

BOTH = [Scope.SCORE_REWARD, Scope.SCORE_COMPONENTS]


def test_a_key_has_its_parts_and_a_checksum(home: Path) -> None:
    token = auth.create_key(home, "trainer", BOTH)
    prefix, key_id, secret, check = token.split("_")
    assert (prefix, len(key_id), len(bytes.fromhex(secret)) * 8) == ("rw", 12, 256)
    assert int(check, 16) == zlib.crc32(token.rpartition("_")[0].encode())


def test_the_file_keeps_a_keyed_hash_and_never_the_key(home: Path) -> None:
    token = auth.create_key(home, "trainer", BOTH)
    text = (home / "keys.json").read_text()
    record = json.loads(text)["keys"][0]
    assert token.split("_")[2] not in text
    # The keying is worked out here from the standard's primitives.
    pepper = bytes.fromhex((home / "pepper").read_text())
    key = hashlib.blake2b(key=pepper, person=b"api-key", digest_size=32).digest()
    assert record["hash"] == hashlib.blake2b(token.encode(), key=key, digest_size=32).hexdigest()
    assert record["hash"] != hashlib.blake2b(token.encode(), digest_size=32).hexdigest()


def test_folder_and_files_are_for_their_owner_only(home: Path) -> None:
    auth.create_key(home, "trainer", BOTH)
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    for name in ("pepper", "keys.json"):
        assert stat.S_IMODE((home / name).stat().st_mode) == 0o600


def test_keys_are_different_and_all_open(home: Path) -> None:
    tokens = [auth.create_key(home, f"n{i}", [Scope.SCORE_REWARD]) for i in range(5)]
    ring = KeyRing(home)
    holders = {ring.authenticate(token) for token in tokens}
    assert len(holders) == 5
    assert None not in holders


def test_scopes_are_those_of_the_key(home: Path) -> None:
    scopes = (Scope.SCORE_REWARD, Scope.SCORE_COMPONENTS, Scope.METRICS_READ)
    tokens = [auth.create_key(home, "k", [scope]) for scope in scopes]
    ring = KeyRing(home)
    reward, components, metrics = (ring.authenticate(token) for token in tokens)
    assert reward is not None
    assert components is not None
    assert metrics is not None
    assert reward.may(Scope.SCORE_REWARD)
    assert not reward.may(Scope.SCORE_COMPONENTS)
    assert components.may(Scope.SCORE_REWARD)
    assert not metrics.may(Scope.SCORE_REWARD)


def test_anything_but_the_exact_key_is_nobody(home: Path) -> None:
    token = auth.create_key(home, "k", BOTH)
    other = auth.create_key(home, "k", BOTH)
    ring = KeyRing(home)
    wrong = [
        "",
        "rw_",
        token[:-1],
        token + "0",
        token.upper(),
        " " + token,
        token.replace("rw_", "rx_", 1),
        token[:16] + other[16:],  # a known id with another's secret
        "rw_000000000000" + token[15:],
        token + "x" * 10_000,
        "\udcff" * 20,
        "é" * 89,
    ]
    assert [ring.authenticate(text) for text in wrong] == [None] * len(wrong)
    assert ring.authenticate(token) is not None


def test_a_key_opens_only_between_its_bounds(home: Path) -> None:
    now = time.time()
    early = auth.create_key(home, "k", BOTH, not_before=now + 60)
    late = auth.create_key(home, "k", BOTH, expires=now - 1)
    within = auth.create_key(home, "k", BOTH, not_before=now - 60, expires=now + 60)
    ring = KeyRing(home)
    assert [ring.authenticate(token) is not None for token in (early, late, within)] == [False, False, True]


def test_a_running_ring_sees_new_and_revoked_keys_at_once(home: Path) -> None:
    first = auth.create_key(home, "k", BOTH)
    ring = KeyRing(home)
    second = auth.create_key(home, "k", BOTH)
    assert ring.authenticate(second) is not None
    auth.revoke_key(home, first.split("_")[1])
    assert ring.authenticate(first) is None
    assert ring.authenticate(second) is not None


@pytest.mark.parametrize("text", ["", "{", '{"version": 2, "keys": []}', '{"keys": [{"id": "x"}]}', "\x00"])
def test_a_malformed_file_leaves_the_old_keys_in_force(home: Path, text: str) -> None:
    token = auth.create_key(home, "k", BOTH)
    ring = KeyRing(home)
    good = (home / "keys.json").read_text()
    (home / "keys.json").write_text(text)
    assert ring.authenticate(token) is not None
    assert ring.authenticate("rw_" + "0" * 86) is None
    (home / "keys.json").unlink()
    assert ring.authenticate(token) is not None
    (home / "keys.json").write_text(good)
    auth.revoke_key(home, token.split("_")[1])
    assert ring.authenticate(token) is None


def test_revoking_twice_keeps_the_first_time(home: Path) -> None:
    key_id = auth.create_key(home, "k", BOTH).split("_")[1]
    auth.revoke_key(home, key_id)
    first = auth.read_keys(home).keys[0].revoked
    auth.revoke_key(home, key_id)
    assert auth.read_keys(home).keys[0].revoked == first
    with pytest.raises(StartError, match="keys list"):
        auth.revoke_key(home, "000000000000")


def test_a_pepper_that_others_may_read_is_refused(home: Path) -> None:
    auth.create_key(home, "k", BOTH)
    os.chmod(home / "pepper", 0o640)
    with pytest.raises(StartError, match="chmod 600"):
        KeyRing(home)


def test_a_lost_pepper_is_not_silently_replaced(home: Path) -> None:
    auth.create_key(home, "k", BOTH)
    (home / "pepper").unlink()
    with pytest.raises(StartError, match="pepper"):
        KeyRing(home)
    with pytest.raises(StartError, match="backup"):
        prepare_home(home)
    assert not (home / "pepper").exists()


def test_another_pepper_voids_every_key(home: Path) -> None:
    token = auth.create_key(home, "k", BOTH)
    (home / "pepper").write_text("00" * 32)
    assert KeyRing(home).authenticate(token) is None


def test_a_failed_write_leaves_the_old_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = auth.create_key(home, "k", BOTH)

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="space"):
        auth.create_key(home, "k", BOTH)
    assert sorted(path.name for path in home.iterdir()) == ["keys.json", "lock", "pepper"]
    assert KeyRing(home).authenticate(token) is not None

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from reward_service.audit import AuditBroken, AuditFile, AuditUnavailable, read_records, verify
from reward_service.errors import StartError


def written(home: Path, count: int = 5, group: int = 1) -> list[bytes]:
    """An audit of `count` lines in commits of `group`, closed; its lines."""
    audit = AuditFile(home)
    records = [{"event": "score", "n": n} for n in range(count)]
    for start in range(0, count, group):
        audit.append(records[start : start + group])
    audit.close()
    return lines(home)


def lines(home: Path) -> list[bytes]:
    return (home / "audit.jsonl").read_bytes().splitlines(keepends=True)


def rewrite(home: Path, changed: list[bytes]) -> None:
    (home / "audit.jsonl").write_bytes(b"".join(changed))


def test_a_line_is_the_keyed_hash_of_itself_and_the_line_before(home: Path) -> None:
    pepper = bytes.fromhex((home / "pepper").read_text())
    key = hashlib.blake2b(key=pepper, person=b"audit", digest_size=32).digest()
    previous = bytes(32)
    for place, line in enumerate(written(home, 3), start=1):
        body, _, rest = line.partition(b',"mac":"')
        mac = hashlib.blake2b(previous + body, key=key, digest_size=32)
        assert rest == mac.hexdigest().encode() + b'"}\n'
        assert json.loads(line)["seq"] == place
        previous = mac.digest()


def test_an_untouched_audit_verifies_and_reads_back(home: Path) -> None:
    last = json.loads(written(home, 7, group=3)[-1])
    head = verify(home)
    assert (head.seq, head.mac) == (7, last["mac"])
    assert [record["n"] for record in read_records(home)] == list(range(7))
    assert (home / "audit.jsonl").stat().st_mode & 0o077 == 0
    assert (home / "audit.head").stat().st_mode & 0o077 == 0


def test_a_restart_continues_the_chain(home: Path) -> None:
    before = written(home, 3)
    after = written(home, 2)
    assert after[:3] == before
    assert [json.loads(line)["seq"] for line in after] == [1, 2, 3, 4, 5]
    assert verify(home).seq == 5


@pytest.mark.parametrize(
    "tamper",
    [
        lambda found: found[:-1],
        lambda found: found[1:],
        lambda found: [],
        lambda found: [*found[:1], *found[2:]],
        lambda found: [found[0], found[2], found[1], *found[3:]],
        lambda found: [*found, found[-1]],
        lambda found: [*found[:2], found[1], *found[2:]],
        lambda found: [*found[:2], found[2].replace(b'"n":2', b'"n":3'), *found[3:]],
        lambda found: [*found[:-1], found[-1].replace(b'"n":4', b'"n":0')],
        lambda found: [*found[:-1], found[-1][:-1]],
    ],
    ids=[
        "cut-last",
        "cut-first",
        "emptied",
        "dropped",
        "swapped",
        "repeated-last",
        "inserted",
        "edited",
        "edited-last",
        "no-newline",
    ],
)
def test_every_change_is_seen(home: Path, tamper: Any) -> None:
    rewrite(home, tamper(written(home)))
    with pytest.raises(AuditBroken):
        verify(home)


@hypothesis_settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_byte_can_be_changed(home: Path, data: st.DataObject) -> None:
    for name in ("audit.jsonl", "audit.head"):
        (home / name).unlink(missing_ok=True)
    content = b"".join(written(home, 3))
    place = data.draw(st.integers(0, len(content) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != content[place]))
    (home / "audit.jsonl").write_bytes(content[:place] + bytes([byte]) + content[place + 1 :])
    with pytest.raises(AuditBroken):
        verify(home)


def test_another_pepper_verifies_nothing(home: Path) -> None:
    written(home)
    (home / "pepper").write_text("ab" * 32)
    with pytest.raises(AuditBroken):
        verify(home)


def test_putting_both_files_back_shows_against_a_line_noted_elsewhere(home: Path) -> None:
    written(home, 2)
    kept = {name: (home / name).read_bytes() for name in ("audit.jsonl", "audit.head")}
    written(home, 2)
    noted = verify(home)
    for name, content in kept.items():
        (home / name).write_bytes(content)
    assert verify(home).seq == 2  # consistent in itself
    with pytest.raises(AuditBroken, match="expected"):
        verify(home, (noted.seq, noted.mac))


def test_an_earlier_line_noted_elsewhere_is_found(home: Path) -> None:
    first = json.loads(written(home, 2)[0])
    assert verify(home, (1, first["mac"])).seq == 2
    with pytest.raises(AuditBroken):
        verify(home, (2, first["mac"]))


@pytest.mark.parametrize(
    "kept", [b"", b'{"seq":6,"ti', b'{"seq":6}\n', b"\0" * 90, b'{"seq":6}\n{"seq":7}\n']
)
def test_a_torn_end_is_dropped_and_recorded(home: Path, kept: bytes) -> None:
    rewrite(home, [*written(home), kept])
    AuditFile(home).close()
    records = list(read_records(home))
    assert [record.get("n") for record in records[:5]] == [0, 1, 2, 3, 4]
    assert [(r["event"], r["dropped_bytes"], r["kept_lines"]) for r in records[5:]] == (
        [("recovered", len(kept), 0)] if kept else []
    )
    assert verify(home).seq == len(records)


def test_whole_lines_beyond_the_head_are_kept(home: Path) -> None:
    written(home, 2)
    head = (home / "audit.head").read_bytes()
    written(home, 3)
    (home / "audit.head").write_bytes(head)  # as if the machine stopped between lines and head
    AuditFile(home).close()
    records = list(read_records(home))
    assert [record.get("n") for record in records] == [0, 1, 0, 1, 2, None]
    assert (records[-1]["dropped_bytes"], records[-1]["kept_lines"]) == (0, 3)
    assert verify(home).seq == 6


def test_a_verification_during_a_write_sees_no_fault(home: Path) -> None:
    whole = written(home)
    rewrite(home, [*whole, b'{"seq":6,"time'])
    assert verify(home).seq == 5


@pytest.mark.parametrize("slot", [0, 1])
def test_a_spoiled_slot_cannot_hide_a_cut(home: Path, slot: int) -> None:
    found = written(home, 4)
    spoiled = bytearray((home / "audit.head").read_bytes())
    spoiled[slot * 256 : slot * 256 + 20] = b"x" * 20
    (home / "audit.head").write_bytes(spoiled)
    rewrite(home, found[:3])
    with pytest.raises(AuditBroken):
        verify(home)
    with pytest.raises(StartError):
        AuditFile(home)


def test_a_slot_torn_by_a_crash_is_mended_and_recorded(home: Path) -> None:
    written(home, 4)
    audit = AuditFile(home)
    real = os.pwrite

    def torn(descriptor: int, data: bytes, offset: int) -> int:
        real(descriptor, data[:20], offset)
        raise OSError(errno.EIO, "no")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", torn)
        with pytest.raises(AuditUnavailable):
            audit.append([{"event": "score", "n": 4}])
    audit.close()
    AuditFile(home).close()
    assert [record.get("n") for record in read_records(home)] == [0, 1, 2, 3, 4, None]
    assert verify(home).seq == 6


@pytest.mark.parametrize("missing", ["audit.head", "audit.jsonl"])
def test_a_missing_half_stops_the_start(home: Path, missing: str) -> None:
    written(home)
    (home / missing).unlink()
    with pytest.raises(StartError) as caught:
        AuditFile(home)
    assert "\n" not in str(caught.value)
    assert "backup" in str(caught.value)


def test_a_cut_audit_stops_the_start(home: Path) -> None:
    rewrite(home, written(home)[:-1])
    with pytest.raises(StartError, match="shorter than the 5 lines"):
        AuditFile(home)


def test_one_process_at_a_time(home: Path) -> None:
    audit = AuditFile(home)
    with pytest.raises(StartError, match="another service"):
        AuditFile(home)
    audit.close()
    AuditFile(home).close()


def test_a_full_disk_fails_closed_leaves_no_torn_line_and_is_tried_again(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = AuditFile(home)
    audit.append([{"event": "score", "n": 0}])
    real = os.write

    def full(descriptor: int, data: bytes) -> int:
        if len(data) > 10:
            return real(descriptor, data[:10])
        raise OSError(errno.ENOSPC, "full")

    def short(descriptor: int, data: bytes) -> int:
        if os.fstat(descriptor).st_size % 7:
            return real(descriptor, data[:1])
        raise OSError(errno.ENOSPC, "full")

    for broken in (full, short):
        monkeypatch.setattr(os, "write", broken)
        with pytest.raises(AuditUnavailable):
            audit.append([{"event": "score", "n": 1}])
        assert not audit.healthy
        assert verify(home).seq == 1
    monkeypatch.setattr(os, "write", real)
    audit.append([{"event": "score", "n": 2}])
    assert audit.healthy
    assert [record["n"] for record in read_records(home)] == [0, 2]
    assert verify(home).seq == 2
    audit.close()


def test_after_a_failed_fsync_nothing_is_written_until_a_restart(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = AuditFile(home)

    def fails(descriptor: int) -> None:
        raise OSError(errno.EIO, "no")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(AuditUnavailable):
            audit.append([{"event": "score", "n": 0}])
    assert not audit.healthy
    with pytest.raises(AuditUnavailable):
        audit.append([{"event": "score", "n": 1}])
    audit.close()
    AuditFile(home).close()
    assert "recovered" in [record["event"] for record in read_records(home)]
    verify(home)

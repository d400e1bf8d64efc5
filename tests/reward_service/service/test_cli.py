from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from reward_service import auth
from reward_service.audit import AuditFile
from reward_service.auth import KeyRing, Scope
from reward_service.cli import main


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "new" / "home"
    monkeypatch.setenv("REWARD_SERVICE_HOME", str(path))
    return path


def create(capsys: pytest.CaptureFixture[str], *options: str, scopes: str = "score:reward") -> str:
    main(["keys", "create", "--name", "n", "--scopes", scopes, *options])
    return capsys.readouterr().out


def test_create_prepares_the_folder_and_prints_the_key_alone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = create(capsys, scopes="score:reward, score:components")
    assert printed.count("\n") == 1
    principal = KeyRing(folder).authenticate(printed.strip())
    assert principal is not None
    assert principal.scopes == {Scope.SCORE_REWARD, Scope.SCORE_COMPONENTS}


def test_init_twice_keeps_the_pepper(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["init"])
    pepper = (folder / "pepper").read_text()
    main(["init"])
    assert (folder / "pepper").read_text() == pepper
    assert str(folder) in capsys.readouterr().out


def test_list_shows_every_state_and_no_secret(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = create(capsys)
    bounded = create(capsys, "--expires-days", "2")
    revoked = create(capsys)
    expired = auth.create_key(folder, "old", [Scope.METRICS_READ], expires=time.time() - 1)
    main(["keys", "revoke", revoked.split("_")[1]])
    capsys.readouterr()
    main(["keys", "list"])
    listed = capsys.readouterr().out
    states = [line.split()[1:3] for line in listed.splitlines()]
    assert [line.split()[0] for line in listed.splitlines()] == [
        key.split("_")[1] for key in (plain, bounded, revoked, expired)
    ]
    assert [state[0] for state in states] == ["active", "active", "revoked", "expired"]
    assert "active until" in listed
    for key in (plain, bounded, revoked, expired):
        assert key.split("_")[2] not in listed


def test_expiry_is_counted_in_days(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    create(capsys, "--expires-days", "2")
    record = auth.read_keys(folder).keys[0]
    assert record.expires is not None
    assert record.expires - record.created == pytest.approx(172_800, abs=5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["keys", "list"], "keys create"),
        (["keys", "revoke", "abc"], "keys create"),
        (["keys", "rotate", "abc"], "keys create"),
        (["serve"], "keys create"),
        (["audit", "verify"], "keys create"),
        (["audit", "show"], "no such file"),
        (["keys", "create", "--name", "", "--scopes", "score:reward"], "name"),
    ],
)
def test_a_failure_is_one_line_and_exit_code_2(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.count("\n") == 1
    assert written.err.startswith("error: ")
    assert words in written.err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["keys"],
        ["frobnicate"],
        ["keys", "create", "--name", "n"],
        ["keys", "create", "--name", "n", "--scopes", "score:everything"],
        ["keys", "create", "--name", "n", "--scopes", ""],
        ["keys", "create", "--name", "n", "--scopes", "score:reward", "--expires-days", "0"],
        ["keys", "create", "--name", "n", "--scopes", "score:reward", "--expires-days", "nan"],
        ["serve", "--port", "http"],
        ["audit"],
        ["keys", "create", "--name", "n", "--scopes", "score:reward", "--budget", "0"],
        ["keys", "create", "--name", "n", "--scopes", "score:reward", "--rate", "1.5"],
        ["keys", "rotate"],
        ["keys", "rotate", "abc", "--grace-hours", "-1"],
        ["audit", "verify", "--expect", "5"],
        ["audit", "show", "--last", "0"],
        ["top", "--metrics-port", "1", "--key-file", "k", "--every", "-1"],
        ["top", "--metrics-port", "1", "--key-file", "k", "--every", "nan"],
    ],
)
def test_wrong_use_is_exit_code_2_and_makes_nothing(folder: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert not (folder / "keys.json").exists()


def audited(folder: Path) -> None:
    main(["init"])
    audit = AuditFile(folder)
    for n in range(5):
        audit.append([{"event": "score", "key_id": "ab"[n % 2], "n": n}])
    audit.close()


def test_audit_verify_says_where_the_chain_ends(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audited(folder)
    capsys.readouterr()
    main(["audit", "verify"])
    printed = capsys.readouterr().out
    mac = json.loads((folder / "audit.jsonl").read_text().splitlines()[-1])["mac"]
    assert printed == f"5 lines, unbroken; the last is 5:{mac}\n"
    main(["audit", "verify", "--expect", f"5:{mac}"])


@pytest.mark.parametrize("arguments", [[], ["--expect", f"5:{'0' * 64}"]])
def test_audit_verify_fails_in_one_line_when_it_is_not_what_was_written(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    audited(folder)
    if not arguments:
        text = (folder / "audit.jsonl").read_text()
        (folder / "audit.jsonl").write_text(text.replace('"n":2', '"n":1'))
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["audit", "verify", *arguments])
    assert caught.value.code == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.count("\n") == 1
    assert ("line 3 was changed" in written.err) is not bool(arguments)


def test_audit_show_prints_the_last_records_of_a_key(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    audited(folder)
    capsys.readouterr()
    main(["audit", "show", "--last", "2"])
    assert [json.loads(line)["n"] for line in capsys.readouterr().out.splitlines()] == [3, 4]
    main(["audit", "show", "--key", "a"])
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["n"] for record in shown] == [0, 2, 4]
    assert "mac" not in shown[0]


def test_rotate_prints_a_new_key_alone_and_bounds_the_old_one(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = create(capsys, "--budget", "9", "--rate", "7", "--expires-days", "30").strip()
    main(["keys", "rotate", old.split("_")[1], "--grace-hours", "2"])
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    ring = KeyRing(folder)
    before, after = ring.authenticate(old), ring.authenticate(printed.strip())
    assert before is not None
    assert after is not None
    assert before._replace(key_id=after.key_id) == after
    assert (after.budget, after.rate, after.account) == (9, 7, before.key_id)
    first, second = auth.read_keys(folder).keys
    assert first.expires == pytest.approx(time.time() + 7200, abs=5)
    assert second.expires == pytest.approx(time.time() + 30 * 86_400, abs=5)


def test_a_key_that_is_not_active_cannot_be_rotated(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key_id = create(capsys).split("_")[1]
    main(["keys", "revoke", key_id])
    for name, words in ((key_id, "not active"), ("0" * 12, "no such key")):
        with pytest.raises(SystemExit):
            main(["keys", "rotate", name])
        assert words in capsys.readouterr().err
    assert len(auth.read_keys(folder).keys) == 1


@pytest.mark.parametrize("arguments", [["audit", "show"], ["keys", "list"], ["audit", "verify"]])
def test_a_command_whose_output_nobody_reads_ends_quietly(folder: Path, arguments: list[str]) -> None:
    audited(folder)
    auth.create_key(folder, "n", [Scope.SCORE_REWARD])
    process = subprocess.Popen(
        [sys.executable, "-m", "reward_service.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize(
    ("arguments", "file"),
    [
        (["serve"], "pepper"),
        (["keys", "list"], "keys.json"),
        (["keys", "revoke", "0" * 12], "keys.json"),
        (["audit", "verify"], "pepper"),
        (["audit", "show"], "audit.jsonl"),
        (["serve"], "settings.toml"),
    ],
)
def test_a_file_of_another_user_is_no_damaged_file(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    file: str,
) -> None:
    audited(folder)
    auth.create_key(folder, "n", [Scope.SCORE_REWARD])
    refused, plain = folder / file, io.open

    def guarded(path: Any, *options: Any, **more: Any) -> Any:  # root may read everything
        if path == refused:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return plain(path, *options, **more)

    monkeypatch.setattr(io, "open", guarded)
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said == f"error: {refused}: Permission denied; run this as the user whose file it is\n"


def test_a_full_disk_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["init"])
    capsys.readouterr()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as caught:
        main(["keys", "create", "--name", "n", "--scopes", "score:reward"])
    assert caught.value.code == 2
    written = capsys.readouterr()
    assert (written.out, written.err.count("\n")) == ("", 1)
    assert "No space left on device" in written.err


def test_a_home_that_is_no_folder_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder.parent.mkdir(parents=True)
    folder.touch()
    with pytest.raises(SystemExit):
        main(["serve"])
    assert capsys.readouterr().err == f"error: {folder}: is no folder; set REWARD_SERVICE_HOME to one\n"

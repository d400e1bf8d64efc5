"""`looper doctor` finds what is wrong and says how to mend it."""

from __future__ import annotations

from pathlib import Path

import pytest

from looper_trainer import doctor
from looper_trainer.cli import main
from looper_trainer.doctor import disk, libraries, memory, python_version
from looper_trainer.testing import FakeRewardServer

GOOD = {
    "torch": "2.13.0",
    "transformers": "5.17.0",
    "trl": "1.16.0",
    "peft": "0.21.2",
    "accelerate": "1.15.0",
}
GOOD |= {"datasets": "5.2.0", "vllm": "0.31.0"}


def test_versions_are_compared_with_those_that_are_tested() -> None:
    assert {finding.level for finding in libraries(GOOD.get)} == {"ok"}
    old = GOOD | {"transformers": "4.57.0"}
    (bad,) = [finding for finding in libraries(old.get) if finding.level == "problem"]
    assert (bad.subject, bad.fix) == ("transformers", "pip install 'transformers==5.*'")
    none = [finding for finding in libraries({}.get) if finding.level == "problem"]
    assert none[0].fix == "pip install 'looper-trainer[train]'"


def test_python_memory_and_disk_are_measured_against_what_a_run_needs(tmp_path: Path) -> None:
    assert python_version((3, 10, 2)).level == "problem"
    assert python_version((3, 11, 0)).level == "ok"
    assert memory(2**30).level == "problem"
    assert memory(8 * 2**30).level == "ok"
    assert memory(None).level == "note"
    assert str(tmp_path) in disk(tmp_path / "not" / "yet").text
    (tmp_path / "file").touch()
    assert disk(tmp_path / "file" / "run").level == "problem"


@pytest.mark.parametrize(
    ("key", "expected"),
    [("k", "doctor: nothing stands in the way"), ("less", "--disclosure reward")],
    ids=["everything", "rewards alone"],
)
def test_a_good_service_is_named_with_its_scorer_and_what_the_key_may_ask_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], key: str, expected: str
) -> None:
    monkeypatch.setattr(doctor, "_memory_bytes", lambda: 8 * 2**30)
    with FakeRewardServer(key="k", reward_key="less", scorer_id="scorer-7") as server:
        monkeypatch.setenv("LOOPER_REWARD_URL", server.url)
        monkeypatch.setenv("LOOPER_REWARD_KEY", key)
        assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "scorer-7" in shown
    assert expected in shown


@pytest.mark.parametrize(
    ("key", "running", "expected"),
    [
        ("wrong", True, "check LOOPER_REWARD_KEY"),
        ("k", False, "start it or check LOOPER_REWARD_URL"),
    ],
)
def test_a_service_that_cannot_be_used_is_a_problem_with_its_fix(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    key: str,
    running: bool,
    expected: str,
) -> None:
    server = FakeRewardServer(key="k")
    server.start()
    if not running:
        server.stop()
    monkeypatch.setenv("LOOPER_REWARD_URL", server.url)
    monkeypatch.setenv("LOOPER_REWARD_KEY", key)
    assert main(["doctor"]) == 2
    server.stop()
    shown = capsys.readouterr()
    assert expected in shown.out
    assert shown.err.startswith("error: doctor: ")


@pytest.mark.parametrize(
    ("name", "value", "fix"),
    [
        ("LOOPER_REWARD_URL", "127.0.0.1:8080", "https://HOST"),
        ("LOOPER_REWARD_KEY", "", "LOOPER_REWARD_KEY_FILE"),
        ("LOOPER_REWARD_KEY", "two words", "the key alone"),
        ("LOOPER_REWARD_KEY_FILE", "absent.key", "readable"),
        ("LOOPER_REWARD_CLIENT_KEY", "client.pem", "set both"),
    ],
)
def test_a_fix_says_what_to_do_and_not_the_problem_again(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, fix: str
) -> None:
    monkeypatch.setenv("LOOPER_REWARD_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("LOOPER_REWARD_KEY", "" if name == "LOOPER_REWARD_KEY_FILE" else "k")
    monkeypatch.setenv(name, value)
    (finding,) = doctor.service()
    assert fix in finding.fix
    assert fix not in finding.text
    assert finding.text not in finding.fix

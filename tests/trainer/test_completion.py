"""Completion scripts, run by the shells themselves."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from looper_trainer.cli import COMMANDS, main


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


def complete(source: str, *words: str) -> list[str]:
    """What bash offers for the last of `words`."""
    program = (
        f"{source}\nCOMP_WORDS=({' '.join(repr(word) for word in words)})\nCOMP_CWORD={len(words) - 1}\n"
        '_looper\nprintf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", program], capture_output=True, text=True, check=True, timeout=30
    )
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_commands_and_their_options(capsys: pytest.CaptureFixture[str]) -> None:
    source = script("bash", capsys)
    assert set(complete(source, "looper", "")) == {*COMMANDS, "--help", "--version"}
    assert complete(source, "looper", "prep") == ["prepare-data"]
    assert complete(source, "looper", "ppo", "--clip") == ["--clip-range"]
    assert "--config" in complete(source, "looper", "sft", "--")
    assert "--config" not in complete(source, "looper", "status", "--")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_find_no_fault_in_theirs(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = script(shell, capsys)
    for name in COMMANDS:
        assert name in source
    if (found := shutil.which(shell)) is not None:
        flag = "-n" if shell == "zsh" else "--no-execute"
        subprocess.run([found, flag, "/dev/stdin"], input=source, text=True, check=True, timeout=30)


def test_help_shows_examples_and_needs_no_name_for_the_obvious_argument() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "looper_trainer.cli", "run", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "examples:\n  looper run run.toml --plan\n" in done.stdout
    assert "--config" not in done.stdout

"""Completion scripts, run by the shells themselves."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

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
    assert complete(source, "looper", "ppo", "--train", "f") == ["full"]
    assert set(complete(source, "looper", "ppo", "--train", "")) == {"lora", "full"}
    assert complete(source, "looper", "sft", "--train", "") == complete(source, "looper", "sft", "")


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish")
def test_fish_completes_commands_options_and_files(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "looper.fish").write_text(script("fish", capsys), encoding="utf-8")
    (tmp_path / "run.toml").touch()

    def offered(line: str) -> set[str]:
        done = subprocess.run(
            ["fish", "--no-config", "-c", f"source looper.fish; complete -C '{line}'"],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
            cwd=tmp_path,
        )
        assert not done.stderr
        return {found.split("\t")[0] for found in done.stdout.splitlines()}

    assert offered("looper ") == set(COMMANDS)
    assert offered("looper prep") == {"prepare-data"}
    assert offered("looper ppo --clip-ra") == {"--clip-range"}
    assert "--help" in offered("looper status --")
    assert offered("looper status --conf") == set()
    assert "run.toml" in offered("looper ppo --config ru")
    assert "run.toml" in offered("looper run ru")
    assert offered("looper ppo --train ") == {"lora", "full"}


def typed(keys: list[str], folder: Path) -> list[str]:
    """What an interactive zsh makes of each of `keys`, typed on an empty line and followed by a tab."""
    start = "\n".join(
        [
            "PS1=; PROMPT_EOL_MARK=; unsetopt beep zle_bracketed_paste; setopt no_list_beep",
            f"fpath=({folder} $fpath); autoload -Uz compinit; compinit -u -d {folder}/dump",
            # The completed line is written to a file instead of run.
            f'keep() {{ print -r -- "$BUFFER" >>{folder}/kept; BUFFER=; }}',
            "zle -N keep; bindkey '^X' keep; bindkey '^I' expand-or-complete",
            f"cd {folder}; print >>{folder}/kept",
        ]
    )
    (folder / ".zshrc").write_text(start + "\n", encoding="utf-8")
    kept = folder / "kept"
    process, terminal = pty.fork()
    if not process:
        os.environ |= {"ZDOTDIR": str(folder), "TERM": "dumb"}
        os.execvp("zsh", ["zsh", "-d", "-i"])
    threading.Thread(target=_drain, args=(terminal,), daemon=True).start()
    try:
        for number, line in enumerate(keys, start=1):
            _wait_for_lines(kept, number)
            os.write(terminal, f"{line}\t\x18".encode())
        _wait_for_lines(kept, len(keys) + 1)
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(terminal)
    return [line.rstrip() for line in kept.read_text(encoding="utf-8").splitlines()[1:]]


def _drain(terminal: int) -> None:
    try:
        while os.read(terminal, 65536):
            pass
    except OSError:
        pass  # the shell has ended


def _wait_for_lines(file: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while not file.exists() or file.read_text(encoding="utf-8").count("\n") < count:
        assert time.monotonic() < deadline, "zsh did not get there"
        time.sleep(0.02)


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh")
def test_zsh_completes_commands_options_and_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "_looper").write_text(script("zsh", capsys), encoding="utf-8")
    (tmp_path / "settings.toml").touch()
    lines = {
        "looper prep": "looper prepare-data",
        "looper ppo --clip": "looper ppo --clip-range",
        "looper ppo --config sett": "looper ppo --config settings.toml",
        "looper run sett": "looper run settings.toml",
        "looper run settings.toml --pl": "looper run settings.toml --plan",
        "looper status --clip": "looper status --clip",
        "looper ppo --train ful": "looper ppo --train full",
        "looper sft --hel": "looper sft --help",
    }
    assert typed(list(lines), tmp_path) == list(lines.values())


def test_help_shows_examples_and_needs_no_name_for_the_obvious_argument() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "looper_trainer.cli", "run", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "examples:\n  looper run run.toml --plan\n" in done.stdout
    assert "--config" not in done.stdout

"""Servers that stand for a reward of one's own, started by hand: what cannot be served is one line."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TEMPLATE = str(Path(__file__).parents[2] / "examples/private_service/my_reward.py")


@pytest.fixture
def taken() -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield str(listener.getsockname()[1])


def refusal(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (*_, said) = done.stderr.splitlines()
    assert "Traceback" not in done.stderr
    return said


def test_a_taken_port_is_one_line(taken: str, tmp_path: Path) -> None:
    expected = f"error: port {taken}: Address already in use; choose another --port"
    assert refusal("-m", "looper_trainer.testing", "--key", "k", "--port", taken).startswith(expected)
    key = str(tmp_path / "trainer.key")
    assert refusal(TEMPLATE, "--port", taken, "--key-file", key).startswith(expected)


def test_a_port_that_is_none_is_one_line() -> None:
    assert "99999" in refusal("-m", "looper_trainer.testing", "--key", "k", "--port", "99999")


def test_an_empty_key_opens_nothing(tmp_path: Path) -> None:
    (tmp_path / "trainer.key").touch()
    said = refusal(TEMPLATE, "--port", "0", "--key-file", str(tmp_path / "trainer.key"))
    assert said.startswith("error: the key is empty; ")


def test_a_key_file_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    file = tmp_path / "absent" / "trainer.key"
    assert str(file) in refusal(TEMPLATE, "--port", "0", "--key-file", str(file))


def test_an_interrupt_is_a_wanted_end(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, TEMPLATE, "--port", "0", "--key-file", str(tmp_path / "trainer.key")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Children of a shell's background job ignore the interrupt.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("http://127.0.0.1:")
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 0

"""Runs a command and ends its whole process group when the command or the caller is gone.

`python vllm_guard.py COMMAND...`, with a pipe as stdin that the caller keeps open: the pipe's end is the
order to stop, and it also ends when the caller dies in any way, `kill -9` included. Otherwise a killed
trainer would leave a server behind that holds the GPU's memory, and could not be resumed. (Linux's
parent-death signal will not do: it fires when the *thread* that started the process ends.)

Standard library only; started as a file, so that it imports nothing of the package. Must lead its own
process group (`start_new_session=True`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

GRACE_S = 10.0


def _stop_when_stdin_ends(child: subprocess.Popen[bytes]) -> None:
    sys.stdin.buffer.read()
    child.terminate()
    try:
        child.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        os.killpg(0, signal.SIGKILL)


def main(command: list[str]) -> None:
    """Run `command` until it ends or stdin does; never returns, and leaves no process of the group."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    threading.Thread(target=_stop_when_stdin_ends, args=(child,), daemon=True).start()
    child.wait()
    os.killpg(0, signal.SIGKILL)  # helpers that outlive the command, and this process


if __name__ == "__main__":
    main(sys.argv[1:])

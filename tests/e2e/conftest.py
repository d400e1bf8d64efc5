"""The public commands and the private service, started as a user starts them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def environment(**extra: str) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("LOOPER_", "REWARD_SERVICE_"))
    }
    return {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **extra}


class Service:
    """The private reward service on a fixed port, to be killed and started again."""

    def __init__(self, home: Path) -> None:
        self.home = home
        home.mkdir(mode=0o700)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = environment(REWARD_SERVICE_HOME=str(home))
        create = [
            BIN / "reward-service",
            "keys",
            "create",
            "--name",
            "e2e",
            "--scopes",
            "score:reward,score:components",
        ]
        done = subprocess.run(create, env=self.environment, capture_output=True, text=True, check=True)
        self.key = done.stdout.strip()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        log = (self.home / "log.txt").open("ab")
        command = [BIN / "reward-service", "serve", "--host", "127.0.0.1", "--port", str(self.port)]
        self.process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        headers = {"Authorization": f"Bearer {self.key}"}
        while time.monotonic() < deadline:
            assert self.process.poll() is None, (self.home / "log.txt").read_text()
            try:
                if httpx.get(f"{self.url}/readyz", headers=headers, timeout=2).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise AssertionError("the service did not become ready: " + (self.home / "log.txt").read_text())

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(timeout=30)

    def client_environment(self) -> dict[str, str]:
        return environment(LOOPER_REWARD_URL=self.url, LOOPER_REWARD_KEY=self.key)


@pytest.fixture
def service(tmp_path):
    service = Service(tmp_path / "service")
    yield service
    service.stop()


@pytest.fixture
def base_model(tmp_path) -> Path:
    """A small Llama with random weights, and problems in `data/`."""
    problems, base, data = tmp_path / "problems", tmp_path / "base", tmp_path / "data"
    for command in (
        ["-m", "looper_trainer.demo.problems", problems],
        ["-m", "looper_trainer.demo.model", base, "--data", problems, "--sums", "0"],
    ):
        subprocess.run(
            [sys.executable, *map(str, command)], env=environment(), check=True, capture_output=True
        )
    prepare = [
        BIN / "looper",
        "prepare-data",
        "--input",
        problems / "train.jsonl",
        "--output",
        data,
        "--limit",
        "100",
    ]
    subprocess.run([str(word) for word in prepare], env=environment(), check=True, capture_output=True)
    return base

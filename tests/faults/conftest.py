"""The stub service as processes, over folders that share pepper and keys where there are several."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from reward_service.home import prepare_home

STUB = Path(__file__).with_name("stub_service.py")


def expected_reward(text: str) -> float:
    """What the stub gives for `text`."""
    spec = importlib.util.spec_from_file_location("stub_service", STUB)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return float(module.expected_reward(text))


def message(run: str, step: int, arms: int = 3) -> dict[str, Any]:
    """A valid request of one question; no other has its texts."""
    texts = [{"id": str(i), "full_text": f"{run} {step} {i}\n#### 8"} for i in range(arms)]
    return {
        "contract": "1.0",
        "run_id": run,
        "step": step,
        "purpose": "train",
        "disclosure": "reward",
        "questions": [{"id": f"q{step}", "question": "3 + 5?", "gold_answer": "8", "arms": texts}],
    }


class Killable:
    """The stub service on one port and one folder, over and over."""

    def __init__(self, home: Path, **settings: Any) -> None:
        self.home = home
        self.settings = settings
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1/score"

    def start(self, environment: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(STUB), str(self.home), str(self.port), json.dumps(self.settings)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def kill(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        self.process.kill()
        self.process.wait(30)
        self.process.stdout.close()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A prepared folder."""
    folder = tmp_path / "home"
    prepare_home(folder)
    return folder


@pytest.fixture
def start(home: Path, tmp_path: Path) -> Iterator[Callable[..., Killable]]:
    """Start a stub service; further ones have folders of their own, with the first one's pepper and keys."""
    started: list[Killable] = []

    def run(**settings: Any) -> Killable:
        folder = home
        if started:
            folder = tmp_path / f"home{len(started)}"
            prepare_home(folder)
            for name in ("pepper", "keys.json"):
                shutil.copy2(home / name, folder / name)
        service = Killable(folder, **settings)
        service.start()
        started.append(service)
        return service

    yield run
    for service in started:
        service.kill()

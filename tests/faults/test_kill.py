"""kill -9 under load, again and again: no reward is lost or changed, none is paid for twice, the audit holds.

LOOPER_KILL_CYCLES sets how often (default 5; a long run takes 100).
"""

from __future__ import annotations

import importlib.util
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from reward_service import auth
from reward_service.audit import read_records, verify
from reward_service.auth import Scope
from reward_service.home import prepare_home
from reward_service.state import State

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

CYCLES = int(os.environ.get("LOOPER_KILL_CYCLES", "5"))
CLIENTS = 4
ARMS = 3
STUB = Path(__file__).with_name("stub_service.py")


def expected_reward(text: str) -> float:
    spec = importlib.util.spec_from_file_location("stub_service", STUB)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return float(module.expected_reward(text))


class Killable:
    """The stub service on one port and one folder, over and over."""

    def __init__(self, home: Path) -> None:
        self.home = home
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1/score"

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(STUB), str(self.home), str(self.port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def kill(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        self.process.kill()
        self.process.wait(30)
        self.process.stdout.close()


def message(client: int, step: int) -> dict[str, Any]:
    arms = [{"id": str(i), "full_text": f"{client} {step} {i}\n#### 8"} for i in range(ARMS)]
    return {
        "contract": "1.0",
        "run_id": f"client-{client}",
        "step": step,
        "purpose": "train",
        "disclosure": "reward",
        "questions": [{"id": "q", "question": "3 + 5?", "gold_answer": "8", "arms": arms}],
    }


def test_killed_again_and_again_it_loses_changes_and_charges_nothing_twice(tmp_path: Path) -> None:
    home = tmp_path / "home"
    prepare_home(home)
    key = auth.create_key(home, "load", [Scope.SCORE_REWARD])
    service, stop = Killable(home), threading.Event()
    retries: Counter[str] = Counter()

    def post(http: httpx.Client, client: int, step: int) -> bytes:
        """The 200 reply to one request, repeated until it comes."""
        headers = {"authorization": f"Bearer {key}", "idempotency-key": f"{client}-{step}"}
        ends = time.monotonic() + 120
        while True:
            assert time.monotonic() < ends
            try:
                reply = http.post(service.url, json=message(client, step), headers=headers)
            except httpx.TransportError as error:
                retries[type(error).__name__] += 1
                time.sleep(0.02)
                continue
            assert reply.status_code in (200, 503), reply.text
            if reply.status_code == 200:
                return reply.content

    def load(client: int) -> list[bytes]:
        bodies = []
        with httpx.Client(timeout=60) as http:
            while not stop.is_set():
                bodies.append(post(http, client, len(bodies)))
        return bodies

    chance = random.Random(7)
    service.start()
    with ThreadPoolExecutor(CLIENTS) as pool:
        loads = [pool.submit(load, client) for client in range(CLIENTS)]
        try:
            for _ in range(CYCLES):
                time.sleep(chance.uniform(0.2, 0.8))
                service.kill()
                service.start()
            time.sleep(0.3)
        finally:
            stop.set()
        told = [future.result() for future in loads]

    try:
        requests = sum(len(bodies) for bodies in told)
        assert requests > 20 * CYCLES, "the load was too light to show anything"
        assert sum(retries.values()) >= CYCLES, "the kills hit nobody"
        with httpx.Client(timeout=60) as http:
            for client, bodies in enumerate(told):
                for step, body in enumerate(bodies):
                    assert post(http, client, step) == body, "another reply than before"
    finally:
        service.kill()

    for client, bodies in enumerate(told):
        for step, body in enumerate(bodies):
            (result,) = httpx.Response(200, content=body).json()["results"]
            rewards = [arm["reward"] for arm in result["arms"]]
            assert rewards == [expected_reward(f"{client} {step} {i}\n#### 8") for i in range(ARMS)]

    verify(home)
    with closing(State(home, None, 10**6, 10**9, 86_400.0)) as state:
        assert state.used(key.split("_")[1]) == ARMS * requests
    scored = Counter(record["digest"] for record in read_records(home) if record["event"] == "score")
    assert len(scored) == requests
    # A kill between audit and commit: scored and audited twice, charged once.
    assert sum(scored.values()) - requests <= CLIENTS * CYCLES

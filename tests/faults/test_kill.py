"""kill -9 under load, again and again: no reward is lost or changed, none is paid for twice, the audit holds.

LOOPER_KILL_CYCLES sets how often (default 5); benchmarks/private/kill_cycles.py makes the long run of 100 and
keeps what the file named by LOOPER_KILL_REPORT then says.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from reward_service import auth
from reward_service.audit import read_records, verify
from reward_service.auth import Scope
from reward_service.state import State

from .conftest import Killable, expected_reward, message

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

CYCLES = int(os.environ.get("LOOPER_KILL_CYCLES", "5"))
CLIENTS = 4
ARMS = 3


def test_killed_again_and_again_it_loses_changes_and_charges_nothing_twice(home: Path) -> None:
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
                reply = http.post(service.url, json=message(f"{client}", step), headers=headers)
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
    if report := os.environ.get("LOOPER_KILL_REPORT"):
        counts = {
            "cycles": CYCLES,
            "requests": requests,
            "attempts_cut_off": sum(retries.values()),
            "lost_or_changed": 0,
            "charged_twice": 0,
            "scored_again_after_a_kill": sum(scored.values()) - requests,
            "audit": "unbroken",
        }
        Path(report).write_text(json.dumps(counts), encoding="utf-8")

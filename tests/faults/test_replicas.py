"""Two workers, each with a folder of its own, over one database: duplicates, rotation, its restart."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa

from reward_service import auth
from reward_service.audit import read_records, verify
from reward_service.auth import Scope
from reward_service.state import State

from .conftest import Killable, expected_reward, message

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("postgres")]

POSTGRES = os.environ.get("LOOPER_TEST_POSTGRES")  # URL of a PostgreSQL database that the tests may empty
RESTART = os.environ.get("LOOPER_TEST_POSTGRES_RESTART")  # a command that restarts its server
ARMS = 3

Start = Callable[..., Killable]


@pytest.fixture(params=["sqlite", "postgresql"])
def state_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database that both workers use, emptied."""
    return f"sqlite:///{tmp_path / 'shared.sqlite'}" if request.param == "sqlite" else emptied()


def emptied() -> str:
    if POSTGRES is None:
        pytest.skip("LOOPER_TEST_POSTGRES is not set")
    engine = sa.create_engine(POSTGRES)
    with engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE IF EXISTS replies, usage"))
    engine.dispose()
    return POSTGRES


def used(home: Path, url: str, key: str) -> int:
    with closing(State(home, url, 10**6, 10**9, 86_400.0)) as state:
        return state.used(key.split("_")[1])


def scored_digests(*homes: Path) -> Counter[object]:
    return Counter(r["digest"] for home in homes for r in read_records(home) if r["event"] == "score")


def test_duplicates_that_race_across_two_workers_get_one_reply_and_one_charge(
    home: Path, start: Start, state_url: str
) -> None:
    key = auth.create_key(home, "k", [Scope.SCORE_REWARD])
    workers = [start(state_url=state_url), start(state_url=state_url)]
    requests, senders = 60, 4
    barrier = threading.Barrier(senders)

    def send(sender: int) -> list[bytes]:
        bodies = []
        with httpx.Client(timeout=60) as http:
            for step in range(requests):
                headers = {"authorization": f"Bearer {key}", "idempotency-key": f"{step}"}
                barrier.wait(60)
                while True:
                    url = workers[sender % 2].url
                    reply = http.post(url, json=message("r", step), headers=headers)
                    if reply.status_code == 200:
                        break
                    assert reply.status_code in (409, 503), (
                        reply.text
                    )  # in flight, or the database was locked
                    time.sleep(0.01)
                bodies.append(reply.content)
        return bodies

    with ThreadPoolExecutor(senders) as pool:
        told = list(pool.map(send, range(senders)))
    assert all(bodies == told[0] for bodies in told), "the same request was told two things"
    homes = [worker.home for worker in workers]
    assert used(home, state_url, key) == ARMS * requests
    assert sum(scored_digests(*homes).values()) >= requests
    for folder in homes:
        verify(folder)


def test_keys_rotated_under_load_fail_no_request(home: Path, start: Start) -> None:
    keys = [auth.create_key(home, "k", [Scope.SCORE_REWARD])]
    service, stop = start(), threading.Event()
    statuses: Counter[int] = Counter()

    def load(client: int) -> None:
        step = 0
        with httpx.Client(timeout=60) as http:
            while not stop.is_set():
                step += 1
                headers = {"authorization": f"Bearer {keys[-1]}"}
                statuses[
                    http.post(service.url, json=message(f"{client}", step), headers=headers).status_code
                ] += 1

    with ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(load, client) for client in range(4)]
        for _ in range(10):
            time.sleep(0.1)
            keys.append(auth.rotate_key(home, keys[-1].split("_")[1], grace_s=30))
        time.sleep(0.2)
        stop.set()
        for done in loads:
            done.result(60)
    assert set(statuses) == {200}
    assert statuses[200] > 50, "the load was too light to show anything"
    with closing(State(home, None, 10**6, 10**9, 86_400.0)) as state:
        assert state.used(keys[0].split("_")[1]) == ARMS * statuses[200], "all keys are one account"


def test_a_restart_of_postgresql_loses_and_charges_nothing_twice(home: Path, start: Start) -> None:
    if RESTART is None:
        pytest.skip("LOOPER_TEST_POSTGRES_RESTART is not set")
    url = emptied()
    key = auth.create_key(home, "k", [Scope.SCORE_REWARD])
    workers, stop = [start(state_url=url), start(state_url=url)], threading.Event()
    refused: Counter[int] = Counter()

    def load(client: int) -> list[bytes]:
        bodies: list[bytes] = []
        with httpx.Client(timeout=60) as http:
            while not stop.is_set():
                headers = {"authorization": f"Bearer {key}", "idempotency-key": f"{client}-{len(bodies)}"}
                sent = message(f"{client}", len(bodies))
                reply = http.post(workers[client % 2].url, json=sent, headers=headers)
                if reply.status_code == 200:
                    bodies.append(reply.content)
                else:
                    assert reply.status_code == 503, reply.text
                    refused[503] += 1
                    time.sleep(0.05)
        return bodies

    with ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(load, client) for client in range(4)]
        time.sleep(0.5)
        subprocess.run(RESTART, shell=True, check=True, capture_output=True, timeout=200)
        time.sleep(0.5)
        before = [len(list(read_records(worker.home))) for worker in workers]
        time.sleep(1.0)
        stop.set()
        told = [done.result(60) for done in loads]
    after = [len(list(read_records(worker.home))) for worker in workers]
    assert all(a > b for a, b in zip(after, before, strict=True)), "a worker did not come back"
    assert refused[503] > 0, "the restart hit nobody"
    assert all(bodies for bodies in told)
    for client, bodies in enumerate(told):
        for step, body in enumerate(bodies):
            (result,) = httpx.Response(200, content=body).json()["results"]
            rewards = [arm["reward"] for arm in result["arms"]]
            assert rewards == [expected_reward(f"{client} {step} {i}\n#### 8") for i in range(ARMS)]
    requests = sum(map(len, told))
    assert requests * ARMS <= used(home, url, key) <= (requests + len(told)) * ARMS
    for worker in workers:
        verify(worker.home)

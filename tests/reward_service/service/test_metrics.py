from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from looper_schemas.problems import ProblemCode
from reward_service import auth
from reward_service.auth import KeyRing, Scope
from reward_service.errors import StartError
from reward_service.metrics import Metrics, MetricsListener

SECRET_WORDS = (
    "reward",
    "regime",
    "coherence",
    "golden",
    "arm",
    "wolfram",
    "s_end",
    "s_path",
    "s_cf",
    "s_wm",
)


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Every sample by its name and the values of its labels."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def of(live: Any) -> dict[tuple[str, ...], float]:
    return samples(live.app.state.service.metrics.text().decode())


@pytest.mark.anyio
async def test_requests_questions_and_problems_are_counted(open_service: Any, message: Any) -> None:
    async with open_service() as live:
        arms = [{"id": "0", "full_text": "x" * 100}]
        fine = {"id": "f", "question": "q", "gold_answer": "1", "arms": arms}
        poison = {"id": "p", "question": "poison", "arms": arms}
        await live.score(message(fine, poison))
        await live.score(b"{")
        await live.client.get("/canary7141", headers={"authorization": "Bearer canary7141"})
        found = of(live)
        assert found["service_requests_total", "/v1/score", "200"] == 1
        assert found["service_requests_total", "/v1/score", "400"] == 1
        assert found["service_requests_total", "-", "401"] == 1
        assert found["service_request_seconds_count", "/v1/score"] == 2
        assert found["service_problems_total", "malformed_request"] == 1
        assert found["service_questions_total", "scored"] == 1
        assert found["service_questions_total", "scorer_failed"] == 1
        assert (found["service_value_count",], found["service_value_sum",]) == (1, pytest.approx(-0.4))
        assert found["process_resident_memory_bytes",] > 1e6
        assert "canary" not in live.app.state.service.metrics.text().decode()


@pytest.mark.anyio
async def test_what_waits_is_shown_while_it_waits(open_service: Any, message: Any, until: Any) -> None:
    import asyncio

    async with open_service() as live:
        live.engine.gate.clear()
        asked = asyncio.create_task(live.score(message()))
        await until(lambda: bool(live.engine.batches))
        assert of(live)["service_waiting_items",] == 3
        assert of(live)["service_waiting_bytes",] > 100
        live.engine.gate.set()
        await asked
        assert (of(live)["service_waiting_items",], of(live)["service_waiting_bytes",]) == (0, 0)


@pytest.mark.anyio
async def test_drift_shows_before_and_when_it_closes_the_service(open_service: Any) -> None:
    async with open_service() as live:
        readiness = live.app.state.service.readiness
        assert of(live)["service_ready",] == 1
        for drift, ready in ((0.0, 1), (5e-7, 1), (0.25, 0)):
            live.engine.drift = drift
            await readiness.check()
            assert of(live)["service_check_deviation",] == pytest.approx(drift, abs=1e-9)
            assert of(live)["service_ready",] == ready


def test_names_and_labels_are_neutral() -> None:
    text = Metrics().text().decode().lower()
    assert "service_requests" in text
    assert not [word for word in SECRET_WORDS if word in text]
    closed = {code.value for code in ProblemCode}
    metrics = Metrics()
    metrics.answered("/v1/score", None, 0.1, ProblemCode.OVERLOADED.value)
    labels = {key[1] for key in samples(metrics.text().decode()) if key[0] == "service_problems_total"}
    assert labels <= closed
    assert ("service_requests_total", "/v1/score", "-") in samples(metrics.text().decode())


@pytest.fixture
def listener(home: Path) -> Iterator[MetricsListener]:
    auth.create_key(home, "first", [Scope.SCORE_REWARD])
    listener = MetricsListener(0, KeyRing(home))
    listener.start(Metrics())
    yield listener
    listener.close()


def test_the_listener_answers_only_a_key_with_the_scope(home: Path, listener: MetricsListener) -> None:
    reader = auth.create_key(home, "prometheus", [Scope.METRICS_READ])
    scorer = auth.create_key(home, "trainer", [Scope.SCORE_COMPONENTS, Scope.SCORE_REWARD])

    def get(key: str | None, path: str = "") -> httpx.Response:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return httpx.get(listener.url + path, headers=headers)

    good = get(reader)
    assert good.status_code == 200
    assert ("service_ready",) in samples(good.text)
    assert set(good.headers) == {"content-type", "content-length", "connection"}
    refused = [
        get(None),
        get("wrong"),
        get(reader[:-1]),
        get(scorer),
        get(reader, "/other"),
        get(None, "/other"),
    ]
    assert [reply.status_code for reply in refused] == [401, 401, 401, 403, 404, 401]
    assert all(reply.content == b"" for reply in refused)
    auth.revoke_key(home, reader.split("_")[1])
    assert get(reader).status_code == 401


def test_the_listener_is_on_the_loopback_and_silent_to_other_methods(listener: MetricsListener) -> None:
    assert listener.url.startswith("http://127.0.0.1:")
    port = int(listener.url.rpartition(":")[2].partition("/")[0])
    for request in (b"POST /metrics HTTP/1.1\r\n\r\n", b"canary7141\r\n\r\n", b"GET /" + b"x" * 70_000):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(request)
            with suppress(ConnectionResetError):
                assert connection.recv(1000) == b""


def test_a_taken_port_is_refused(home: Path, listener: MetricsListener) -> None:
    port = int(listener.url.rpartition(":")[2].partition("/")[0])
    with pytest.raises(StartError, match="--metrics-port"):
        MetricsListener(port, KeyRing(home))

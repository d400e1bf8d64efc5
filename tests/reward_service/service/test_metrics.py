from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from looper_schemas.problems import ProblemCode
from reward_service import auth, metrics
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
    counters = Metrics()
    counters.answered("/v1/score", None, 0.1, ProblemCode.OVERLOADED.value)
    labels = {key[1] for key in samples(counters.text().decode()) if key[0] == "service_problems_total"}
    assert labels <= closed
    assert ("service_requests_total", "/v1/score", "-") in samples(counters.text().decode())


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


def is_closed(opened: socket.socket) -> bool:
    """Whether the other side has ended the connection by now."""
    opened.settimeout(0.01)
    try:
        return opened.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def test_strangers_get_eight_places_and_one_deadline_for_a_request_that_trickles(
    home: Path, listener: MetricsListener, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metrics, "_PATIENCE_S", 2.0)
    reader = auth.create_key(home, "prometheus", [Scope.METRICS_READ])
    port = int(listener.url.rpartition(":")[2].partition("/")[0])
    threads = threading.active_count()
    with ExitStack() as stack:
        began = time.monotonic()
        opened = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(60)]
        for one in opened:
            with suppress(OSError):
                one.sendall(b"GET /metrics HTTP/1.1\r\nx: ")
        time.sleep(0.5)
        kept = [one for one in opened if not is_closed(one)]
        assert len(kept) == 8
        assert threading.active_count() <= threads + 8
        assert time.monotonic() - began < 2, "the rest was closed before any deadline"
        while kept and time.monotonic() - began < 10:  # each read would be in time, the request is not
            for one in kept:
                with suppress(OSError):
                    one.sendall(b"x")
            time.sleep(0.1)
            kept = [one for one in kept if not is_closed(one)]
        assert not kept
        assert 1.9 < time.monotonic() - began < 5
    for _ in range(20):  # a place is free again after each
        assert httpx.get(listener.url, headers={"authorization": f"Bearer {reader}"}).status_code == 200
    assert capfd.readouterr() == ("", "")


def test_a_reply_that_nobody_reads_gives_its_place_back(
    home: Path, listener: MetricsListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_PATIENCE_S", 0.3)
    monkeypatch.setattr(Metrics, "text", lambda self: b"x" * 20_000_000)  # more than the network's buffers
    reader = auth.create_key(home, "prometheus", [Scope.METRICS_READ])
    port = int(listener.url.rpartition(":")[2].partition("/")[0])
    threads = threading.active_count()
    with ExitStack() as stack:
        for _ in range(8):
            one = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            one.sendall(f"GET /metrics HTTP/1.1\r\nAuthorization: Bearer {reader}\r\n\r\n".encode())
        ends = time.monotonic() + 5
        while threading.active_count() == threads and time.monotonic() < ends:
            time.sleep(0.01)
        assert threading.active_count() > threads
        while threading.active_count() > threads and time.monotonic() < ends:
            time.sleep(0.05)
        assert threading.active_count() == threads


def test_a_taken_port_is_refused(home: Path, listener: MetricsListener) -> None:
    port = int(listener.url.rpartition(":")[2].partition("/")[0])
    with pytest.raises(StartError, match="--metrics-port"):
        MetricsListener(port, KeyRing(home))

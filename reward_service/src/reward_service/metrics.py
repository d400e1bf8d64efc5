"""Counters for the operator, in the text format of Prometheus, on a listener of their own on the loopback.

Names and labels say nothing of what is computed here, and no label holds anything that a caller sent. The
listener needs a key with the scope `metrics:read`, as everything but `/livez` does. It shares the process's
open files with the port that scores, so that strangers get few places there, each for a few seconds.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    Summary,
    generate_latest,
)

from looper_schemas.scoring import FailedQuestion, ScoredQuestion
from reward_service.admission import Admission
from reward_service.auth import KeyRing, Scope
from reward_service.errors import StartError

PATH = "/metrics"
HOST = "127.0.0.1"
_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_PLACES = 8  # requests at a time; the connections beyond are closed at once
_PATIENCE_S = 5.0  # for a whole request and its reply


class Metrics:
    """The counters of one service; each has a registry of its own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "service_requests", "Requests answered.", ["route", "status"], registry=registry
        )
        self._seconds = Histogram(
            "service_request_seconds",
            "Time from a request's head to the end of its reply.",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._problems = Counter("service_problems", "Requests refused.", ["code"], registry=registry)
        self._questions = Counter(
            "service_questions", "Questions answered, by their result.", ["result"], registry=registry
        )
        self._values = Summary("service_value", "Values answered.", registry=registry)
        self._ready = Gauge("service_ready", "1 when requests are answered.", registry=registry)
        self._deviation = Gauge(
            "service_check_deviation",
            "Largest difference from the recorded values, when last checked.",
            registry=registry,
        )
        self._arms = Gauge("service_waiting_items", "Items inside the service.", registry=registry)
        self._bytes = Gauge("service_waiting_bytes", "Bytes of bodies inside the service.", registry=registry)

        # Labels have few values, and finding a counter by its labels is slow.
        self._of = lru_cache(256)(
            lambda route, status: (self._requests.labels(route, status), self._seconds.labels(route))
        )
        self._problem = lru_cache(256)(self._problems.labels)
        self._result = lru_cache(256)(self._questions.labels)

    def watch(self, admission: Admission) -> None:
        """Report what waits in `admission`."""
        self._arms.set_function(lambda: admission.arms)
        self._bytes.set_function(lambda: admission.bytes)

    def answered(self, route: str, status: int | None, seconds: float, code: str | None) -> None:
        """A request ended, with `code` when it was refused; status None: the client was gone."""
        counter, timer = self._of(route, "-" if status is None else str(status))
        counter.inc()
        timer.observe(seconds)
        if code is not None:
            self._problem(code).inc()

    def scored(self, results: Iterable[ScoredQuestion | FailedQuestion]) -> None:
        """The questions of a request have their results."""
        for result in results:
            if isinstance(result, FailedQuestion):
                self._result(result.error.code.value).inc()
            else:
                self._result("scored").inc()
                self._values.observe(result.reward)

    def checked(self, ready: bool, deviation: float | None) -> None:
        """The golden question was asked; `deviation` is None where nothing could be compared."""
        self._ready.set(ready)
        if deviation is not None:
            self._deviation.set(deviation)

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return generate_latest(self._registry)


class MetricsListener:
    """Answers `GET /metrics` on the loopback, from a thread of its own.

    Raises:
        StartError: the port is taken.
    """

    def __init__(self, port: int, keys: KeyRing) -> None:
        self._keys = keys
        self._metrics: Metrics | None = None
        listener = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                status, body = listener._answer(self.path, self.headers.get_all("authorization") or [])
                self.send_response_only(status)
                self.send_header("content-type", _CONTENT_TYPE)
                self.send_header("content-length", str(len(body)))
                self.send_header("connection", "close")
                self.end_headers()
                self.wfile.write(body)
                self.close_connection = True

            def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
                self.close_connection = True  # whoever cannot say GET is not answered

            def log_message(self, format: str, *args: object) -> None:
                pass  # it would quote the request

        try:
            self._server = _Bounded((HOST, port), Handler)
        except OSError as error:
            raise StartError(
                f"cannot listen on {HOST}:{port} ({error.strerror}); choose another --metrics-port"
            ) from None
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://{HOST}:{self._server.server_address[1]}{PATH}"

    def start(self, metrics: Metrics) -> None:
        """Begin to answer with `metrics`."""
        self._metrics = metrics
        self._thread.start()

    def close(self) -> None:
        """Stop answering."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def _answer(self, path: str, authorizations: list[str]) -> tuple[int, bytes]:
        kind, _, token = authorizations[0].partition(" ") if len(authorizations) == 1 else ("", "", "")
        principal = self._keys.authenticate(token.strip())
        if principal is None or kind.lower() != "bearer":
            return 401, b""
        if not principal.may(Scope.METRICS_READ):
            return 403, b""
        if path != PATH or self._metrics is None:
            return 404, b""
        return 200, self._metrics.text()


class _Bounded(ThreadingHTTPServer):
    """A thread a request, for _PLACES at a time; one that is late loses its connection.

    The accepting thread looks after the deadlines: a timeout of the socket would begin anew at each byte.
    """

    daemon_threads = True
    request_queue_size = 128  # of Python's 5 a burst of strangers would leave none for Prometheus
    _ends: dict[socket.socket, float]  # of the requests at hand, on the monotonic clock

    def __init__(self, *arguments: Any) -> None:
        self._ends = {}
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        if len(self._ends) >= _PLACES:
            self.shutdown_request(request)
            return
        self._ends[request] = time.monotonic() + _PATIENCE_S
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:  # called at every request's end, whatever it was
        self._ends.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:  # called after each connection, and every half second
        now = time.monotonic()
        for request, ends in list(self._ends.items()):
            if now > ends:
                with suppress(OSError):  # it has ended in this moment
                    request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that goes away is no event, and a traceback could quote it

"""A small HTTP server of contract 1.0, to put a reward of your own behind: everything but the reward.

Subclass `RewardServer` and answer `judge`: rewards, correctness and components of one question's arms. Keys,
limits, strict messages, disclosure, idempotent retries and pinned scorers are done here, with nothing but the
standard library and pydantic. It scores one request at a time and keeps no state beyond its process;
docs/bring-your-own-reward.md says what a service that strangers can reach needs besides.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import socket
import sys
import threading
import uuid
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal, Self

from pydantic import ValidationError

from looper_schemas.problems import PROBLEM_CONTENT_TYPE, Problem, ProblemCode
from looper_schemas.scoring import (
    ArmReward,
    Disclosure,
    FailedQuestion,
    Limits,
    Question,
    QuestionError,
    RewardMode,
    RewardRange,
    ScoredQuestion,
    ScoreRequest,
    ScoreResponse,
    Scores,
    ServiceInfo,
)
from looper_trainer.errors import ConfigError

DEFAULT_LIMITS = Limits(max_questions=64, max_arms=16, max_text_chars=100_000, max_body_bytes=4 * 2**20)
_REPLIES_KEPT = 1024


@dataclass(frozen=True)
class Judgement:
    """What a question's arms are worth. All sequences are in the order of `question.arms`.

    Args:
        rewards: of each arm, within the range announced for the mode.
        correct: whether each arm is right; None where there is no gold answer.
        scores: components to disclose; with fewer than two arms all but `s_wm` are None.
    """

    rewards: Sequence[float]
    correct: Sequence[bool | None]
    scores: Scores


class Unscorable(Exception):
    """Raised by `judge`: this question has no score. It is reported as failed, and never becomes a number."""

    def __init__(self, code: ProblemCode = ProblemCode.SCORER_FAILED, *, retryable: bool = False) -> None:
        super().__init__(code.value)
        self.code = code
        self.retryable = retryable


class RewardServer:
    """A reward service on 127.0.0.1; a context manager that starts and stops it in a thread.

    Args:
        scorer_id: an opaque name of reward code, settings and models; another reward needs another name.
        ranges: lowest and highest reward of each mode.
        key: a key that may see everything.
        reward_key: another key, which may see rewards only.
        port: 0 for any free one.
        limits: what one request may hold.

    Attributes:
        url: its base address once started.
        requests: score requests answered afresh, in order (the newest thousand).
        replayed: number of replies given again for a repeated idempotency key.
    """

    retry_after_s: int | None = None

    def __init__(
        self,
        scorer_id: str,
        ranges: Mapping[RewardMode, tuple[float, float]],
        *,
        key: str,
        reward_key: str | None = None,
        port: int = 0,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.scorer_id = scorer_id
        self.ranges = {mode: RewardRange(low=low, high=high) for mode, (low, high) in ranges.items()}
        self.key = key
        self.reward_key = reward_key
        self.limits = limits
        self.requests: list[ScoreRequest] = []
        self.replayed = 0
        self._replies: OrderedDict[str, tuple[str, bytes]] = OrderedDict()
        self._lock = threading.Lock()
        self._port = port
        self._http: _Server | None = None

    # What a subclass answers.

    def judge(self, question: Question, mode: RewardMode) -> Judgement:
        """The rewards of one question's arms: a function of its arguments alone, whatever the arms' order.

        Raises:
            Unscorable: this question has no score.
        """
        raise NotImplementedError

    # What a fake may break.

    def disturbance(self) -> ProblemCode | Literal["drop"] | None:
        """A fault that comes before an answer: a problem, or a connection that is dropped."""
        return None

    def outgoing(self, body: bytes) -> bytes:
        """A reply's bytes as they go out."""
        return body

    # What is done here.

    @property
    def url(self) -> str:
        """Base address of the running server."""
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Listen and answer in a thread; after `stop`, again at the same port.

        Raises:
            ConfigError: the key is empty, or the port is taken or none.
        """
        if not self.key:
            raise ConfigError("the key is empty; give it one that nobody can guess")
        handler = type("Handler", (_Handler,), {"service": self})
        try:
            self._http = _Server(("127.0.0.1", self._port), handler)
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", error)
            raise ConfigError(
                f"port {self._port}: {why}; choose another --port, or 0 for any free one"
            ) from None
        self._port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Close the port and every connection, as a process that ends does."""
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http.hang_up()
            self._http = None

    def serve(self) -> int:
        """Serve until interrupted, as a command does: the address on standard output, then an exit code."""
        try:
            with self:
                print(self.url, flush=True)
                threading.Event().wait()
        except KeyboardInterrupt:
            return 0
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
        return 2

    def info(self) -> ServiceInfo:
        """The body of `GET /v1/info`."""
        return ServiceInfo(
            scorer_id=self.scorer_id,
            limits=self.limits,
            reward_modes=tuple(self.ranges),
            ranges={mode.value: span for mode, span in self.ranges.items()},
        )

    def allowed(self, key: str) -> Disclosure | None:
        """The most that `key` may have disclosed; None for an unknown key."""
        if hmac.compare_digest(key.encode(), self.key.encode()):
            return Disclosure.COMPONENTS
        if self.reward_key is not None and hmac.compare_digest(key.encode(), self.reward_key.encode()):
            return Disclosure.REWARD
        return None

    def answer(
        self, idempotency_key: str | None, body: bytes, allowed: Disclosure = Disclosure.COMPONENTS
    ) -> bytes | ProblemCode:
        """The reply to a score request: a 200 body, or what is wrong with it."""
        digest = hashlib.sha256(body).hexdigest()
        with self._lock:
            if idempotency_key is not None and idempotency_key in self._replies:
                known_digest, reply = self._replies[idempotency_key]
                if known_digest != digest:
                    return ProblemCode.IDEMPOTENCY_MISMATCH
                self.replayed += 1
                return reply
            try:
                request = ScoreRequest.model_validate_json(body)
            except ValidationError as error:
                kinds = {item["type"] for item in error.errors(include_url=False, include_input=False)}
                malformed = "json_invalid" in kinds
                return ProblemCode.MALFORMED_REQUEST if malformed else ProblemCode.INVALID_REQUEST
            if problem := self._refusal(request, allowed):
                return problem
            reply = self._response(request, digest).model_dump_json(exclude_none=False).encode()
            self.requests = [*self.requests[-_REPLIES_KEPT:], request]
            if idempotency_key is not None:
                self._replies[idempotency_key] = (digest, reply)
                if len(self._replies) > _REPLIES_KEPT:
                    self._replies.popitem(last=False)
            return reply

    def _refusal(self, request: ScoreRequest, allowed: Disclosure) -> ProblemCode | None:
        if _beyond(request.disclosure, allowed):
            return ProblemCode.FORBIDDEN
        if request.scorer_id is not None and request.scorer_id != self.scorer_id:
            return ProblemCode.SCORER_MISMATCH
        if request.reward_mode not in self.ranges:
            return ProblemCode.INVALID_REQUEST
        too_many = len(request.questions) > self.limits.max_questions
        if too_many or any(len(question.arms) > self.limits.max_arms for question in request.questions):
            return ProblemCode.REQUEST_TOO_LARGE
        return None

    def _response(self, request: ScoreRequest, digest: str) -> ScoreResponse:
        return ScoreResponse(
            request_id=digest[:32],
            scorer_id=self.scorer_id,
            request_digest=digest,
            results=tuple(self._result(question, request) for question in request.questions),
        )

    def _result(self, question: Question, request: ScoreRequest) -> ScoredQuestion | FailedQuestion:
        try:
            found = self.judge(question, request.reward_mode)
        except Unscorable as error:
            return FailedQuestion(
                id=question.id, error=QuestionError(code=error.code, retryable=error.retryable)
            )
        components = request.disclosure is Disclosure.COMPONENTS
        arms = zip(question.arms, found.rewards, strict=True)
        return ScoredQuestion(
            id=question.id,
            reward=sum(found.rewards) / len(found.rewards) if found.rewards else 0.0,
            degenerate=len(question.arms) < 2,
            scores=found.scores if components else None,
            correct_flags=tuple(found.correct) if components else None,
            arms=tuple(ArmReward(id=arm.id, reward=reward) for arm, reward in arms),
        )


def _beyond(wanted: str | None, allowed: Disclosure) -> bool:
    return wanted == Disclosure.COMPONENTS and allowed is Disclosure.REWARD


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, *arguments: Any) -> None:
        self.connections: set[socket.socket] = set()
        super().__init__(*arguments)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """Break what keep-alive would leave open."""
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news; anything else is a defect to be seen."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    service: RewardServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "reward-server", ""

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged."""

    def do_GET(self) -> None:
        if self.path == "/livez":
            self._send(200, b'{"status":"alive"}')
        elif (allowed := self._may_go_on()) is not None:
            if self.path == "/v1/info":
                if _beyond(self.headers.get("X-Disclosure"), allowed):
                    self._problem(ProblemCode.FORBIDDEN)
                else:
                    self._send(200, self.service.info().model_dump_json().encode())
            elif self.path == "/v1/score":
                self._problem(ProblemCode.METHOD_NOT_ALLOWED)
            else:
                self._problem(ProblemCode.NOT_FOUND)

    def do_POST(self) -> None:
        body = self._body()
        allowed = self._may_go_on() if body is not None else None
        if body is None or allowed is None:
            return None
        if self.path != "/v1/score":
            known = self.path in ("/v1/info", "/livez")
            return self._problem(ProblemCode.METHOD_NOT_ALLOWED if known else ProblemCode.NOT_FOUND)
        if self.headers.get_content_type() != "application/json":
            return self._problem(ProblemCode.UNSUPPORTED_MEDIA_TYPE)
        reply = self.service.answer(self.headers.get("Idempotency-Key"), body, allowed)
        if isinstance(reply, ProblemCode):
            return self._problem(reply)
        return self._send(200, reply)

    def _body(self) -> bytes | None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            self.close_connection = True
            self._problem(ProblemCode.MALFORMED_REQUEST)
        elif int(length) > self.service.limits.max_body_bytes:
            self.close_connection = True
            self._problem(ProblemCode.REQUEST_TOO_LARGE)
        else:
            return self.rfile.read(int(length))
        return None

    def _may_go_on(self) -> Disclosure | None:
        """Apply what comes before an answer, then the key: what it may see, or None after a refusal."""
        fault = self.service.disturbance()
        if fault == "drop":
            self.close_connection = True
            return None
        if fault is not None:
            self._problem(ProblemCode(fault))
            return None
        scheme, _, key = self.headers.get("Authorization", "").partition(" ")
        allowed = self.service.allowed(key) if scheme.lower() == "bearer" else None
        if allowed is None:
            self._problem(ProblemCode.UNAUTHENTICATED)
        return allowed

    def _problem(self, code: ProblemCode) -> None:
        problem = Problem.of(code, uuid.uuid4().hex)
        self._send(problem.status, problem.model_dump_json().encode(), PROBLEM_CONTENT_TYPE)

    def _send(self, status: int, body: bytes, content_type: str = "application/json") -> None:
        if status == 200 and self.command == "POST":
            body = self.service.outgoing(body)
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        if status in (429, 503) and self.service.retry_after_s is not None:
            self.send_header("Retry-After", str(self.service.retry_after_s))
        self.end_headers()
        self.wfile.write(body)

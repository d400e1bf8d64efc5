"""A reward server to test against: contract 1.0 over real HTTP, with public rewards and faults on demand.

`FakeRewardServer` runs in a thread; `python -m looper_trainer.testing --port P --key K` runs it as a process.
Its rewards need no model: "correct" gives 1.0 to a completion that states the gold answer and -0.5 to any
other; "random" gives numbers that depend on the seed and the text alone, the control of an experiment.
Nothing here resembles how a real service makes its rewards.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import hmac
import socket
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal, Self

from pydantic import ValidationError

from looper_schemas.answers import answers_match
from looper_schemas.problems import PROBLEM_CONTENT_TYPE, Problem, ProblemCode
from looper_schemas.scoring import (
    Arm,
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

Mode = Literal["correct", "random"]

DEFAULT_LIMITS = Limits(max_questions=64, max_arms=16, max_text_chars=100_000, max_body_bytes=4 * 2**20)
RIGHT, WRONG = 1.0, -0.5


class Faults:
    """Faults to inject, consumed one request (or one reply) at a time; thread-safe.

    `unavailable` 503 replies, `dropped` connections closed without a reply, `corrupt` replies cut to half
    of their bytes, `hang_s` seconds of silence before the next reply; `failing` question ids come back as
    failed that many times each.
    """

    def __init__(self) -> None:
        self.unavailable = 0
        self.dropped = 0
        self.corrupt = 0
        self.hang_s = 0.0
        self.retry_after_s: int | None = None
        self.failing: dict[str, int] = {}
        self.failing_is_retryable = True
        self._lock = threading.Lock()

    def take(self, name: Literal["unavailable", "dropped", "corrupt"]) -> bool:
        """Whether the fault `name` is due, counting it down."""
        with self._lock:
            due = int(getattr(self, name))
            if due:
                setattr(self, name, due - 1)
            return due > 0

    def take_hang(self) -> float:
        """Seconds to stay silent before this reply."""
        with self._lock:
            due, self.hang_s = self.hang_s, 0.0
            return due

    def take_failing(self, question_id: str) -> bool:
        """Whether this question is to fail now, counting it down."""
        with self._lock:
            due = self.failing.get(question_id, 0)
            if due:
                self.failing[question_id] = due - 1
            return due > 0


class FakeRewardServer:
    """A reward service on 127.0.0.1; a context manager that starts and stops it.

    Args:
        mode: "correct" or "random" rewards.
        key: a key that may see everything.
        seed: of the random rewards.
        noise: random share of a right completion's reward, which lies in [1, 1 + noise] in mode "correct".
        port: 0 for any free one.
        scorer_id: what it calls its scorer.
        reward_key: another key, which may see rewards only.
        limits: what one request may hold.

    Attributes:
        url: its base address once started.
        faults: what to break next.
        requests: bodies of the score requests it has answered afresh, in order.
        replayed: number of replies given again for a repeated idempotency key.
    """

    def __init__(
        self,
        mode: Mode = "correct",
        *,
        key: str = "test-key",
        seed: int = 0,
        noise: float = 0.0,
        port: int = 0,
        scorer_id: str | None = None,
        reward_key: str | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.mode = mode
        self.key = key
        self.seed = seed
        self.noise = noise
        self.scorer_id = scorer_id or f"fake-{mode}-{seed}" + (f"-noise-{noise}" if noise else "")
        self.reward_key = reward_key
        self.limits = limits
        self.faults = Faults()
        self.requests: list[ScoreRequest] = []
        self.replayed = 0
        self._replies: dict[str, tuple[str, bytes]] = {}
        self._lock = threading.Lock()
        self._port = port
        self._http: _Server | None = None

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
        """Listen and answer in a thread; after `stop`, again at the same port."""
        handler = type("Handler", (_Handler,), {"fake": self})
        self._http = _Server(("127.0.0.1", self._port), handler)
        self._port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Close the port and every connection, as a process that ends does."""
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http.hang_up()
            self._http = None

    def info(self) -> ServiceInfo:
        """The body of `GET /v1/info`."""
        return ServiceInfo(
            scorer_id=self.scorer_id,
            limits=self.limits,
            reward_modes=tuple(RewardMode),
            ranges={mode.value: RewardRange(low=WRONG, high=RIGHT + self.noise) for mode in RewardMode},
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
            self.requests.append(request)
            if idempotency_key is not None:
                self._replies[idempotency_key] = (digest, reply)
            return reply

    def _refusal(self, request: ScoreRequest, allowed: Disclosure) -> ProblemCode | None:
        if request.disclosure is Disclosure.COMPONENTS and allowed is Disclosure.REWARD:
            return ProblemCode.FORBIDDEN
        if request.scorer_id is not None and request.scorer_id != self.scorer_id:
            return ProblemCode.SCORER_MISMATCH
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
        if self.faults.take_failing(question.id):
            retryable = self.faults.failing_is_retryable
            code = ProblemCode.SCORER_TIMEOUT if retryable else ProblemCode.SCORER_FAILED
            return FailedQuestion(id=question.id, error=QuestionError(code=code, retryable=retryable))
        rewards = [self._reward(question, arm) for arm in question.arms]
        if request.reward_mode is RewardMode.QUESTION:
            rewards = [max(rewards)] * len(rewards) if rewards else []
        mean = sum(rewards) / len(rewards) if rewards else 0.0
        components = request.disclosure is Disclosure.COMPONENTS
        return ScoredQuestion(
            id=question.id,
            reward=mean,
            degenerate=len(rewards) < 2,
            scores=self._scores(question) if components else None,
            correct_flags=tuple(_is_correct(question, arm) for arm in question.arms) if components else None,
            arms=tuple(ArmReward(id=arm.id, reward=r) for arm, r in zip(question.arms, rewards, strict=True)),
        )

    def _reward(self, question: Question, arm: Arm) -> float:
        if self.mode == "random":
            # The text decides: neither an arm's place nor its id does.
            draw = _uniform(self.seed, question.question, _text(arm))
            return RIGHT if draw < 0.5 else WRONG
        correct = _is_correct(question, arm)
        if not correct:
            return 0.0 if correct is None else WRONG
        return RIGHT + self.noise * _uniform(self.seed, question.question, _text(arm))

    def _scores(self, question: Question) -> Scores:
        """Opaque numbers in range: stand-ins that a client may only carry."""
        texts = sorted(_text(arm) for arm in question.arms)
        if len(texts) < 2:
            return Scores(s_end=None, s_path=None, s_cf=None, s_wm=0.0)
        one, two, three, four = (_uniform(self.seed, name, *texts) for name in ("1", "2", "3", "4"))
        return Scores(s_end=one, s_path=two, s_cf=three, s_wm=four)


def _text(arm: Arm) -> str:
    return arm.full_text if arm.full_text is not None else arm.reasoning or ""


def _is_correct(question: Question, arm: Arm) -> bool | None:
    if question.gold_answer is None:
        return None
    return answers_match(arm.answer if arm.answer is not None else _text(arm), question.gold_answer)


def _uniform(seed: int, *parts: str) -> float:
    """A number in [0, 1) that depends on nothing but the arguments."""
    digest = hashlib.sha256(repr((seed, *parts)).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


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
    fake: FakeRewardServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "fake-reward-server", ""

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged."""

    def do_GET(self) -> None:
        if self.path == "/livez":
            self._send(200, b'{"status":"alive"}')
        elif self._may_go_on() is not None:
            if self.path == "/v1/info":
                self._send(200, self.fake.info().model_dump_json().encode())
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
        reply = self.fake.answer(self.headers.get("Idempotency-Key"), body, allowed)
        if isinstance(reply, ProblemCode):
            return self._problem(reply)
        return self._send(200, reply)

    def _body(self) -> bytes | None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            self.close_connection = True
            self._problem(ProblemCode.MALFORMED_REQUEST)
        elif int(length) > self.fake.limits.max_body_bytes:
            self.close_connection = True
            self._problem(ProblemCode.REQUEST_TOO_LARGE)
        else:
            return self.rfile.read(int(length))
        return None

    def _may_go_on(self) -> Disclosure | None:
        """Apply the faults that precede an answer, then the key: what it may see, or None after a refusal."""
        faults = self.fake.faults
        time.sleep(faults.take_hang())
        if faults.take("dropped"):
            self.close_connection = True
            return None
        if faults.take("unavailable"):
            self._problem(ProblemCode.OVERLOADED)
            return None
        scheme, _, key = self.headers.get("Authorization", "").partition(" ")
        allowed = self.fake.allowed(key) if scheme.lower() == "bearer" else None
        if allowed is None:
            self._problem(ProblemCode.UNAUTHENTICATED)
        return allowed

    def _problem(self, code: ProblemCode) -> None:
        problem = Problem.of(code, uuid.uuid4().hex)
        self._send(problem.status, problem.model_dump_json().encode(), PROBLEM_CONTENT_TYPE)

    def _send(self, status: int, body: bytes, content_type: str = "application/json") -> None:
        if status == 200 and self.command == "POST" and self.fake.faults.take("corrupt"):
            body = body[: len(body) // 2]
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        if status in (429, 503) and self.fake.faults.retry_after_s is not None:
            self.send_header("Retry-After", str(self.fake.faults.retry_after_s))
        self.end_headers()
        self.wfile.write(body)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until interrupted; the address goes to standard output once the port is open."""
    parser = argparse.ArgumentParser(prog="python -m looper_trainer.testing", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1; 0 is any free one")
    parser.add_argument("--mode", choices=("correct", "random"), default="correct", help="which rewards")
    parser.add_argument("--key", required=True, help="the API key it accepts")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random rewards")
    parser.add_argument("--noise", type=float, default=0.0, help="random share of a right one's reward")
    arguments = parser.parse_args(argv)
    with FakeRewardServer(
        arguments.mode, key=arguments.key, seed=arguments.seed, noise=arguments.noise, port=arguments.port
    ) as server:
        print(server.url, flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())

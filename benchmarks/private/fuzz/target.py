"""What the fuzzers call: the service over a stub scorer, through ASGI, and the judge of its replies.

A reply is wrong when it is missing, has a status of 500 or above, holds anything that the caller sent but the
ids a 200 reply is keyed by, holds a text of the scorer's exceptions, or is an error that is no constant
problem of the closed set. A log line is wrong when it holds any of these texts.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fastapi import FastAPI

from looper_schemas.problems import PROBLEM_CONTENT_TYPE, PROBLEMS, Problem
from looper_schemas.scoring import Question, RewardMode, ScoreResponse
from reward_service import auth
from reward_service.app import create_app
from reward_service.auth import Scope
from reward_service.batching import Result
from reward_service.home import prepare_home
from reward_service.logs import SafeFormatter
from reward_service.settings import Settings

sys.path.insert(0, str(Path(__file__).parents[3] / "tests/faults"))
from stub_service import StubScorer, expected_reward

__all__ = ["CANARY", "LIMITS", "POISON", "SECRET", "Reply", "Sent", "Target", "expected_reward", "opened"]

CANARY = "canary7141"  # in everything that a fuzzer sends
SECRET = "secret3663"  # in every exception of the scorer
POISON = "poison"  # a question with it makes the scorer raise

LIMITS = {"max_body_bytes": 8192, "max_questions": 6, "max_arms": 6, "max_text_chars": 1500}
_HEADERS = {b"content-type", b"content-length", b"www-authenticate", b"retry-after", b"allow", b"connection"}
_CONSTANT = {
    json.dumps(Problem.of(code, "").model_dump() | {"request_id": None}, sort_keys=True) for code in PROBLEMS
}


class Fragile(StubScorer):
    """The stub scorer without its slowness; it raises where a question is poisoned."""

    seconds_a_batch = 0.0

    def score(self, questions: Sequence[Question], mode: RewardMode, *, fresh: bool = False) -> list[Result]:
        """As the stub's."""
        if any(POISON in question.question for question in questions):
            raise ValueError(SECRET, *questions)
        return super().score(questions, mode)


class Sent(NamedTuple):
    """One request as ASGI sees it. The client hangs up after the last chunk where `hangs_up`."""

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    chunks: list[bytes]
    hangs_up: bool = False


class Reply(NamedTuple):
    """What came back; status 0: nothing."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Target:
    """A running service, the keys that a fuzzer may use, and the log so far."""

    def __init__(self, app: FastAPI, keys: dict[str, str]) -> None:
        self.app = app
        self.keys = keys
        self.log = _Log()

    async def send(self, sent: Sent) -> Reply:
        """The reply to `sent`. Whatever escapes the application escapes here too."""
        waiting = list(sent.chunks) or [b""]
        answered = asyncio.Event()
        messages: list[Any] = []

        async def receive() -> dict[str, Any]:
            if waiting:
                chunk = waiting.pop(0)
                return {"type": "http.request", "body": chunk, "more_body": bool(waiting) or sent.hangs_up}
            if not sent.hangs_up:
                await answered.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            messages.append(message)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "scheme": "http",
            "method": sent.method,
            "path": sent.path,
            "raw_path": sent.path.encode("utf-8", "replace"),
            "root_path": "",
            "query_string": sent.query,
            "headers": sent.headers,
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
            "state": {},
        }
        await self.app(scope, receive, send)
        answered.set()
        if not messages:
            return Reply(0, [], b"")
        return Reply(
            messages[0]["status"],
            messages[0]["headers"],
            b"".join(message.get("body", b"") for message in messages[1:]),
        )

    def fault(self, sent: Sent, reply: Reply) -> str | None:
        """What is wrong with `reply`, or None."""
        if reply.status == 0:
            return "no reply"
        if reply.status >= 500:
            return "a server error"
        names = {name.lower() for name, _ in reply.headers}
        if not names <= _HEADERS:
            return "a header that nobody asked for"
        if _tells(b"\n".join(value for _, value in reply.headers)):
            return "caller's text in a header"
        if reply.status >= 400:
            return _fault_of_problem(reply)
        if sent.hangs_up and not reply.body:
            return None  # nobody was there to read it
        if sent.path == "/v1/score":
            return _fault_of_scores(reply)
        return "caller's text in a reply" if _tells(reply.body) else None


def _tells(text: bytes) -> bool:
    text = text.lower()
    return CANARY.encode() in text or SECRET.encode() in text or b"traceback" in text


def _fault_of_problem(reply: Reply) -> str | None:
    if _tells(reply.body):
        return "caller's text in an error"
    problem = json.loads(reply.body)
    request_id = problem.pop("request_id")
    if json.dumps(problem | {"request_id": None}, sort_keys=True) not in _CONSTANT:
        return "an error outside the closed set"
    if len(bytes.fromhex(request_id)) != 16:
        return "a request id that is none"
    if (
        problem["status"] != reply.status
        or dict(reply.headers)[b"content-type"] != PROBLEM_CONTENT_TYPE.encode()
    ):
        return "an error that contradicts its status or type"
    return None


def _fault_of_scores(reply: Reply) -> str | None:
    response = ScoreResponse.model_validate_json(reply.body)
    anonymous = response.model_copy(
        update={
            "results": tuple(
                result.model_copy(
                    update={"id": "-"}
                    | (
                        {}
                        if result.status == "failed"
                        else {"arms": tuple(arm.model_copy(update={"id": "-"}) for arm in result.arms)}
                    )
                )
                for result in response.results
            )
        }
    )
    return "caller's text in a reply" if _tells(anonymous.model_dump_json().encode()) else None


class _Log(logging.Handler):
    """Every record of the process as the service would print it."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.setFormatter(SafeFormatter())
        self.lines = 0
        self.leaks: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        self.lines += 1
        if _tells(line.encode()):
            self.leaks.append(line)


@asynccontextmanager
async def opened(home: Path) -> AsyncIterator[Target]:
    """The service in a new folder, with keys of every state."""
    prepare_home(home)
    scoring = [Scope.SCORE_REWARD, Scope.SCORE_COMPONENTS]
    keys = {
        "full": auth.create_key(home, "full", scoring),
        "reward": auth.create_key(home, "reward", [Scope.SCORE_REWARD]),
        "metrics": auth.create_key(home, "metrics", [Scope.METRICS_READ]),
        "spent": auth.create_key(home, "spent", scoring, budget=5),
        "slow": auth.create_key(home, "slow", scoring, rate=60),
        "expired": auth.create_key(home, "expired", scoring, expires=1.0),
        "revoked": auth.create_key(home, "revoked", scoring),
    }
    auth.revoke_key(home, keys["revoked"].split("_")[1])
    app = create_app(Settings(home=home, idempotency_entries=2000, **LIMITS), Fragile())
    target = Target(app, keys)
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    root.handlers[:] = [target.log]
    root.setLevel(logging.INFO)
    logging.getLogger("asyncio").setLevel(logging.INFO)
    try:
        async with app.router.lifespan_context(app):
            yield target
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)

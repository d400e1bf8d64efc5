"""A small engine with the promises of the real one, and the service over it, called through ASGI."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from looper_schemas.answers import extract_answer
from looper_schemas.scoring import (
    ArmReward,
    Question,
    RewardMode,
    RewardRange,
    ScoredQuestion,
    Scores,
)
from reward_service import auth
from reward_service.app import create_app
from reward_service.auth import Scope
from reward_service.batching import Result
from reward_service.home import prepare_home
from reward_service.settings import Settings

POISON = "poison"


class FakeEngine:
    """Scores by naive pair loops. `gate` holds it back; a text with POISON makes it raise."""

    def __init__(self) -> None:
        self.scorer_id = "fake-1"
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[list[Question]] = []
        self.drift = 0.0

    def reward_range(self, mode: RewardMode) -> RewardRange:
        return RewardRange(low=-0.5, high=1.7)

    def score(self, questions: Sequence[Question], mode: RewardMode, *, fresh: bool = False) -> list[Result]:
        self.batches.append(list(questions))
        assert self.gate.wait(30)
        if any(POISON in question.question for question in questions):
            raise ValueError(questions[0].question)
        return [self._score(question) for question in questions]

    def _score(self, question: Question) -> ScoredQuestion:
        answers = [extract_answer(arm.full_text or arm.reasoning or "") for arm in question.arms]
        pairs = list(combinations(answers, 2))
        s_end = sum(a is not None and a == b for a, b in pairs) / len(pairs) if pairs else None
        flags = tuple(None if question.gold_answer is None else a == question.gold_answer for a in answers)
        rewards = [
            (1.0 if flag else -0.5) + 0.001 * len(arm.full_text or "") + self.drift
            for flag, arm in zip(flags, question.arms, strict=True)
        ]
        return ScoredQuestion(
            id=question.id,
            reward=sum(rewards) / len(rewards) if rewards else 0.0,
            degenerate=False,
            scores=Scores(s_end=s_end, s_path=s_end, s_cf=s_end, s_wm=s_end or 0.0),
            correct_flags=flags,
            arms=tuple(ArmReward(id=a.id, reward=r) for a, r in zip(question.arms, rewards, strict=True)),
        )


@dataclass
class Live:
    """A running service: its app, its engine, a key with both scoring scopes, and an HTTP client."""

    app: FastAPI
    engine: FakeEngine
    home: Path
    key: str
    client: httpx.AsyncClient
    headers: dict[str, str] = field(default_factory=dict)

    async def score(
        self, message: Any, *, key: str | None = None, headers: dict[str, str] | None = None
    ) -> httpx.Response:
        """POST /v1/score; `message` is a body, or a value to be written as JSON."""
        body = message if isinstance(message, bytes) else json.dumps(message).encode()
        sent = {
            "authorization": f"Bearer {key or self.key}",
            "content-type": "application/json",
            **(headers or {}),
        }
        return await self.client.post("/v1/score", content=body, headers=sent)

    def new_key(self, *scopes: Scope, **bounds: Any) -> str:
        return auth.create_key(self.home, "test", scopes, **bounds)


OpenService = Callable[..., AbstractAsyncContextManager[Live]]


def arm(name: str, text: str) -> dict[str, Any]:
    return {"id": name, "full_text": text}


def message_of(*questions: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A valid request: one question with three arms unless others are given."""
    one = {
        "id": "q1",
        "question": "What is 3 + 5?",
        "gold_answer": "8",
        "arms": [arm("a", "3 + 5 = 8\n#### 8"), arm("b", "5 + 3 = 8\n#### 8"), arm("c", "#### 9")],
    }
    return {
        "contract": "1.0",
        "run_id": "run",
        "step": 3,
        "purpose": "train",
        "disclosure": "components",
        "questions": list(questions) or [one],
        **fields,
    }


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A prepared folder without keys."""
    folder = tmp_path / "home"
    prepare_home(folder)
    return folder


@pytest.fixture
def message() -> Callable[..., dict[str, Any]]:
    return message_of


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def open_service(home: Path, engine: FakeEngine) -> OpenService:
    """`async with open_service(max_arms=4) as live`: a service with these settings."""

    @asynccontextmanager
    async def opened(**settings: Any) -> AsyncIterator[Live]:
        key = auth.create_key(home, "main", [Scope.SCORE_REWARD, Scope.SCORE_COMPONENTS])
        app = create_app(Settings(home=home, **settings), engine)
        transport = httpx.ASGITransport(app)  # an exception that leaves the app fails the test
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://service") as client,
        ):
            engine.batches.clear()
            try:
                yield Live(app, engine, home, key, client)
            finally:
                engine.gate.set()

    return opened


@pytest.fixture
def until() -> Callable[[Callable[[], bool]], Awaitable[None]]:
    """Wait (at most 10 s) until a condition holds, leaving the event loop free."""
    import anyio

    async def wait(condition: Callable[[], bool]) -> None:
        ends = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < ends, "the condition never held"
            await anyio.sleep(0.005)

    return wait

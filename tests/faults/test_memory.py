"""A scorer that has no memory for a batch: smaller batches, and at the end of that 503, never a number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from looper_schemas.scoring import Question, RewardMode
from reward_service import auth
from reward_service.app import create_app
from reward_service.audit import read_records
from reward_service.auth import Scope
from reward_service.settings import Settings

from .conftest import message
from .stub_service import StubScorer

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Small(StubScorer):
    """Has room for `room` questions at a time."""

    seconds_a_batch = 0.0

    def __init__(self) -> None:
        self.room = 100
        self.sizes: list[int] = []

    def score(self, questions: Sequence[Question], mode: RewardMode, *, fresh: bool = False) -> Any:
        self.sizes.append(len(questions))
        if len(questions) > self.room:
            raise MemoryError
        return super().score(questions, mode)


async def test_without_memory_a_batch_halves_and_then_it_is_503(home: Path) -> None:
    key = auth.create_key(home, "k", [Scope.SCORE_REWARD])
    scorer = Small()
    app = create_app(Settings(home=home, batch_arms=64), scorer)
    eight = {**message("r", 0), "questions": [message("r", n)["questions"][0] for n in range(8)]}
    headers = {"authorization": f"Bearer {key}", "idempotency-key": "k"}
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client,
    ):

        async def results(name: str) -> Any:
            reply = await client.post("/v1/score", json=eight, headers={**headers, "idempotency-key": name})
            return reply.json()["results"]

        usual = await results("a")

        scorer.room, scorer.sizes = 2, []
        assert await results("b") == usual
        assert scorer.sizes == [8, 4, 2, 2, 4, 2, 2]

        scorer.room, before = 0, len(list(read_records(home)))
        refused = await client.post("/v1/score", json=eight, headers=headers)
        assert refused.status_code == 503
        assert refused.json()["type"] == "urn:looper:problem:overloaded"
        assert refused.json()["retryable"] is True
        assert int(refused.headers["retry-after"]) >= 1
        assert len(list(read_records(home))) == before, "what was not answered is not audited"

        scorer.room = 100  # there is room again: the same request is answered, and paid for the first time
        assert await results("k") == usual


async def test_one_question_without_memory_fails_alone_and_may_be_retried(home: Path) -> None:
    key = auth.create_key(home, "k", [Scope.SCORE_REWARD])

    class Picky(Small):
        def score(self, questions: Sequence[Question], mode: RewardMode, *, fresh: bool = False) -> Any:
            if any(question.id == "q1" for question in questions):
                raise MemoryError
            return super().score(questions, mode)

    app = create_app(Settings(home=home, batch_arms=64), Picky())
    three = {**message("r", 0), "questions": [message("r", n)["questions"][0] for n in range(3)]}
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client,
    ):
        reply = await client.post("/v1/score", json=three, headers={"authorization": f"Bearer {key}"})
    first, second, third = reply.json()["results"]
    assert (reply.status_code, first["status"], third["status"]) == (200, "scored", "scored")
    assert second["error"] == {"code": "overloaded", "retryable": True}

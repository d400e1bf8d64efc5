"""The clock of the wall steps by an hour in the middle of work: nothing waits, repeats or is lost."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from looper_schemas.scoring import Question, RewardMode
from reward_service import auth
from reward_service.app import create_app
from reward_service.audit import verify
from reward_service.auth import Scope
from reward_service.settings import Settings

from .conftest import message
from .stub_service import StubScorer

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Held(StubScorer):
    """Scores when it is let."""

    seconds_a_batch = 0.0

    def __init__(self) -> None:
        self.busy, self.free = threading.Event(), threading.Event()
        self.free.set()

    def score(self, questions: Sequence[Question], mode: RewardMode, *, fresh: bool = False) -> Any:
        self.busy.set()
        assert self.free.wait(60)
        return super().score(questions, mode)


@pytest.mark.parametrize("step_s", [3600.0, -3600.0])
async def test_a_step_of_the_clock_by_an_hour_changes_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch, step_s: float
) -> None:
    key = auth.create_key(
        home, "k", [Scope.SCORE_REWARD], rate=11, budget=100, expires=time.time() + 7200, not_before=1.0
    )
    scorer = Held()
    app = create_app(Settings(home=home), scorer)
    real = time.time
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client,
    ):

        async def ask(step: int) -> httpx.Response:
            headers = {"authorization": f"Bearer {key}", "idempotency-key": f"{step}"}
            return await client.post("/v1/score", json=message("r", step), headers=headers)

        first = await ask(0)
        scorer.busy.clear()
        scorer.free.clear()
        under_way = asyncio.create_task(ask(1))
        while not scorer.busy.is_set():
            await asyncio.sleep(0.01)
        monkeypatch.setattr(time, "time", lambda: real() + step_s)
        scorer.free.set()
        assert (await under_way).status_code == 200, "a deadline is no time of the day"
        assert (await ask(0)).content == first.content, "a kept reply is kept for a day"
        assert (await ask(1)).content == (await under_way).content
        assert (await ask(2)).status_code == 200
        limited = await ask(3)  # three times three arms, and two repeats
        assert limited.status_code == 429, "a step of the clock refills no rate"
        assert int(limited.headers["retry-after"]) <= 60
        assert app.state.service.state.used(key.split("_")[1]) == 9
    verify(home)

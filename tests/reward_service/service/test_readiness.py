from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from regime_w.embedding import Vectors
from regime_w.scorer import Scorer
from reward_service import auth
from reward_service.app import create_app
from reward_service.auth import Scope
from reward_service.readiness import GOLDEN, GOLDEN_S_END
from reward_service.settings import Settings

pytestmark = pytest.mark.anyio


async def ready(live: Any) -> bool:
    reply = await live.client.get("/readyz", headers={"authorization": f"Bearer {live.key}"})
    assert reply.status_code in (200, 503)
    if reply.status_code == 503:
        assert reply.json()["type"] == "urn:looper:problem:not_ready"
        assert int(reply.headers["retry-after"]) >= 1
    return bool(reply.status_code == 200)


def test_the_golden_agreement_is_counted_by_hand() -> None:
    answers = ["8", "8", "9", None]
    agreeing = [(i, j) for i in range(4) for j in range(i + 1, 4) if answers[i] and answers[i] == answers[j]]
    assert len(agreeing) / 6 == GOLDEN_S_END
    assert len(GOLDEN.arms) == 4


async def test_a_first_start_records_the_vector_and_is_ready(open_service: Any) -> None:
    async with open_service() as live:
        assert await ready(live)
        assert set(json.loads((live.home / "golden.json").read_text())) == {"fake-1"}
    async with open_service() as live:
        assert await ready(live)


async def test_drift_at_a_later_start_is_not_ready_and_scores_nothing(
    open_service: Any, engine: Any, message: Any
) -> None:
    async with open_service() as live:
        assert await ready(live)
    engine.drift = 1e-3
    async with open_service() as live:
        assert not await ready(live)
        reply = await live.score(message())
        assert reply.json()["type"] == "urn:looper:problem:not_ready"
        assert engine.batches == []
    engine.scorer_id = "fake-2"  # another scorer may give other rewards
    async with open_service() as live:
        assert await ready(live)


async def test_drift_while_running_is_noticed_and_ends(open_service: Any, engine: Any, until: Any) -> None:
    async with open_service(golden_every_s=0.02) as live:
        readiness = live.app.state.service.readiness
        assert readiness.ready
        engine.drift = 1e-3
        await until(lambda: not readiness.ready)
        engine.drift = 0.0
        await until(lambda: readiness.ready)


async def test_a_check_that_runs_out_of_time_changes_nothing_but_at_the_start(
    open_service: Any,
    engine: Any,
    until: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A caller who keeps the scorer busy must not close the service to the others."""
    monkeypatch.setattr("reward_service.readiness._DEADLINE_S", 0.05)
    async with open_service() as live:
        readiness = live.app.state.service.readiness
        engine.gate.clear()
        assert await readiness.check()
        assert readiness.ready
        assert "not scored in time" in caplog.text
        engine.gate.set()
        engine.drift = 1e-3
        assert not await readiness.check()
        engine.gate.clear()
        assert not await readiness.check()  # what was wrong stays wrong
        engine.gate.set()


async def test_a_drift_behind_the_caches_of_the_real_scorer_is_noticed(home: Path) -> None:
    class Letters:
        identity = "letters"
        drift = 0.0

        def embed(self, texts: Sequence[str]) -> Vectors:
            rows = np.array([[text.count(letter) + 1.0 for letter in "abcdefg"] for text in texts])
            rows[:, 0] += self.drift
            return rows.astype(np.float32)

    embedder = Letters()
    auth.create_key(home, "k", [Scope.SCORE_REWARD])
    app = create_app(Settings(home=home), Scorer(embedder=embedder))
    async with app.router.lifespan_context(app):
        readiness = app.state.service.readiness
        assert readiness.ready
        embedder.drift = 1.0  # say, weights that went bad in memory: no text of the golden question is new
        assert not await readiness.check()
        embedder.drift = 0.0
        assert await readiness.check()


@pytest.mark.parametrize(
    "fault", ["raises", "differs in company", "wrong agreement", "wrong flags", "no components"]
)
async def test_an_engine_that_breaks_its_promises_is_not_ready(
    open_service: Any, engine: Any, fault: str
) -> None:
    plain = engine.score

    def broken(questions: Any, mode: Any, *, fresh: bool) -> Any:
        assert fresh  # else an engine's memory would answer for it
        if fault == "raises":
            raise RuntimeError
        results = plain(questions, mode)
        if fault == "differs in company" and len(questions) > 1:
            return [r.model_copy(update={"reward": r.reward + 1e-12}) for r in results]
        if fault == "wrong agreement":
            wrong = results[0].scores.model_copy(update={"s_end": 0.5})
            return [r.model_copy(update={"scores": wrong}) for r in results]
        if fault == "wrong flags":
            return [r.model_copy(update={"correct_flags": (True, True, True, False)}) for r in results]
        if fault == "no components":
            return [r.model_copy(update={"scores": None}) for r in results]
        return results

    engine.score = broken
    async with open_service() as live:
        assert not await ready(live)


async def test_a_spoilt_record_is_not_ready(open_service: Any, home: Any) -> None:
    (home / "golden.json").write_text("[]")
    async with open_service() as live:
        assert not await ready(live)

"""What a `score:reward` key can learn of components: nothing, whatever they are.

Two services differ in every component and flag, in values and in the length of their digits, and agree in
rewards. Everything that a key without `score:components` can see of them must be the same bytes.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from looper_schemas.scoring import Question, RewardMode, Scores
from reward_service import auth
from reward_service.app import create_app
from reward_service.auth import Scope
from reward_service.batching import Result
from reward_service.logs import SafeFormatter
from reward_service.readiness import GOLDEN
from reward_service.settings import Settings

pytestmark = pytest.mark.anyio

NAMES = re.compile(r"s_end|s_path|s_cf|s_wm|\bscores\b|correct|flag|component", re.IGNORECASE)
REQUEST_ID = re.compile(r'"request_id":"[0-9a-f]{32}"')


def disguised(plain: Any, values: tuple[float | None, float | None, float | None, float], flag: bool) -> Any:
    """The engine `plain` with these components, but for the golden question, whose scores are known."""

    def score(questions: Sequence[Question], mode: RewardMode, *, fresh: bool = False) -> list[Result]:
        results = plain.score(questions, mode)
        golden = {arm.full_text for arm in GOLDEN.arms}
        return [
            result
            if {arm.full_text for arm in question.arms} & golden
            else result.model_copy(
                update={
                    "scores": Scores(s_end=values[0], s_path=values[1], s_cf=values[2], s_wm=values[3]),
                    "correct_flags": (flag,) * len(question.arms),
                }
            )
            for question, result in zip(questions, results, strict=True)
        ]

    return type(
        "Disguised",
        (),
        {"scorer_id": "one", "score": staticmethod(score), "reward_range": plain.reward_range},
    )()


async def everything_a_key_sees(
    home: Path, engine: Any, key: str, message: Any, caplog: pytest.LogCaptureFixture
) -> list[str]:
    """Every body and header of a tour through the service, and every log line of it."""
    app = create_app(Settings(home=home, max_arms=5), engine)
    seen: list[str] = []
    caplog.set_level(logging.INFO)
    caplog.clear()
    authorization = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client,
    ):
        replies = [
            await client.get(path, headers=authorization) for path in ("/readyz", "/v1/info", "/nowhere")
        ]
        for mode in RewardMode:
            for sent in (
                message(disclosure="reward", reward_mode=mode.value),
                message(disclosure="components", reward_mode=mode.value),
                message(disclosure="reward", scorer_id="another"),
                message(disclosure="reward", surprise=1),
                message({"id": "none", "question": "q", "arms": []}, disclosure="reward"),
                message(
                    {
                        "id": "many",
                        "question": "q",
                        "arms": [{"id": f"{n}", "full_text": ""} for n in range(6)],
                    },
                    disclosure="reward",
                ),
            ):
                for headers in ({}, {"idempotency-key": f"{mode}"}):
                    body = json.dumps(sent).encode()
                    replies.append(
                        await client.post("/v1/score", content=body, headers={**authorization, **headers})
                    )
    for reply in replies:
        seen.append(f"{reply.status_code} {sorted(reply.headers.items())}")
        seen.append(
            REQUEST_ID.sub('"request_id":"-"', reply.text) if reply.status_code >= 400 else reply.text
        )
    assert {reply.status_code for reply in replies} == {200, 403, 404, 409, 413, 422}
    for record in caplog.records:
        if record.name.startswith("reward_service"):
            line = json.loads(SafeFormatter().format(record))
            seen.append(
                json.dumps({k: v for k, v in line.items() if k not in ("time", "seconds", "request_id")})
            )
    return seen


async def test_a_reward_key_sees_the_same_bytes_whatever_the_components_are(
    home: Path, engine: Any, message: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    import shutil

    key = auth.create_key(home, "trainer", [Scope.SCORE_REWARD])
    other_home = tmp_path / "other"
    shutil.copytree(home, other_home)
    short = disguised(engine, (1.0, 0.0, None, 1.0), flag=True)
    long = disguised(engine, (0.1234567890123, 0.7071067811865, 0.3333333333333, 0.0000123456789), flag=False)
    one = await everything_a_key_sees(home, short, key, message, caplog)
    other = await everything_a_key_sees(other_home, long, key, message, caplog)
    assert one == other
    assert len(one) > 80


async def test_no_name_of_a_component_appears_in_anything_a_reward_key_sees(
    home: Path, engine: Any, message: Any, caplog: pytest.LogCaptureFixture
) -> None:
    key = auth.create_key(home, "trainer", [Scope.SCORE_REWARD])
    seen = await everything_a_key_sees(home, engine, key, message, caplog)
    assert [line for line in seen if NAMES.search(line)] == []


async def test_with_the_scope_the_components_do_differ(
    home: Path, engine: Any, message: Any, open_service: Any
) -> None:
    async with open_service() as live:
        live.engine.drift = 0.0
        assert NAMES.search((await live.score(message())).text), "the test above would notice them"

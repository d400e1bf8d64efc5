"""The custom reward function of verl: called as verl's reward managers call it, and by verl itself.

The second needs `LOOPER_VERL_PYTHON`, an interpreter with verl and this project: verl pins other versions of
transformers than the trainer.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from looper_trainer.errors import DataError, RewardUnavailable
from looper_trainer.integrations.verl import compute_score
from looper_trainer.testing import FakeRewardServer

EXAMPLE = Path(__file__).parents[3] / "examples" / "verl_reward_loop.py"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRewardServer]:
    with FakeRewardServer(key="k") as running:
        monkeypatch.setenv("LOOPER_REWARD_URL", running.url)
        monkeypatch.setenv("LOOPER_REWARD_KEY", "k")
        yield running


def gsm8k_row(index: int, split: str = "train") -> dict[str, Any]:
    """What verl's GSM8K preparation puts beside a completion."""
    info = {"split": split, "index": index, "answer": "...#### 4", "question": f"2 + 2? ({index})"}
    return {"data_source": "openai/gsm8k", "ground_truth": "4", "extra_info": info}


async def batch(*calls: tuple[int, str, str], **settings: Any) -> list[dict[str, float]]:
    """Rewards of (index, split, text), each asked for alone and at the same time, as verl does."""
    reward = functools.partial(compute_score, **settings)
    assert inspect.iscoroutinefunction(reward)  # verl awaits it only if it can tell
    return await asyncio.gather(
        *(reward(solution_str=text, **gsm8k_row(index, split)) for index, split, text in calls)
    )


def test_completions_asked_for_one_by_one_are_scored_in_groups(server: FakeRewardServer) -> None:
    calls = [(i, "train", f"#### {4 + wrong}") for wrong in (0, 1) for i in (7, 8)]
    results = asyncio.run(batch(*calls, group_size=2, group_wait_s=30))
    assert [result["score"] for result in results] == [1.0, 1.0, -0.5, -0.5]
    assert [result["looper_correct"] for result in results] == [1.0, 1.0, 0.0, 0.0]
    assert len({tuple(result) for result in results}) == 1
    (request,) = server.requests
    assert {question.id: len(question.arms) for question in request.questions} == {
        "openai/gsm8k/train/7": 2,
        "openai/gsm8k/train/8": 2,
    }


def test_an_evaluation_split_has_its_own_group_size(server: FakeRewardServer) -> None:
    (result,) = asyncio.run(batch((1, "test", "#### 4"), group_size=8, group_wait_s=30))
    assert result["score"] == 1.0
    assert result["looper_group_size"] == 1.0
    assert math.isnan(result["looper_s_end"])  # no pair, so no agreement: not known, not zero
    assert server.requests[0].purpose == "eval"


def test_without_a_score_there_is_an_exception_and_no_number(server: FakeRewardServer) -> None:
    server.stop()
    with pytest.raises(RewardUnavailable):
        asyncio.run(batch((1, "train", "#### 4"), give_up_after_s=0.3))
    with pytest.raises(DataError, match="no question"):
        asyncio.run(compute_score("d", "#### 4", "4", {"index": 1}))


@pytest.mark.slow
@pytest.mark.skipif("LOOPER_VERL_PYTHON" not in os.environ, reason="LOOPER_VERL_PYTHON names no verl")
def test_the_reward_manager_of_verl_loads_and_awaits_it(server: FakeRewardServer, tiny_model: Path) -> None:
    done = subprocess.run(
        [os.environ["LOOPER_VERL_PYTHON"], str(EXAMPLE), "--tokenizer", str(tiny_model)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [len(q.arms) for request in server.requests for q in request.questions] == [4, 4]
    assert "rm_scores" in done.stdout

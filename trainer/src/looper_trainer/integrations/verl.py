"""The reward service as a custom reward function of verl (0.9: `reward.custom_reward_function`).

    reward.num_workers=1 \\
    reward.custom_reward_function.path=pkg://looper_trainer.integrations.verl \\
    reward.custom_reward_function.name=compute_score \\
    +reward.custom_reward_function.reward_kwargs.group_size=8

verl asks for one completion at a time; `group_size` (its `actor_rollout_ref.rollout.n`) of the same question
are collected before they are sent, which is why one reward worker must see them all. The question is read
from `extra_info.question`, as verl's own GSM8K preparation writes it.

verl takes a number or an exception. A score that stays away is waited for, up to `give_up_after_s`, and
then an exception that ends the run at its last checkpoint: there is no None here, and a zero would be a lie.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import Any

from looper_schemas.scoring import Purpose
from looper_trainer.errors import DataError, RewardRejected
from looper_trainer.integrations.gathering import Gatherer
from looper_trainer.integrations.groups import COMPONENTS, Outcome, Sample, score_groups
from looper_trainer.integrations.trl import gold_of
from looper_trainer.reward_client import RewardClient

__all__ = ["compute_score"]

EVALUATION_SPLITS = ("test", "val", "validation", "dev")

# One for each event loop: verl runs a reward worker as a process with a loop of its own.
_gatherers: dict[tuple[int, str, bool], Gatherer] = {}


async def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: Mapping[str, Any] | None = None,
    *,
    group_size: int = 1,
    evaluation_group_size: int = 1,
    run_id: str = "verl",
    reward_mode: str = "arm_gated",
    disclosure: str = "components",
    group_wait_s: float = 600.0,
    give_up_after_s: float = 1800.0,
    **_others: Any,
) -> dict[str, float]:
    """The reward of one completion, for verl's reward managers.

    Args:
        data_source: verl's name of the dataset; begins the question's id.
        solution_str: the completion.
        ground_truth: the gold answer.
        extra_info: `question` is needed; `split` and `index` make the id.
        group_size: completions of a question that are scored together.
        evaluation_group_size: the same where `extra_info.split` names an evaluation split.
        run_id, reward_mode, disclosure, give_up_after_s: see `RewardClient`.
        group_wait_s: longest wait for the other completions of a question.

    Returns:
        `score`, and for verl's logs `looper_group_size`, `looper_correct` and the components; NaN where the
        service does not say.

    Raises:
        DataError: no question in `extra_info`.
        RewardUnavailable, RewardRejected, ScorerMismatch: there is no score.
    """
    info = dict(extra_info or {})
    question = info.get("question")
    if not question:
        raise DataError("extra_info holds no question; add it when the dataset is prepared")
    evaluation = str(info.get("split", "")).lower() in EVALUATION_SPLITS
    sample = Sample(
        question=str(question),
        gold_answer=gold_of(str(ground_truth)),
        text=solution_str,
        id="/".join(str(part) for part in (data_source, info.get("split", "-"), info["index"]))
        if "index" in info
        else None,
    )
    loop = asyncio.get_running_loop()
    key = (id(loop), run_id, evaluation)
    if key not in _gatherers:
        client = RewardClient.from_environment(
            run_id=run_id, reward_mode=reward_mode, disclosure=disclosure, give_up_after_s=give_up_after_s
        )
        purpose = Purpose.EVAL if evaluation else Purpose.TRAIN
        _gatherers[key] = Gatherer(_Scorer(client, purpose), group_wait_s)
    outcome = await _gatherers[key].outcome(sample, evaluation_group_size if evaluation else group_size)
    if outcome.reward is None:
        raise RewardRejected(f"question {sample.question_id} has no score ({outcome.error}); leave it out")
    return {"score": outcome.reward, **_shown(outcome)}


class _Scorer:
    """Scores groups and counts the calls, since verl does not tell a reward function its step."""

    def __init__(self, client: RewardClient, purpose: Purpose) -> None:
        self.client = client
        self.purpose = purpose
        self.calls = 0

    def __call__(self, groups: Sequence[Sequence[Sample]]) -> list[list[Outcome]]:
        self.calls += 1
        return score_groups(self.client, groups, step=self.calls, purpose=self.purpose)


def _shown(outcome: Outcome) -> dict[str, float]:
    """The same keys for every completion, as verl expects."""
    scores = {
        name: math.nan if outcome.scores is None else getattr(outcome.scores, name) for name in COMPONENTS
    }
    figures = {"group_size": float(outcome.group_size), "correct": outcome.correct, **scores}
    return {f"looper_{name}": math.nan if value is None else float(value) for name, value in figures.items()}

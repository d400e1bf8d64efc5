"""`skip_equal_groups`: a question whose completions got the same reward is as if it had not been asked."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from looper_schemas.records import Problem, RolloutRecord, read_records
from looper_schemas.scoring import ArmReward, Question, ScoredQuestion
from looper_trainer.ppo.batch import Row
from looper_trainer.ppo.checkpoint import TrainState
from looper_trainer.ppo.config import PPOConfig
from looper_trainer.ppo.data import Data
from looper_trainer.ppo.log import RunLog
from looper_trainer.ppo.step import collect, cut_minibatches, learn
from looper_trainer.ppo.update import make_optimizer

from .conftest import CountingScorer, build

FLAT = ("p1", "p4", "p6", "p9")


class FlatScorer(CountingScorer):
    """Gives the completions of some questions the same reward, those of others four different ones."""

    def __init__(self, flat: Collection[str]) -> None:
        super().__init__()
        self.flat = flat

    def _result(self, question: Question, step: int) -> ScoredQuestion:
        flat = question.id in self.flat
        arms = tuple(ArmReward(id=arm.id, reward=0.25 if flat else int(arm.id) / 3) for arm in question.arms)
        return ScoredQuestion(id=question.id, reward=0.25 if flat else 0.5, degenerate=False, arms=arms)


def step_of(
    config: PPOConfig, problems: list[Problem], flat: Collection[str], leave_out: bool
) -> tuple[list[Tensor], dict[str, Any]]:
    """What a first step makes of the weights, and its metrics; `leave_out`: flat questions were not asked."""
    policy, sampler = build(config)
    data = Data(problems, [], [])
    samples = collect(1, 0, config, data, policy, sampler, FlatScorer(flat))
    assert all("answers" in vars(group) for group in samples.groups)  # read already, beside the sampling
    if leave_out:
        samples = replace(samples, groups=[g for g in samples.groups if g.problem.id not in flat])
    state = TrainState(step=0, kl_coef=config.kl_coef, scorer_id="counting")
    with RunLog(config.output, config.steps, 0, silent=True) as log:
        figures = learn(samples, state, config, data, policy, make_optimizer(policy, config), log)
    return [p.detach().clone() for p in policy.adapter_parameters()], figures


@pytest.fixture
def config(ppo_config: PPOConfig) -> PPOConfig:
    return ppo_config.model_copy(
        update={"batch_size": 12, "mini_batch_size": 4, "advantages": "leave_one_out", "kl_coef": 0.5}
    )


def test_the_step_is_that_of_the_other_questions_alone(config: PPOConfig, problems: list[Problem]) -> None:
    skipping = config.model_copy(update={"skip_equal_groups": True})
    weights, figures = step_of(skipping, problems, FLAT, leave_out=False)
    alone, of_alone = step_of(config, problems, FLAT, leave_out=True)
    of_all, _ = step_of(config, problems, FLAT, leave_out=False)
    assert all(torch.equal(*pair) for pair in zip(weights, alone, strict=True))
    assert not all(torch.equal(*pair) for pair in zip(weights, of_all, strict=True))
    same = ("tokens", "kl_k1", "entropy", "return_mean", "policy_loss", "optimizer_steps")
    assert {name: figures[name] for name in same} == {name: of_alone[name] for name in same}
    assert (figures["questions_learnt_from"], figures["questions_scored"], figures["completions"]) == (
        8,
        12,
        48,
    )


def test_all_questions_are_kept_on_record(config: PPOConfig, problems: list[Problem]) -> None:
    step_of(config.model_copy(update={"skip_equal_groups": True}), problems, FLAT, leave_out=False)
    (file,) = (config.output / "trajectories").iterdir()
    rewards = {r.id: {t.reward for t in r.trajectories} for r in read_records(file, RolloutRecord)}
    assert rewards.keys() == {problem.id for problem in problems}
    assert {id_ for id_, found in rewards.items() if found == {0.25}} == set(FLAT)


def test_a_step_without_any_difference_is_learnt_from_whole(
    config: PPOConfig, problems: list[Problem]
) -> None:
    every = {problem.id for problem in problems}
    skipping = config.model_copy(update={"skip_equal_groups": True})
    weights, figures = step_of(skipping, problems, every, leave_out=False)
    of_all, _ = step_of(config, problems, every, leave_out=False)
    assert all(torch.equal(*pair) for pair in zip(weights, of_all, strict=True))
    assert figures["questions_learnt_from"] == 12


def test_one_reward_for_all_completions_of_a_question_is_for_the_critic() -> None:
    assert PPOConfig(reward_mode="question").advantages == "gae"
    with pytest.raises(ValidationError, match="use gae"):
        PPOConfig(reward_mode="question", advantages="group_normalised")


def test_advantages_from_the_critic_have_no_equal_groups() -> None:
    with pytest.raises(ValidationError, match="skip_equal_groups needs advantages leave_one_out"):
        PPOConfig(skip_equal_groups=True)


@pytest.mark.parametrize(
    ("questions", "sizes"), [(4, [4]), (5, [2, 3]), (8, [4, 4]), (9, [3, 3, 3]), (10, [3, 3, 4]), (1, [1])]
)
def test_minibatches_are_few_and_even(config: PPOConfig, questions: int, sizes: list[int]) -> None:
    k = config.samples_per_question
    rows = [Row([5, 6, q + 2], [7, 8], [-1.0, -1.0]) for q in range(questions) for _ in range(k)]
    minibatches = cut_minibatches(rows, config, random.Random(0), "cpu")
    taken = [[int(row) for batch in minibatch for row in batch.rows_n] for minibatch in minibatches]
    assert [len(rows) // k for rows in taken] == sizes
    assert sorted(row for rows in taken for row in rows) == list(range(questions * k))

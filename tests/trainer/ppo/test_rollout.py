"""Questions of a step, seeds, the forms of a group on the wire and on disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from looper_schemas import answers
from looper_schemas.records import Problem, RolloutRecord, Trajectory
from looper_schemas.scoring import ArmReward, FailedQuestion, QuestionError, ScoredQuestion, Scores
from looper_trainer.errors import ConfigError, DataError
from looper_trainer.groups import Group, arm_rewards, longest_prompt, to_record
from looper_trainer.ppo.config import PPOConfig
from looper_trainer.ppo.metrics import sample_metrics
from looper_trainer.ppo.rollout import (
    completion_seed,
    pass_rates,
    questions_of_step,
    require_texts_fit,
    solvable,
    solved_greedily,
    solved_in_samples,
    to_rows,
)
from looper_trainer.reward_client import as_question
from looper_trainer.sampling.base import Completion, SamplingParams


def make_problems(count: int) -> list[Problem]:
    return [Problem(id=f"p{i}", question=f"question {i}", answer=str(i)) for i in range(count)]


GROUP = Group(
    make_problems(8)[7],
    [5, 6],
    [
        Completion("7 it is. #### 7", (9, 8, 1), (-0.1, -0.2, -0.3), "stop"),
        Completion("", (4,), (-2.0,), "length"),
    ],
    [11, 12],
)
SCORED = ScoredQuestion(
    id="p7",
    reward=0.25,
    degenerate=False,
    scores=Scores(s_end=0.25, s_path=0.5, s_cf=None, s_wm=0.75),
    arms=(ArmReward(id="1", reward=-0.5), ArmReward(id="0", reward=1.0)),
)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_each_pass_takes_every_full_batch_once_and_never_a_question_twice_in_a_step(
    n: int, batch: int, seed: int
) -> None:
    problems = make_problems(n)
    if n < batch:
        with pytest.raises(DataError, match="fewer than batch_size"):
            questions_of_step(problems, 1, batch, seed)
        return
    per_pass = n // batch
    for first in (1, per_pass + 1):
        taken = [
            p.id
            for step in range(first, first + per_pass)
            for p in questions_of_step(problems, step, batch, seed)
        ]
        assert len(taken) == per_pass * batch
        assert max(Counter(taken).values()) == 1


def test_a_repeated_step_takes_the_same_questions_and_other_seeds_take_others() -> None:
    problems = make_problems(50)
    assert questions_of_step(problems, 3, 8, 0) == questions_of_step(problems, 3, 8, 0)
    assert questions_of_step(problems, 3, 8, 0) != questions_of_step(problems, 3, 8, 1)
    assert questions_of_step(problems, 3, 8, 0) != questions_of_step(problems, 3 + 6, 8, 0)


def test_completion_seeds_differ_in_every_coordinate_and_fit_a_signed_64_bit_integer() -> None:
    seeds = {completion_seed(s, t, q, k) for s in (0, 1) for t in (1, 2) for q in ("a", "b") for k in (0, 1)}
    assert len(seeds) == 16
    assert all(0 <= seed < 2**63 for seed in seeds)
    # printf 0/1/a/0 | b2sum -l 64
    assert completion_seed(0, 1, "a", 0) == 0x2BCD00B2820CDA5D >> 1


def test_a_group_goes_to_the_service_with_its_text_gold_answer_and_lengths() -> None:
    question = as_question(GROUP.problem, GROUP.completions)
    assert (question.id, question.question, question.gold_answer) == ("p7", "question 7", "7")
    assert [(arm.id, arm.full_text, arm.tokens_out, arm.finish_reason) for arm in question.arms] == [
        ("0", "7 it is. #### 7", 3, "stop"),
        ("1", "", 1, "length"),
    ]


def test_rewards_are_matched_by_arm_id_not_by_position() -> None:
    assert arm_rewards(GROUP, SCORED) == [1.0, -0.5]


def test_an_unscored_question_has_no_rewards_rather_than_zeros() -> None:
    failed = FailedQuestion(id="p7", error=QuestionError(code="scorer_timeout", retryable=True))
    assert arm_rewards(GROUP, failed) == [None, None]
    record = to_record(GROUP, failed, "run@3", "scorer-1", "arm_gated")
    assert [t.reward for t in record.trajectories] == [None, None]


def test_a_record_keeps_rewards_as_received_with_seeds_versions_and_scores() -> None:
    record = to_record(GROUP, SCORED, "run@3", "scorer-1", "arm_gated")
    assert [(t.reward, t.seed, t.final_answer, t.tokens_out) for t in record.trajectories] == [
        (1.0, 11, "7", 3),
        (-0.5, 12, None, 1),
    ]
    assert (record.policy, record.scorer_id, record.reward_mode) == ("run@3", "scorer-1", "arm_gated")
    assert record.scores == SCORED.scores


def test_a_step_reads_the_answer_of_a_completion_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    fold = answers._fold
    monkeypatch.setattr(answers, "_fold", lambda text: (read.append(text), fold(text))[1])
    group = Group(GROUP.problem, GROUP.prompt_ids, GROUP.completions, GROUP.seeds)
    to_record(group, SCORED, "run@3", "scorer-1", "arm_gated")
    figures = sample_metrics([group])
    assert (figures["distinct_answers_mean"], figures["no_answer_rate"]) == (1, 0.5)
    assert read == ["7 it is. #### 7", ""]


def test_rows_carry_the_prompt_with_each_completion() -> None:
    assert [(list(r.prompt_ids), list(r.completion_ids)) for r in to_rows([GROUP])] == [
        ([5, 6], [9, 8, 1]),
        ([5, 6], [4]),
    ]


def make_rollout(i: int, outputs: list[str]) -> RolloutRecord:
    trajectories = tuple(Trajectory(output=o, final_answer=None, reward=None) for o in outputs)
    return RolloutRecord(
        id=f"p{i}", question="q", gold_answer=str(i), trajectories=trajectories, policy="sft"
    )


def test_the_filter_keeps_questions_that_are_solved_sometimes() -> None:
    rollouts = [
        make_rollout(0, ["#### 0", "#### 0"]),
        make_rollout(1, ["#### 1", "#### 5"]),
        make_rollout(2, ["#### 9", "no idea"]),
    ]
    assert pass_rates(rollouts) == {"p0": 1.0, "p1": 0.5, "p2": 0.0}
    assert [problem.id for problem in solvable(make_problems(5), rollouts)] == ["p1"]
    with pytest.raises(DataError, match="pass rate"):
        solvable(make_problems(1), rollouts)


class LastFirst:
    """Answers sample j of any question with j, and the last question first."""

    def __init__(self) -> None:
        self.seeds: list[list[int]] = []

    def encode(self, prompt: str) -> list[int]:
        return [len(prompt)]

    def sample(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        return [found for _, found in sorted(self.sample_iter(prompts, params, seeds))]

    def sample_iter(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[Sequence[int]]
    ) -> Generator[tuple[int, list[Completion]]]:
        self.seeds += [list(row) for row in seeds]
        for i in reversed(range(len(prompts))):
            yield i, [Completion(f"#### {j}", (j,), (-1.0,), "stop") for j in range(len(seeds[i]))]


class CutOff(LastFirst):
    """The same answers, each cut off at the limit of tokens."""

    def sample_iter(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[Sequence[int]]
    ) -> Generator[tuple[int, list[Completion]]]:
        for i, row in super().sample_iter(prompts, params, seeds):
            yield i, [replace(completion, finish_reason="length") for completion in row]


def test_an_answer_that_was_cut_off_is_wrong_as_in_the_evaluation() -> None:
    problems, params = make_problems(3), SamplingParams(8)
    assert solved_greedily(LastFirst(), problems, 8) == [True, False, False]
    assert solved_greedily(CutOff(), problems, 8) == [False] * 3
    assert solved_in_samples(CutOff(), problems, params, 3, seed=0) == [0, 0, 0]
    trajectories = tuple(
        Trajectory(output="#### 1", final_answer="1", reward=None, finish_reason=how)
        for how in ("stop", "length", None, "length")
    )
    record = RolloutRecord(id="p1", question="q", gold_answer="1", trajectories=trajectories, policy="sft")
    assert pass_rates([record]) == {"p1": 0.5}  # what is not known to be cut off counts


def test_texts_that_the_policy_cannot_reproduce_are_refused_before_the_first_step() -> None:
    problems, sampler = make_problems(3), LastFirst()  # its prompts are of one token
    config = PPOConfig(model="windowed", max_new_tokens=100)
    longest = longest_prompt(sampler, problems)
    assert longest == 1
    require_texts_fit(None, longest, config)
    require_texts_fit(101, longest, config)
    with pytest.raises(ConfigError, match="windowed computes texts of more than 100 tokens"):
        require_texts_fit(100, longest, config)


def test_the_filter_can_be_a_band_and_puts_the_most_often_solved_first() -> None:
    rollouts = [make_rollout(i, [f"#### {i}"] * i + ["no idea"] * (8 - i)) for i in range(9)]
    band = solvable(make_problems(9), rollouts, above=0.25, below=0.75)
    assert [problem.id for problem in band] == ["p5", "p4", "p3"]
    assert [problem.id for problem in solvable(make_problems(9), rollouts)] == [
        f"p{i}" for i in range(7, 0, -1)
    ]


def test_a_curriculum_begins_with_the_head_and_then_passes_over_everything() -> None:
    problems = make_problems(20)
    heads = [
        {int(p.id[1:]) for p in questions_of_step(problems, s, 4, 0, curriculum_steps=5)} for s in range(1, 6)
    ]
    for step, head in enumerate(heads, start=1):
        assert len(head) == 4
        assert max(head) < 4 * step
    passed = [
        p.id for step in range(6, 11) for p in questions_of_step(problems, step, 4, 0, curriculum_steps=5)
    ]
    assert sorted(passed) == sorted(p.id for p in problems)


def test_samples_of_dev_questions_are_counted_in_the_order_of_the_questions() -> None:
    sampler = LastFirst()
    params = SamplingParams(8, temperature=0.7)
    problems = make_problems(5)  # their answers are 0, 1, 2, 3, 4
    assert solved_in_samples(sampler, problems, params, 3, seed=0) == [1, 1, 1, 0, 0]
    assert len({seed for row in sampler.seeds for seed in row}) == 15
    again = LastFirst()
    solved_in_samples(again, problems, params, 3, seed=0)
    assert again.seeds == sampler.seeds  # every evaluation draws the same samples of the same policy

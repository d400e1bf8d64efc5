"""Labelled rollouts in, one row an arm and one row a question out.

The labels are the service's own: an arm is right when its answer equals the gold answer; a question is right
when the answer that most of its arms gave is (of several that tie, the one given first).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from looper_schemas.records import RecordError, RolloutRecord, read_records
from looper_schemas.scoring import Arm, FailedQuestion, Question, RewardMode
from regime_w.arms import build_all_arms
from regime_w.reward import compute_reward
from regime_w.scorer import Analysis
from regime_w.settings import RewardSettings
from reward_service.calibration.measures import Floats, Ints
from reward_service.errors import StartError

COMPONENTS = ("s_end", "s_path", "s_cf", "s_wm")
_TOGETHER = 32  # questions
_TEST_SPLIT = {"test", "platinum"}


@runtime_checkable
class Analyst(Protocol):
    """What is asked of a scorer: `regime_w.scorer.Scorer` does it."""

    scorer_id: str

    def analyse(self, questions: Sequence[Question]) -> Sequence[Analysis | FailedQuestion]: ...


@dataclass(frozen=True)
class Observed:
    """Everything that the report is made of. A is the number of arms, Q of questions with at least two.

    `arm_scores` and `question_scores` hold a column for each of COMPONENTS; `rewards` one for each mode, with
    the gold answer and without it, of every arm.
    """

    arm_labels_A: Ints
    arm_groups_A: Ints
    arm_scores: dict[str, Floats]
    question_labels_Q: Ints
    question_scores: dict[str, Floats]
    rewards: dict[RewardMode, Floats]
    rewards_without_gold: dict[RewardMode, Floats]
    failed: int  # questions that were not scored
    left_out: int  # questions with fewer than two arms


def read_rollouts(file: Path, *, allow_test: bool = False) -> list[RolloutRecord]:
    """The records of `file`.

    Raises:
        StartError: it cannot be read, or an id is that of a test split and those are not allowed.
    """
    try:
        records = read_records(file, RolloutRecord)
    except (RecordError, OSError) as error:
        raise StartError(str(error)) from None
    if not allow_test:
        for record in records:
            if is_of_test_split(record.id):
                raise StartError(
                    f"{file}: {record.id!r} is of a test split, where nothing may be tuned; give other "
                    "rollouts (or --allow-test, and tune nothing by the report)"
                )
    return records


def is_of_test_split(name: str) -> bool:
    """Whether one of the words of an id such as gsm8k/test/17 names a test split."""
    return not _TEST_SPLIT.isdisjoint(re.split(r"[^a-z]+", name.lower()))


def observe(
    records: Iterable[RolloutRecord],
    analyst: Analyst,
    *,
    service_arms: bool = False,
    settings: RewardSettings | None = None,
) -> Observed:
    """Every arm and question of `records` as `analyst` scores them now.

    Args:
        service_arms: the trajectories are the service's arms, in their order; else samples of a policy.
        settings: of the rewards.

    Raises:
        StartError: with `service_arms`, a question has another number of arms.
    """
    rows = _Rows()
    for record, question, result in _analysed(records, analyst, service_arms):
        if isinstance(result, FailedQuestion):
            rows.failed += 1
        elif len(result.answers) < 2:
            rows.left_out += 1
        else:
            rows.add(record, question, result, settings or RewardSettings())
    return rows.done()


def plurality_is_right(analysis: Analysis) -> bool:
    """Whether the most frequent answer is correct; False where there is none."""
    counts = Counter(answer for answer in analysis.answers if answer is not None)
    if not counts:
        return False
    ((answer, _),) = counts.most_common(1)  # of several, the one met first
    return bool(analysis.correct[analysis.answers.index(answer)])


class _Rows:
    def __init__(self) -> None:
        self.arms: list[tuple[int, int, tuple[float, ...]]] = []
        self.questions: list[tuple[int, tuple[float, ...]]] = []
        self.rewards: dict[tuple[RewardMode, bool], list[float]] = {
            (mode, gold): [] for mode in RewardMode for gold in (True, False)
        }
        self.failed = self.left_out = 0

    def add(
        self, record: RolloutRecord, question: Question, result: Analysis, settings: RewardSettings
    ) -> None:
        scores = result.scores
        group = len(self.questions)
        # s_end, s_path and s_cf exist for two arms and more.
        whole = (scores.s_end or 0.0, scores.s_path or 0.0, scores.s_cf or 0.0, scores.s_wm)
        self.questions.append((int(plurality_is_right(result)), whole))
        for correct, parts, share in zip(result.correct, scores.parts, scores.shares, strict=True):
            self.arms.append((int(bool(correct)), group, (*parts, share)))
        tokens = [arm.tokens_out for arm in question.arms]
        for (mode, gold), values in self.rewards.items():
            flags = result.correct if gold else (None,) * len(result.correct)
            values += compute_reward(
                mode, flags, scores.s_wm, scores.shares, tokens, gold_known=gold, settings=settings
            ).arms

    def done(self) -> Observed:
        def columns(rows: Sequence[tuple[float, ...]]) -> dict[str, Floats]:
            table = np.array(rows, dtype=np.float64).reshape(-1, len(COMPONENTS))
            return dict(zip(COMPONENTS, table.T, strict=True))

        def rewards(gold: bool) -> dict[RewardMode, Floats]:
            return {mode: np.array(self.rewards[mode, gold], dtype=np.float64) for mode in RewardMode}

        return Observed(
            np.array([label for label, _, _ in self.arms], dtype=np.int64),
            np.array([group for _, group, _ in self.arms], dtype=np.int64),
            columns([scores for _, _, scores in self.arms]),
            np.array([label for label, _ in self.questions], dtype=np.int64),
            columns([scores for _, scores in self.questions]),
            rewards(True),
            rewards(False),
            self.failed,
            self.left_out,
        )


def _analysed(
    records: Iterable[RolloutRecord], analyst: Analyst, service_arms: bool
) -> Iterator[tuple[RolloutRecord, Question, Analysis | FailedQuestion]]:
    records = list(records)
    for begin in range(0, len(records), _TOGETHER):
        some = records[begin : begin + _TOGETHER]
        questions = [_as_question(record, service_arms) for record in some]
        yield from zip(some, questions, analyst.analyse(questions), strict=True)


def _as_question(record: RolloutRecord, service_arms: bool) -> Question:
    if service_arms and len(record.trajectories) not in (0, len(build_all_arms())):
        raise StartError(f"{record.id}: has {len(record.trajectories)} arms, not those of the service")
    return Question(
        id=record.id,
        question=record.question,
        gold_answer=record.gold_answer,
        arms=tuple(
            Arm(
                id=str(i),
                arm=i if service_arms else None,
                answer=trajectory.final_answer,
                full_text=trajectory.output,
                tokens_out=trajectory.tokens_out,
            )
            for i, trajectory in enumerate(record.trajectories)
        ),
    )

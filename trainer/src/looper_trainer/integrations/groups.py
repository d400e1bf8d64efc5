"""Completions in groups of one question each, scored together: what every plug-in shares.

Coherence is measured among the completions of one question, so a trainer that hands over single
completions needs them collected first. A completion whose score is missing has reward None and a reason.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from looper_schemas.scoring import Arm, FailedQuestion, Purpose, Question, ScoredQuestion, Scores
from looper_trainer.reward_client import RewardClient

COMPONENTS = ("s_end", "s_path", "s_cf", "s_wm")
UNAVAILABLE = "service_unavailable"


@dataclass(frozen=True)
class Sample:
    """One completion of a question, and what the service needs to know about both."""

    question: str
    gold_answer: str | None
    text: str
    tokens_out: int | None = None
    id: str | None = None

    @property
    def question_id(self) -> str:
        """The id it came with, or a digest of question and gold answer."""
        if self.id:
            return self.id[:190]
        text = f"{self.gold_answer}\n{self.question}"
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


@dataclass(frozen=True)
class Outcome:
    """What became of one completion. `reward` is None where there is no score; `error` then says why."""

    reward: float | None
    error: str | None = None
    correct: bool | None = None
    degenerate: bool | None = None
    scores: Scores | None = None
    group_size: int = 0


def unscored(size: int, error: str) -> list[Outcome]:
    """The outcomes of a group that got no score."""
    return [Outcome(reward=None, error=error, group_size=size)] * size


def runs(keys: Sequence[Hashable], group_size: int | None) -> list[range]:
    """The places of each group in a batch in which the completions of a question stand side by side.

    Args:
        keys: what tells questions apart, one for each completion.
        group_size: completions of a question; None takes each run of equal keys for a group.

    Raises:
        ValueError: with `group_size`, a group that is cut or mixes questions.
    """
    if group_size is None:
        cuts = [i for i in range(1, len(keys)) if keys[i] != keys[i - 1]]
        return [range(a, b) for a, b in pairwise([0, *cuts, len(keys)]) if a < b]
    if len(keys) % group_size:
        raise ValueError(
            f"{len(keys)} completions are no whole groups of {group_size}; make the batch on each device a "
            "multiple of the number of generations"
        )
    groups = [range(i, i + group_size) for i in range(0, len(keys), group_size)]
    if any(keys[i] != keys[group[0]] for group in groups for i in group):
        raise ValueError(f"a group of {group_size} completions mixes questions; check group_size")
    return groups


def score_groups(
    client: RewardClient, groups: Sequence[Sequence[Sample]], *, step: int, purpose: Purpose
) -> list[list[Outcome]]:
    """The outcome of every sample, in place; the samples of a group answer the same question.

    Raises:
        RewardUnavailable, RewardRejected, ScorerMismatch: see `looper_trainer.errors`.
    """
    seen: Counter[str] = Counter()
    questions = []
    for group in groups:
        name = group[0].question_id
        seen[name] += 1
        # A question that comes twice in a batch is two groups, and ids are distinct on the wire.
        questions.append(as_question(group, name if seen[name] == 1 else f"{name}#{seen[name]}"))
    results = client.score(questions, step=step, purpose=purpose) if questions else {}
    return [_outcomes(results[question.id], question) for question in questions]


def as_question(group: Sequence[Sample], question_id: str) -> Question:
    """The group on the wire; arm ids are places."""
    first = group[0]
    arms = tuple(
        Arm(id=str(index), full_text=sample.text, tokens_out=sample.tokens_out)
        for index, sample in enumerate(group)
    )
    return Question(id=question_id, question=first.question, gold_answer=first.gold_answer, arms=arms)


def _outcomes(result: ScoredQuestion | FailedQuestion, question: Question) -> list[Outcome]:
    size = len(question.arms)
    if isinstance(result, FailedQuestion):
        return unscored(size, result.error.code.value)
    rewards = {arm.id: arm.reward for arm in result.arms}
    flags = result.correct_flags or (None,) * size
    return [
        Outcome(
            reward=rewards[arm.id],
            correct=flag,
            degenerate=result.degenerate,
            scores=result.scores,
            group_size=size,
        )
        for arm, flag in zip(question.arms, flags, strict=True)
    ]


def figures(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Means of what is known, by name; `failed_share` always. An unknown figure has no entry, not a zero."""
    found = {"failed_share": fmean(o.reward is None for o in outcomes)} if outcomes else {}
    flags = [outcome.correct for outcome in outcomes if outcome.correct is not None]
    degenerate = [outcome.degenerate for outcome in outcomes if outcome.degenerate is not None]
    if flags:
        found["correct_rate"] = fmean(flags)
    if degenerate:
        found["degenerate_rate"] = fmean(degenerate)
    for name in COMPONENTS:
        values = [v for o in outcomes if o.scores is not None and (v := getattr(o.scores, name)) is not None]
        if values:
            found[name] = fmean(values)
    return found

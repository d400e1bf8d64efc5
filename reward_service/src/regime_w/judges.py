"""Consistency judges: how far the reasoning of one arm agrees with that of another, in [0, 1].

A judge sees the question and the two arms, never the gold answer. A judge that cannot decide raises
`JudgeError`: the question then *fails*, it never scores zero for the judge's sake.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

from regime_w.caches import Memory, digest_of
from regime_w.equations import intermediate_results
from regime_w.scoring import ArmResult, JudgeError

__all__ = ["EquationsJudge", "Judge", "JudgeError", "f1"]


class Judge(Protocol):
    """Verdicts for pairs of arms of one question. `identity` changes whenever the verdicts may change."""

    identity: str

    def judge_pairs(self, question: str, pairs: Sequence[tuple[ArmResult, ArmResult]]) -> Sequence[float]: ...


class EquationsJudge:
    """F1 between the sets of intermediate results of the two arms. Deterministic; needs no model.

    An arm in which no equation parses agrees with nothing.
    """

    identity = "equations"

    def __init__(self, entries: int = 0) -> None:
        self._results: Memory[frozenset[Fraction]] = Memory(entries, 64 * entries, len)

    def judge_pairs(self, question: str, pairs: Sequence[tuple[ArmResult, ArmResult]]) -> list[float]:
        """One verdict a pair; an arm is parsed once, and the results of the last `entries` arms are kept."""
        results: dict[ArmResult, frozenset[Fraction]] = {}
        for pair in pairs:
            for arm in pair:
                if arm not in results:
                    results[arm] = self._results_of(arm)
        return [f1(results[a], results[b]) for a, b in pairs]

    def _results_of(self, arm: ArmResult) -> frozenset[Fraction]:
        key = digest_of(arm.answer or "", arm.reasoning)
        results = self._results.get(key)
        if results is None:
            results = results_of(arm)
            self._results.put(key, results)
        return results

    def __call__(self, a: ArmResult, b: ArmResult) -> float:
        """The verdict on one pair."""
        return f1(results_of(a), results_of(b))


def results_of(arm: ArmResult) -> frozenset[Fraction]:
    """The exact intermediate results of `arm`, without its final answer."""
    final = None if arm.answer is None else Fraction(arm.answer)
    return intermediate_results(arm.reasoning, final)


def f1(a: frozenset[Fraction], b: frozenset[Fraction]) -> float:
    """2 |a & b| / (|a| + |b|); 0 when either is empty."""
    return 2 * len(a & b) / (len(a) + len(b)) if a and b else 0.0

"""Consistency judges: how far the reasoning of one arm agrees with that of another, in [0, 1].

Here are the protocol, the default judge `equations` and the memory of the others: `nli_judge`, `llm_judge`.

A judge sees the question and the two arms, never the gold answer. A judge that cannot decide raises
`JudgeError`: the question then *fails*, it never scores zero for the judge's sake.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Protocol

from regime_w.caches import Memory, digest_of
from regime_w.equations import intermediate_results
from regime_w.scoring import ArmResult, JudgeError
from regime_w.settings import RegimeWSettings

__all__ = ["EquationsJudge", "Judge", "JudgeError", "JudgeUnavailable", "VerdictMemory", "f1", "make_judge"]

Pairs = Sequence[tuple[ArmResult, ArmResult]]


class JudgeUnavailable(RuntimeError):
    """The judge that the settings ask for cannot be made; the message says what to do."""


class Judge(Protocol):
    """Verdicts for pairs of arms of one question. `identity` changes whenever the verdicts may change.

    A verdict does not depend on the order of its two arms, nor on the other pairs. `concurrency` is how many
    calls at a time the judge can make use of. With `fresh` nothing that was remembered is used.

    Raises (`judge_pairs`):
        JudgeError: there is no verdict; nobody may take that for a zero.
    """

    identity: str
    concurrency: int

    def judge_pairs(self, question: str, pairs: Pairs, *, fresh: bool = False) -> Sequence[float]: ...


class VerdictMemory:
    """At most `entries` verdicts of the judge `identity`, addressed by what was judged."""

    def __init__(self, identity: str, entries: int) -> None:
        self._identity = identity
        self._kept: Memory[float] = Memory(entries, entries)

    def recall(
        self,
        subjects: Sequence[tuple[str, ...]],
        judge: Callable[[list[int]], Sequence[float]],
        *,
        fresh: bool = False,
    ) -> list[float]:
        """The verdict on each subject; `judge` gives those of the distinct indices that are not known.

        Of two callers that have the same subject judged at once, both get the verdict that was there first,
        so that a judge that wavers still says one thing. A verdict outside [0, 1] is none.

        Raises:
            JudgeError: `judge` gave something else than a verdict each.
        """
        keys = [digest_of(self._identity, *subject) for subject in subjects]
        found = {} if fresh else {key: v for key in keys if (v := self._kept.get(key)) is not None}
        missing = {key: i for i, key in reversed(list(enumerate(keys))) if key not in found}
        if missing:
            indices = sorted(missing.values())
            verdicts = [float(verdict) for verdict in judge(indices)]
            if len(verdicts) != len(indices) or not all(0.0 <= verdict <= 1.0 for verdict in verdicts):
                raise JudgeError("a judge gave no verdict in [0, 1]")
            for index, verdict in zip(indices, verdicts, strict=True):
                found[keys[index]] = verdict if fresh else self._kept.keep(keys[index], verdict)
        return [found[key] for key in keys]


class EquationsJudge:
    """F1 between the sets of intermediate results of the two arms. Deterministic; needs no model.

    An arm in which no equation parses agrees with nothing.
    """

    identity = "equations"
    concurrency = 1

    def __init__(self, entries: int = 0) -> None:
        self._results: Memory[frozenset[Fraction]] = Memory(entries, 64 * entries, len)

    def judge_pairs(self, question: str, pairs: Pairs, *, fresh: bool = False) -> list[float]:
        """One verdict a pair; an arm is parsed once, and the results of the last `entries` arms are kept."""
        results: dict[ArmResult, frozenset[Fraction]] = {}
        for pair in pairs:
            for arm in pair:
                if arm not in results:
                    results[arm] = results_of(arm) if fresh else self._results_of(arm)
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


def make_judge(settings: RegimeWSettings) -> Judge:
    """The judge of `settings`, unless it needs an endpoint.

    Raises:
        JudgeUnavailable: its model cannot be loaded, or it is `llm`.
    """
    if settings.judge == "equations":
        return EquationsJudge(settings.arm_cache_entries)
    if settings.judge == "llm" or settings.judge_model is None:
        raise JudgeUnavailable("the llm judge needs an endpoint: run the service, and set judge_url")
    from regime_w.cross_encoder import CrossEncoderEntailer
    from regime_w.nli_judge import NliJudge

    model = CrossEncoderEntailer(
        settings.judge_model, device=settings.embedding_device, streams=settings.embedding_streams
    )
    return NliJudge(model, settings.judge_cache_entries)

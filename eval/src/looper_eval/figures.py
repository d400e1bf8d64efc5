"""The figures of a summary: shares with intervals, pass@k, majorities, paired comparisons, breakdowns.

Verdicts come as one list of booleans for each question, one for each of its samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations
from statistics import mean
from typing import TypeVar

from looper_eval import statistics
from looper_eval.dataset import EvalQuestion
from looper_eval.summary_types import (
    CONFIDENCE,
    BreakdownRow,
    PairSummary,
    Share,
    Table,
    Verdicts,
)
from looper_schemas.records import EvalRecord

T = TypeVar("T")


def share(verdicts: Verdicts) -> Share:
    """How many of the answers are right, with Wilson's interval, or for several samples a clustered one."""
    flags = [flag for group in verdicts for flag in group]
    n, correct = len(flags), sum(flags)
    if n == len(verdicts):
        interval = statistics.wilson_interval(correct, n, CONFIDENCE)
        return Share(n=n, correct=correct, accuracy=correct / n, interval=(interval.low, interval.high))
    accuracy = correct / n
    error = standard_error(verdicts)
    if error == 0.0:  # questions that all went the same way prove as much as that many single answers
        same = statistics.wilson_interval(round(accuracy * len(verdicts)), len(verdicts), CONFIDENCE)
        return Share(n=n, correct=correct, accuracy=accuracy, interval=(same.low, same.high))
    half = statistics.z_value(CONFIDENCE) * error
    ends = (max(0.0, accuracy - half), min(1.0, accuracy + half))
    return Share(n=n, correct=correct, accuracy=accuracy, interval=ends)


def mostly(group: Sequence[bool]) -> bool:
    """Whether more than half of the samples of a question are right."""
    return 2 * sum(group) > len(group)


def standard_error(verdicts: Verdicts) -> float:
    """Of the accuracy, clustered by question; 0 for a single question, which tells nothing of others."""
    if len(verdicts) < 2:
        return 0.0
    values = [float(flag) for group in verdicts for flag in group]
    clusters = [index for index, group in enumerate(verdicts) for _ in group]
    return statistics.clustered_mean(values, clusters).standard_error


def pass_at(verdicts: Verdicts, samples: int) -> dict[str, float]:
    """Unbiased pass@k for powers of two up to `samples`; nothing for single answers."""
    ks = sorted({2**power for power in range(samples.bit_length())} | {samples})
    return {
        str(k): mean(statistics.pass_at_k(samples, sum(group), k) for group in verdicts)
        for k in ks
        if k <= samples and samples > 1
    }


def votes(records: Sequence[EvalRecord]) -> Counter[str]:
    """How often each answer was given, first ones first. What states none or was cut off has no vote."""
    return Counter(one.final_answer for one in records if one.final_answer and one.finish_reason != "length")


def majority(records: Sequence[EvalRecord], verdicts: Verdicts) -> float | None:
    """Share of the questions whose most frequent answer is right (self-consistency, arXiv:2203.11171).

    Nothing for single answers. Of answers that are as frequent, each is as likely to be given.
    """
    samples = len(verdicts[0])
    if samples == 1:
        return None
    chances = []
    for group, flags in zip(groups(records, samples), verdicts, strict=True):
        counted = votes(group)
        most = max(counted.values(), default=0)
        tied = {answer for answer, count in counted.items() if count == most}
        right = {record.final_answer for record, flag in zip(group, flags, strict=True) if flag}
        chances.append(len(tied & right) / max(1, len(tied)))
    return mean(chances)


def groups(items: Sequence[T], samples: int) -> list[list[T]]:
    """What there is of every answer, question by question."""
    return [list(items[start : start + samples]) for start in range(0, len(items), samples)]


def pairs(correct: dict[str, Verdicts]) -> tuple[PairSummary, ...]:
    """Each model against every earlier one; nothing where a single question allows no standard error."""
    names = list(combinations(correct, 2))
    if not names or len(next(iter(correct.values()))) < 2:
        return ()
    found = [_pair(a, b, correct[a], correct[b]) for a, b in names]
    adjusted = statistics.holm([one.p for one in found])
    return tuple(one.model_copy(update={"p_holm": p}) for one, p in zip(found, adjusted, strict=True))


def _pair(a: str, b: str, first: Verdicts, second: Verdicts) -> PairSummary:
    table = statistics.paired_table([mostly(group) for group in first], [mostly(group) for group in second])
    samples = len(first[0])
    if samples == 1:
        paired = statistics.paired_difference(table, CONFIDENCE)
        p = statistics.mcnemar_exact(table)
        # As the standard error does: no discordant pair seen counts as one.
        discordant = max(table.only_first + table.only_second, 1) / table.total
        detectable = statistics.minimum_detectable_difference(table.total, discordant)
        ends = (paired.difference, paired.standard_error, paired.low, paired.high)
    else:
        means = statistics.paired_means(
            [mean(map(float, group)) for group in first],
            [mean(map(float, group)) for group in second],
            smallest=1 / samples,
            confidence=CONFIDENCE,
        )
        p, ends = means.p, means[:4]
        detectable = min(1.0, statistics.detectable_with(means.standard_error))
    difference, se, low, high = ends
    return PairSummary(
        a=a,
        b=b,
        difference=difference,
        se=se,
        interval=(low, high),
        table=Table(
            both=table.both, only_a=table.only_first, only_b=table.only_second, neither=table.neither
        ),
        p=p,
        p_holm=p,
        minimum_detectable_difference=detectable,
    )


def breakdowns(
    questions: Sequence[EvalQuestion], correct: dict[str, Verdicts]
) -> dict[str, tuple[BreakdownRow, ...]]:
    """Results by solution lines, calculator steps and cleaning status, for those that the dataset tells."""
    features: dict[str, Callable[[EvalQuestion], str | None]] = {
        "solution lines": lambda item: _level(item.solution_lines),
        "calculator steps": lambda item: _level(item.calculator_steps),
        "cleaning status": lambda item: item.cleaning_status,
    }
    found = {}
    for name, feature in features.items():
        levels: dict[str, list[int]] = {}
        for index, item in enumerate(questions):
            if (level := feature(item)) is not None:
                levels.setdefault(level, []).append(index)
        if levels:
            found[name] = tuple(
                BreakdownRow(
                    level=level,
                    n=len(indices),
                    models={model: share([groups[i] for i in indices]) for model, groups in correct.items()},
                )
                for level, indices in sorted(levels.items(), key=lambda pair: (len(pair[0]), pair[0]))
            )
    return found


def _level(count: int) -> str | None:
    return None if count == 0 else str(count) if count < 8 else "8+"

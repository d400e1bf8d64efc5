"""Statistics of paired evaluations: intervals, tests and what a sample size can show.

Every function is pure, takes plain numbers and returns a number or a NamedTuple of them. Proportions are
fractions of one, not percent. `z` of a confidence level is two-sided.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from scipy.special import ndtr, ndtri, stdtr, stdtrit
from scipy.stats import binom


class Interval(NamedTuple):
    """A point estimate with the ends of its confidence interval."""

    estimate: float
    low: float
    high: float


class PairedTable(NamedTuple):
    """Questions by which of two models answered them correctly."""

    both: int
    only_first: int
    only_second: int
    neither: int

    @property
    def total(self) -> int:
        """Number of questions."""
        return sum(self)


class PairedDifference(NamedTuple):
    """Accuracy of the second model minus that of the first, on the same questions."""

    difference: float
    standard_error: float
    low: float
    high: float


class PairedMeans(NamedTuple):
    """The second model's mean minus the first's, over questions whose scores are means of several samples."""

    difference: float
    standard_error: float
    low: float
    high: float
    p: float


class ClusteredMean(NamedTuple):
    """A mean over samples that come in groups, with the standard error that admits their dependence."""

    mean: float
    standard_error: float
    clusters: int


def z_value(confidence: float) -> float:
    """The standard normal quantile of a two-sided interval: 1.96 for 0.95.

    Raises:
        ValueError: `confidence` is not strictly between 0 and 1.
    """
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    return float(ndtri(0.5 + confidence / 2))


def wilson_interval(successes: int, total: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927, without continuity correction).

    Raises:
        ValueError: there are no trials, or more successes than trials.
    """
    if total < 1 or not 0 <= successes <= total:
        raise ValueError(f"need 0 <= successes <= total and total >= 1, got {successes} of {total}")
    z = z_value(confidence)
    share = successes / total
    shrink = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == total else min(1.0, centre + half)
    return Interval(share, low, high)


def paired_table(first: Sequence[bool], second: Sequence[bool]) -> PairedTable:
    """The 2x2 table of two models' correctness; position i of both is the same question.

    Raises:
        ValueError: the sequences differ in length.
    """
    pairs = list(zip(first, second, strict=True))
    return PairedTable(
        both=sum(bool(a and b) for a, b in pairs),
        only_first=sum(bool(a and not b) for a, b in pairs),
        only_second=sum(bool(b and not a) for a, b in pairs),
        neither=sum(not (a or b) for a, b in pairs),
    )


def paired_difference(table: PairedTable, confidence: float = 0.95) -> PairedDifference:
    """The accuracy gained from the first to the second model, with a normal interval clipped to [-1, 1].

    The standard error is the sample one: sqrt((b + c - (c - b)^2 / n) / (n (n - 1))), b and c being the
    discordant counts. Without any discordant pair it is taken from one discordant pair in n instead, since a
    sample that shows no difference does not prove that there is none.

    Raises:
        ValueError: fewer than two questions.
    """
    n = table.total
    if n < 2:
        raise ValueError(f"a paired difference needs at least 2 questions, got {n}")
    difference = (table.only_second - table.only_first) / n
    discordant = table.only_second + table.only_first
    spread = max(discordant, 1) - (0.0 if discordant == 0 else n * difference * difference)
    standard_error = math.sqrt(spread / (n * (n - 1)))
    half = z_value(confidence) * standard_error
    return PairedDifference(
        difference, standard_error, max(-1.0, difference - half), min(1.0, difference + half)
    )


def paired_means(
    first: Sequence[float], second: Sequence[float], *, smallest: float, confidence: float = 0.95
) -> PairedMeans:
    """The paired t-test on question means; position i of both is the same question.

    `smallest` is the least by which one question can differ, 1 over the number of samples: without any
    difference the standard error is taken from one such difference, as in `paired_difference`.

    Raises:
        ValueError: the sequences differ in length, or hold fewer than two questions.
    """
    differences = [b - a for a, b in zip(first, second, strict=True)]
    n = len(differences)
    if n < 2:
        raise ValueError(f"a paired difference needs at least 2 questions, got {n}")
    mean = math.fsum(differences) / n
    spread = math.fsum((one - mean) ** 2 for one in differences)
    standard_error = math.sqrt(max(spread, smallest**2) / (n * (n - 1)))
    half = float(stdtrit(n - 1, 0.5 + confidence / 2)) * standard_error
    p = 2 * float(stdtr(n - 1, -abs(mean) / standard_error))
    return PairedMeans(mean, standard_error, max(-1.0, mean - half), min(1.0, mean + half), p)


def mcnemar_exact(table: PairedTable) -> float:
    """The two-sided exact McNemar p-value: a sign test on the discordant pairs. 1.0 without any."""
    discordant = table.only_first + table.only_second
    fewer = min(table.only_first, table.only_second)
    return min(1.0, 2 * float(binom.cdf(fewer, discordant, 0.5)))


def minimum_detectable_difference(
    total: int, discordant_share: float, *, power: float = 0.8, confidence: float = 0.95
) -> float:
    """The smallest paired accuracy difference that `total` questions show with `power` at `confidence`.

    Normal approximation under the null's variance: (z_confidence + z_power) sqrt(discordant_share / total).
    A difference cannot exceed the share of discordant pairs, so that share is the most this returns.

    Raises:
        ValueError: no questions, or a share or power outside (0, 1).
    """
    if total < 1 or not 0.0 < discordant_share <= 1.0 or not 0.0 < power < 1.0:
        raise ValueError("need total >= 1, 0 < discordant_share <= 1 and 0 < power < 1")
    needed = detectable_with(math.sqrt(discordant_share / total), power=power, confidence=confidence)
    return min(needed, discordant_share)


def detectable_with(standard_error: float, *, power: float = 0.8, confidence: float = 0.95) -> float:
    """The difference that an estimate with `standard_error` shows with `power` at `confidence`."""
    return (z_value(confidence) + float(ndtri(power))) * standard_error


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for multiple comparisons (Holm 1979), in the order given.

    Raises:
        ValueError: a p-value lies outside [0, 1] (NaN does).
    """
    if any(not 0.0 <= p <= 1.0 for p in p_values):
        raise ValueError("p-values must lie between 0 and 1")
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased chance that one of k samples is right: 1 - C(n - c, k) / C(n, k) (arXiv:2107.03374).

    Raises:
        ValueError: not 1 <= k <= samples, or not 0 <= correct <= samples.
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(
            f"need 1 <= k <= samples and 0 <= correct <= samples, got {k=}, {samples=}, {correct=}"
        )
    ways = math.comb(samples, k)
    return (ways - math.comb(samples - correct, k)) / ways


def clustered_mean(values: Sequence[float], clusters: Sequence[Hashable]) -> ClusteredMean:
    """The mean of `values` and its cluster-robust standard error; `clusters[i]` names the group of value i.

    With residuals r and G groups: sqrt(G / (G - 1) * sum over groups of (sum of r)^2) / n. Groups of one give
    the ordinary standard error of the mean.

    Raises:
        ValueError: the sequences differ in length, or there are fewer than two groups.
    """
    if len(values) != len(clusters):
        raise ValueError(f"{len(values)} values but {len(clusters)} cluster names")
    mean = math.fsum(values) / len(values) if values else math.nan
    residuals: dict[Hashable, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        residuals[cluster] = residuals.get(cluster, 0.0) + (value - mean)
    groups = len(residuals)
    if groups < 2:
        raise ValueError(f"a clustered standard error needs at least 2 groups, got {groups}")
    variance = groups / (groups - 1) * math.fsum(total * total for total in residuals.values())
    return ClusteredMean(mean, math.sqrt(variance) / len(values), groups)


def normal_p_value(z: float) -> float:
    """The two-sided p-value of a standard normal statistic."""
    return 2 * float(ndtr(-abs(z)))

"""Measures of a score against a label, on plain arrays; N observations in G groups (questions).

`labels_N` is 0 or 1, `scores_N` grows with the chance of 1. Whatever has an interval gets the middle 95% of
bootstrap resamples of whole groups, because arms of one question are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.model_selection import GroupKFold

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Measure = Callable[[Ints, Floats], float]

CONFIDENCE = 0.95
FOLDS = 5


class Estimate(NamedTuple):
    """A value and the ends of its interval; NaN where it is not defined."""

    value: float
    low: float
    high: float


class Bin(NamedTuple):
    """One bin of a reliability plot: mean score, share of label 1 with Wilson's interval, size."""

    score: float
    share: float
    low: float
    high: float
    size: int


class Fit(NamedTuple):
    """A logistic regression: its coefficients, its intercept, and its scores out of fold (N,)."""

    coefficients: Floats
    intercept: float
    scores_N: Floats


def auroc(labels_N: Ints, scores_N: Floats) -> float:
    """P(a 1 scores above a 0), ties half (Mann and Whitney); NaN where a label is missing."""
    ones = int(labels_N.sum())
    zeros = len(labels_N) - ones
    if not ones or not zeros:
        return math.nan
    ranks = rankdata(scores_N)
    return float((ranks[labels_N == 1].sum() - ones * (ones + 1) / 2) / (ones * zeros))


def average_precision(labels_N: Ints, scores_N: Floats) -> float:
    """Mean precision over the steps of recall, as scikit-learn defines it; NaN where nothing is 1."""
    return float(average_precision_score(labels_N, scores_N)) if labels_N.any() else math.nan


def bootstrapped(
    measure: Measure, labels_N: Ints, scores_N: Floats, groups_N: Ints, *, resamples: int, seed: int
) -> Estimate:
    """`measure` and the middle 95% of its values on `resamples` resamples of the groups."""
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(groups_N == group) for group in np.unique(groups_N)]
    values = []
    for _ in range(resamples):
        rows = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
        values.append(measure(labels_N[rows], scores_N[rows]))
    tail = (1 - CONFIDENCE) / 2
    defined = [value for value in values if not math.isnan(value)]
    low, high = np.quantile(defined, [tail, 1 - tail]) if defined else (math.nan, math.nan)
    return Estimate(measure(labels_N, scores_N), float(low), float(high))


def wilson(ones: int, count: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share of `count` > 0 (Wilson 1927, without continuity correction)."""
    z = float(ndtri(0.5 + CONFIDENCE / 2))
    share = ones / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return centre - half, centre + half


def reliability(labels_N: Ints, scores_N: Floats, bins: int = 10) -> list[Bin]:
    """At most `bins` bins of nearly equal size, by score; equal scores are never parted."""
    order = np.argsort(scores_N, kind="stable")
    cuts = {0, len(order)}
    for k in range(1, bins):
        cut = len(order) * k // bins
        while 0 < cut < len(order) and scores_N[order[cut]] == scores_N[order[cut - 1]]:
            cut += 1
        cuts.add(cut)
    found = []
    edges = sorted(cuts)
    for low, high in pairwise(edges):
        rows = order[low:high]
        ones = int(labels_N[rows].sum())
        found.append(Bin(float(scores_N[rows].mean()), ones / len(rows), *wilson(ones, len(rows)), len(rows)))
    return found


def calibration_error(bins: Sequence[Bin]) -> float:
    """Mean distance of score and share over the bins, by size (expected calibration error)."""
    total = sum(one.size for one in bins)
    return sum(one.size * abs(one.score - one.share) for one in bins) / total if total else math.nan


def risk_coverage(labels_N: Ints, scores_N: Floats) -> tuple[Floats, Floats]:
    """Share of observations that are answered, and share of 0 among them, at every threshold of the score.

    From the highest threshold down (Geifman and El-Yaniv, 2017); equal scores are answered together.
    """
    order = np.argsort(-scores_N, kind="stable")
    wrong = np.cumsum(1 - labels_N[order])
    last = np.append(np.diff(scores_N[order]) != 0, True)  # the last one of each threshold
    counts = np.arange(1, len(order) + 1)[last]
    return counts / len(order), wrong[last] / counts


def area_under(coverage: Floats, risk: Floats) -> float:
    """Area under a risk-coverage curve; between two thresholds the risk is that of the lower one."""
    return float((np.diff(coverage, prepend=0.0) * risk).sum())


def within_groups(labels_N: Ints, scores_N: Floats, groups_N: Ints) -> tuple[float, int]:
    """The mean AUROC of the groups that hold both labels, and how many they are; NaN for none."""
    values = []
    for group in np.unique(groups_N):
        rows = groups_N == group
        value = auroc(labels_N[rows], scores_N[rows])
        if not math.isnan(value):
            values.append(value)
    return (math.fsum(values) / len(values) if values else math.nan), len(values)


def fit_logistic(labels_N: Ints, features_NF: Floats, groups_N: Ints) -> Fit:
    """A logistic regression on all observations, with scores from folds that do not part a group.

    All but free of a penalty. NaN scores where there are not enough groups, or a fold lacks a label.
    """
    scores_N = np.full(len(labels_N), math.nan)
    if len(np.unique(groups_N)) >= FOLDS:
        for train, test in GroupKFold(FOLDS).split(features_NF, labels_N, groups_N):
            if len(np.unique(labels_N[train])) == 2:
                model = _logistic().fit(features_NF[train], labels_N[train])
                scores_N[test] = model.decision_function(features_NF[test])
    model = _logistic().fit(features_NF, labels_N)
    return Fit(model.coef_[0], float(model.intercept_[0]), scores_N)


def _logistic() -> LogisticRegression:
    return LogisticRegression(C=1e4, max_iter=1000)

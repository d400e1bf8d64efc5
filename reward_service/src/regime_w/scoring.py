"""Agreement of the arms of one question: s_end, s_path, s_cf and their blend s_wm.

Every component is a mean over pairs of arms. The leave-one-out share of arm i is the same mean over the
pairs that hold i, so the mean of the shares is the component itself, and the blend inherits that.

Nothing here depends on the order of the arms, to the last bit: answers are counted, every sum is
`math.fsum` (correctly rounded, so order-free), and the Gram matrix is made of integers (see `_cosines`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from looper_schemas.answers import extract_answer
from regime_w.arms import Family
from regime_w.copies import Pair, copied_pairs
from regime_w.settings import RegimeWSettings, Weights

FloatArray = npt.NDArray[np.float32] | npt.NDArray[np.float64]
Embed = Callable[[Sequence[str]], FloatArray]


class NonFiniteEmbedding(ValueError):
    """An embedder returned NaN or infinity: its output says nothing, so there is no score."""


class JudgeError(RuntimeError):
    """A judge could not give a verdict in [0, 1]."""


@dataclass(frozen=True)
class ArmResult:
    """What one arm said: canonical answer (None: none), reasoning without its final-answer line, family."""

    answer: str | None
    reasoning: str
    family: Family | None = None


JudgeConsistency = Callable[[ArmResult, ArmResult], float]


class Agreement(NamedTuple):
    """A component of one question and each arm's leave-one-out share of it; mean(shares) = value."""

    value: float
    shares: tuple[float, ...]
    degenerate: bool = False


class RegimeWScores(NamedTuple):
    """Scores of one question; the components are None where fewer than two arms define no pair.

    `shares` are the arms' leave-one-out shares of s_wm, `parts` those of (s_end, s_path, s_cf).
    """

    s_end: float | None
    s_path: float | None
    s_cf: float | None
    s_wm: float
    degenerate: bool
    shares: tuple[float, ...]
    parts: tuple[tuple[float, float, float], ...] = ()


# --- the components, as plain numbers ------------------------------------------------------------------


def s_end_for_question(answers: Sequence[str | None]) -> float | None:
    """Mean over pairs of [both answers present and numerically equal]; None for fewer than two arms."""
    if len(answers) < 2:
        return None
    return end_agreement([None if a is None else extract_answer(a) for a in answers]).value


def s_path_for_question(
    reasonings: Sequence[str], embed: Embed, copies_threshold: float | None = 0.9
) -> float | None:
    """Mean over pairs of clip(cos, 0, 1) of the embedded reasonings; None for fewer than two arms.

    Raises:
        NonFiniteEmbedding: `embed` returned NaN or infinity.
    """
    if len(reasonings) < 2:
        return None
    return path_agreement(embed(reasonings), copied_pairs(reasonings, copies_threshold)).value


def s_cf_for_question(
    arm_results: Sequence[ArmResult],
    judge_consistency: JudgeConsistency,
    copies_threshold: float | None = 0.9,
) -> float | None:
    """Mean verdict over Wolfram x Maudlin, or over all pairs when no arm has a family.

    None for fewer than two arms; 0 when only one of the two families is present.
    """
    if len(arm_results) < 2:
        return None
    pairs = cf_pairs(arm_results)
    verdicts = [judge_consistency(arm_results[i], arm_results[j]) for i, j in pairs]
    copies = copied_pairs([arm.reasoning for arm in arm_results], copies_threshold)
    return cf_agreement(arm_results, dict(zip(pairs, verdicts, strict=True)), copies).value


def s_wm_for_question(
    s_end: float | None, s_path: float | None, s_cf: float | None, weights: Weights | None = None
) -> float:
    """The blend of the three components; 0 where they are undefined."""
    if s_end is None or s_path is None or s_cf is None:
        return 0.0
    w = weights or Weights()
    return min(1.0, math.fsum((w.end * s_end, w.path * s_path, w.cf * s_cf)))


def compute_regime_w_scores(
    arm_results: Sequence[ArmResult],
    vectors: FloatArray,
    judge_pairs: Callable[[Sequence[tuple[ArmResult, ArmResult]]], Sequence[float]],
    settings: RegimeWSettings | None = None,
) -> RegimeWScores:
    """All scores and shares of one question.

    Args:
        arm_results: the n arms.
        vectors: (n, d), the embedding of each arm's reasoning; zero rows where there is none.
        judge_pairs: verdicts in [0, 1] for a list of pairs of arms, in its order.

    Raises:
        NonFiniteEmbedding, JudgeError: a part failed; the question has no score.
    """
    settings = settings or RegimeWSettings()
    n = len(arm_results)
    if n < 2:
        return RegimeWScores(None, None, None, 0.0, True, (0.0,) * n)
    copies = copied_pairs([arm.reasoning for arm in arm_results], settings.copies_threshold)
    pairs = cf_pairs(arm_results)
    judged = [pair for pair in pairs if pair not in copies]
    verdicts = list(judge_pairs([(arm_results[i], arm_results[j]) for i, j in judged])) if judged else []
    if len(verdicts) != len(judged):
        raise JudgeError(f"{len(verdicts)} verdicts for {len(judged)} pairs")

    end = end_agreement([arm.answer for arm in arm_results])
    path = path_agreement(vectors, copies)
    cf = cf_agreement(arm_results, dict(zip(judged, verdicts, strict=True)), copies)
    parts = tuple(zip(end.shares, path.shares, cf.shares, strict=True))
    shares = tuple(s_wm_for_question(*components, settings.weights) for components in parts)
    s_wm = s_wm_for_question(end.value, path.value, cf.value, settings.weights)
    return RegimeWScores(end.value, path.value, cf.value, s_wm, cf.degenerate, shares, parts)


# --- the components with their shares; all need n >= 2 -------------------------------------------------


def end_agreement(answers: Sequence[str | None]) -> Agreement:
    """Closed form of s_end: an answer given c times agrees with c - 1 others. Missing never agrees.

    `answers` are canonical (equal strings are equal numbers).
    """
    n = len(answers)
    counts = Counter(answer for answer in answers if answer is not None)
    shares = tuple(0.0 if a is None else (counts[a] - 1) / (n - 1) for a in answers)
    return Agreement(sum(c * (c - 1) for c in counts.values()) / (n * (n - 1)), shares)


def path_agreement(vectors: FloatArray, copies: frozenset[Pair] = frozenset()) -> Agreement:
    """s_path from the Gram matrix of the (n, d) `vectors`, which need not be normalised; zero rows give 0."""
    cosines = _cosines(vectors)
    for i, j in copies:
        cosines[i, j] = cosines[j, i] = 0.0
    np.fill_diagonal(cosines, 0.0)
    return _mean_over_others(cosines)


def cf_pairs(arm_results: Sequence[ArmResult]) -> list[Pair]:
    """The pairs i < j that s_cf judges: across the two families, or all where no arm has a family."""
    families = [arm.family for arm in arm_results]
    n = len(families)
    everyone = all(family is None for family in families)
    return [
        (i, j)
        for i in range(n)
        for j in range(i + 1, n)
        if everyone or {families[i], families[j]} == {"wolfram", "maudlin"}
    ]


def cf_agreement(
    arm_results: Sequence[ArmResult], verdicts: dict[Pair, float], copies: frozenset[Pair] = frozenset()
) -> Agreement:
    """s_cf from the verdicts of `cf_pairs`; a copied pair counts 0 and needs no verdict.

    An arm without a family among arms that have one takes the question's s_cf as its share. With one
    family only there is no pair: value and shares are 0 and the question is degenerate.
    """
    n = len(arm_results)
    pairs = cf_pairs(arm_results)
    if not pairs:
        return Agreement(0.0, (0.0,) * n, degenerate=True)
    rows: list[list[float]] = [[] for _ in range(n)]
    values = []
    for i, j in pairs:
        verdict = 0.0 if (i, j) in copies else float(verdicts[i, j])
        if not 0.0 <= verdict <= 1.0:  # also NaN
            raise JudgeError("a verdict lies outside [0, 1]")
        rows[i].append(verdict)
        rows[j].append(verdict)
        values.append(verdict)
    value = math.fsum(values) / len(values)
    return Agreement(value, tuple(math.fsum(row) / len(row) if row else value for row in rows))


def _mean_over_others(values_NN: npt.NDArray[np.float64]) -> Agreement:
    n = len(values_NN)
    sums = [math.fsum(row) for row in values_NN.tolist()]
    return Agreement(math.fsum(sums) / (n * (n - 1)), tuple(total / (n - 1) for total in sums))


def _cosines(vectors: FloatArray) -> npt.NDArray[np.float64]:
    """clip(cos, 0, 1) of every two rows, (n, n) float64, exactly symmetric and free of summation order.

    Unit vectors are rounded to multiples of 2**-26. By Cauchy-Schwarz every partial sum of a dot product
    of two of them is then an integer multiple of 2**-52 below 2, which a float64 holds exactly: whatever
    order the matrix product adds in, it adds without rounding. The grid costs at most 3e-7 in a cosine
    (d = 384), typically 1e-8.
    """
    wide = np.asarray(vectors, dtype=np.float64)
    if not np.isfinite(wide).all():
        raise NonFiniteEmbedding("an embedding is not finite")
    largest = np.abs(wide).max(axis=1, keepdims=True, initial=0.0)
    scaled = np.divide(wide, largest, out=np.zeros_like(wide), where=largest > 0)
    norms = np.sqrt((scaled * scaled).sum(axis=1, keepdims=True))
    units = np.divide(scaled, norms, out=np.zeros_like(wide), where=norms > 0)
    grid = np.rint(units * 2.0**26)
    gram: npt.NDArray[np.float64] = grid @ grid.T
    return np.clip(gram * 2.0**-52, 0.0, 1.0)

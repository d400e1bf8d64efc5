"""The figures of a calibration report, as plain values for JSON; a NaN becomes null."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from looper_schemas.scoring import RewardMode
from regime_w.settings import Weights
from reward_service.calibration import measures
from reward_service.calibration.measures import Estimate, Floats, Ints
from reward_service.calibration.rollouts import COMPONENTS, Observed

PARTS = COMPONENTS[:3]
HISTOGRAM_BINS = 20


def make_report(
    observed: Observed, weights: Weights, *, resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Every figure of the report; see `docs/decisions/0047` for what each one answers.

    Raises:
        ValueError: there is not both a right and a wrong arm, so that nothing can be told apart.
    """
    labels = observed.arm_labels_A
    if len(np.unique(labels)) < 2:
        raise ValueError("the arms are all right or all wrong")
    questions = np.arange(len(observed.question_labels_Q))
    levels = {
        "arm": (labels, observed.arm_scores, observed.arm_groups_A),
        "question": (observed.question_labels_Q, observed.question_scores, questions),
    }
    report: dict[str, Any] = {
        "questions": len(questions),
        "questions_failed": observed.failed,
        "questions_with_fewer_than_two_arms": observed.left_out,
        "arms": len(labels),
        "arms_right": int(labels.sum()),
        "questions_whose_plurality_is_right": int(observed.question_labels_Q.sum()),
        "resamples": resamples,
        "discrimination": {
            level: {
                name: {
                    measure.__name__: _interval(
                        measures.bootstrapped(
                            measure, ys, scores[name], groups, resamples=resamples, seed=seed
                        )
                    )
                    for measure in (measures.auroc, measures.average_precision)
                }
                for name in COMPONENTS
            }
            for level, (ys, scores, groups) in levels.items()
        },
        "reliability": {
            level: _reliability(ys, scores["s_wm"], groups) for level, (ys, scores, groups) in levels.items()
        },
        "risk_coverage": {
            name: _risk_coverage(observed.question_labels_Q, observed.question_scores[name])
            for name in COMPONENTS
        },
        "histograms": {name: _histogram(labels, observed.arm_scores[name]) for name in COMPONENTS},
        "reward_modes": {mode.value: _mode(observed, mode) for mode in RewardMode},
        "weights": _ablation(observed, weights, resamples, seed),
    }
    plain = _plain(report)
    assert isinstance(plain, dict)
    return plain


def _interval(estimate: Estimate) -> dict[str, float]:
    return estimate._asdict()


def _reliability(labels: Ints, scores: Floats, groups: Ints) -> dict[str, Any]:
    raw = measures.reliability(labels, scores)
    fitted = measures.fit_logistic(labels, scores[:, None], groups) if len(np.unique(labels)) == 2 else None
    result: dict[str, Any] = {
        "bins": [one._asdict() for one in raw],
        "expected_calibration_error": measures.calibration_error(raw),
        "brier": float(np.mean((scores - labels) ** 2)),
    }
    if fitted is not None and np.isfinite(fitted.scores_N).all():
        chances = 1 / (1 + np.exp(-fitted.scores_N))
        bins = measures.reliability(labels, chances)
        result["after_logistic_scaling"] = {
            "bins": [one._asdict() for one in bins],
            "expected_calibration_error": measures.calibration_error(bins),
            "brier": float(np.mean((chances - labels) ** 2)),
            "slope": float(fitted.coefficients[0]),
            "intercept": fitted.intercept,
        }
    return result


def _risk_coverage(labels: Ints, scores: Floats) -> dict[str, Any]:
    coverage, risk = measures.risk_coverage(labels, scores)
    best, least = measures.risk_coverage(labels, labels.astype(np.float64))
    return {
        "coverage": coverage.tolist(),
        "risk": risk.tolist(),
        "area": measures.area_under(coverage, risk),
        "area_of_no_score": float(1 - labels.mean()),
        "area_of_a_perfect_score": measures.area_under(best, least),
    }


def _histogram(labels: Ints, scores: Floats) -> dict[str, Any]:
    edges = np.linspace(0.0, 1.0, HISTOGRAM_BINS + 1)
    return {
        "edges": edges.tolist(),
        "right": np.histogram(scores[labels == 1], edges)[0].tolist(),
        "wrong": np.histogram(scores[labels == 0], edges)[0].tolist(),
    }


def _mode(observed: Observed, mode: RewardMode) -> dict[str, Any]:
    labels, groups = observed.arm_labels_A, observed.arm_groups_A
    rewards, without = observed.rewards[mode], observed.rewards_without_gold[mode]
    within, count = measures.within_groups(labels, rewards, groups)
    return {
        "auroc_within_questions": within,
        "auroc_within_questions_without_gold": measures.within_groups(labels, without, groups)[0],
        "questions_with_right_and_wrong_arms": count,
        "wrong_arms_with_positive_reward": float((rewards[labels == 0] > 0).mean()),
        "mean_reward_of_right_arms": float(rewards[labels == 1].mean()),
        "mean_reward_of_wrong_arms": float(rewards[labels == 0].mean()),
    }


def _ablation(observed: Observed, weights: Weights, resamples: int, seed: int) -> dict[str, Any]:
    """What other weights of the three components would tell of an arm, out of fold where they are fitted."""
    labels, groups = observed.arm_labels_A, observed.arm_groups_A
    table = np.stack([observed.arm_scores[name] for name in PARTS], axis=1)
    present = np.array([weights.end, weights.path, weights.cf])
    blends: dict[str, Floats] = {"as set": table @ present, "equal": table.mean(axis=1)}
    fits: dict[str, Any] = {}
    for kept in ((0, 1, 2), (1, 2), (0, 2), (0, 1), (0,), (1,), (2,)):
        name = "fitted: " + " + ".join(PARTS[i] for i in kept)
        fit = measures.fit_logistic(labels, table[:, kept], groups)
        blends[name] = fit.scores_N
        positive = np.clip(fit.coefficients, 0, None)
        fits[name] = {
            "coefficients": dict(zip((PARTS[i] for i in kept), fit.coefficients.tolist(), strict=True)),
            "intercept": fit.intercept,
            "as_weights": dict(
                zip((PARTS[i] for i in kept), (positive / positive.sum()).tolist(), strict=True)
            )
            if positive.any()
            else None,
        }
    return {
        "as_set": dict(zip(PARTS, present.tolist(), strict=True)),
        "auroc": {
            name: _interval(
                measures.bootstrapped(measures.auroc, labels, scores, groups, resamples=resamples, seed=seed)
                if np.isfinite(scores).all()
                else Estimate(math.nan, math.nan, math.nan)
            )
            for name, scores in blends.items()
        },
        "fits": fits,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value

"""The measures against scikit-learn, SciPy, and values worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score

from reward_service.calibration import measures


def labelled(n: int = 300, seed: int = 0, ties: bool = True) -> tuple[measures.Ints, measures.Floats]:
    rng = np.random.default_rng(seed)
    scores = rng.random(n).round(1 if ties else 12)
    return (rng.random(n) < scores).astype(np.int64), scores


def test_auroc_by_hand() -> None:
    # Ones score .9 and .4, zeros .4 and .1: of four pairs three are won and one is a tie.
    labels = np.array([1, 1, 0, 0])
    assert measures.auroc(labels, np.array([0.9, 0.4, 0.4, 0.1])) == 3.5 / 4


@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 5)), min_size=2, max_size=40).filter(
        lambda rows: len({label for label, _ in rows}) == 2
    )
)
def test_auroc_is_that_of_scikit_learn_with_ties(rows: list[tuple[int, int]]) -> None:
    labels, scores = (np.array(column) for column in zip(*rows, strict=True))
    assert measures.auroc(labels, scores.astype(float)) == pytest.approx(roc_auc_score(labels, scores))


def test_average_precision_by_hand_and_by_scikit_learn() -> None:
    # Right at ranks 1 and 3: precision 1 and 2/3, each for half of the recall.
    labels, scores = np.array([1, 0, 1, 0]), np.array([0.9, 0.8, 0.7, 0.6])
    assert measures.average_precision(labels, scores) == pytest.approx((1 + 2 / 3) / 2)
    labels, scores = labelled()
    assert measures.average_precision(labels, scores) == average_precision_score(labels, scores)


def test_one_label_alone_has_no_measure() -> None:
    ones = np.ones(3, dtype=np.int64)
    assert math.isnan(measures.auroc(ones, np.arange(3.0)))
    assert math.isnan(measures.average_precision(1 - ones, np.arange(3.0)))


def test_the_interval_resamples_whole_groups() -> None:
    labels, scores = labelled(400, ties=False)
    alone = np.arange(400)
    one = measures.bootstrapped(measures.auroc, labels, scores, alone, resamples=400, seed=0)
    assert one.low < one.value == measures.auroc(labels, scores) < one.high
    # The same observations four times over, each copy in the group of its original, say nothing new.
    copies = [np.tile(column, 4) for column in (labels, scores, alone)]
    again = measures.bootstrapped(measures.auroc, *copies, resamples=400, seed=0)
    assert again == pytest.approx(one, abs=1e-12)
    # Were they taken for independent, the interval would be about half as wide.
    naive = measures.bootstrapped(
        measures.auroc, copies[0], copies[1], np.arange(1600), resamples=400, seed=0
    )
    assert (naive.high - naive.low) / (one.high - one.low) == pytest.approx(0.5, abs=0.12)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Two normals one deviation apart: AUROC is Phi(1 / sqrt 2) = .7602."""
    rng = np.random.default_rng(3)
    truth = 0.5 * (1 + math.erf(0.5))
    labels = np.repeat([0, 1], 60)
    hits = 0
    for _ in range(60):
        scores = rng.normal(size=120) + labels
        found = measures.bootstrapped(measures.auroc, labels, scores, np.arange(120), resamples=120, seed=1)
        hits += found.low <= truth <= found.high
    assert hits >= 50  # of 60; at a true coverage of .93 fewer come less than once in a hundred


def test_wilsons_interval_is_that_of_scipy() -> None:
    for ones, count in ((0, 5), (3, 7), (7, 7), (90, 100)):
        expected = binomtest(ones, count).proportion_ci(0.95, method="wilson")
        assert measures.wilson(ones, count) == pytest.approx((expected.low, expected.high))


def test_reliability_is_scikit_learns_calibration_curve() -> None:
    labels, scores = labelled(1000, ties=False)
    bins = measures.reliability(labels, scores)
    shares, means = calibration_curve(labels, scores, n_bins=10, strategy="quantile")
    assert [one.share for one in bins] == pytest.approx(shares.tolist())
    assert [one.score for one in bins] == pytest.approx(means.tolist())
    assert [one.size for one in bins] == [100] * 10


def test_equal_scores_share_a_bin() -> None:
    scores = np.array([0.0] * 7 + [1.0] * 3)
    bins = measures.reliability(np.array([0] * 6 + [1] * 4), scores, bins=5)
    assert [(one.score, one.share, one.size) for one in bins] == [
        (0.0, pytest.approx(1 / 7), 7),
        (1.0, 1.0, 3),
    ]
    # 7/10 * |0 - 1/7| + 3/10 * |1 - 1|
    assert measures.calibration_error(bins) == pytest.approx(0.1)


def test_risk_and_coverage_by_hand() -> None:
    labels, scores = np.array([1, 0, 1, 0]), np.array([0.9, 0.8, 0.8, 0.1])
    coverage, risk = measures.risk_coverage(labels, scores)
    assert coverage.tolist() == [0.25, 0.75, 1.0]  # the two of .8 are answered together
    assert risk.tolist() == pytest.approx([0.0, 1 / 3, 0.5])
    assert measures.area_under(coverage, risk) == pytest.approx(0.25 * 0 + 0.5 / 3 + 0.25 * 0.5)


def test_within_groups_takes_those_with_both_labels() -> None:
    labels = np.array([1, 0, 1, 1, 0, 1])
    scores = np.array([0.9, 0.1, 0.5, 0.5, 0.7, 0.7])
    groups = np.array([0, 0, 1, 1, 2, 2])
    assert measures.within_groups(labels, scores, groups) == ((1.0 + 0.5) / 2, 2)
    value, count = measures.within_groups(labels[2:4], scores[2:4], groups[2:4])
    assert math.isnan(value)
    assert count == 0


def test_the_regression_finds_the_coefficients_it_was_made_from() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(20_000, 2))
    chances = 1 / (1 + np.exp(-(2.0 * features[:, 0] - 1.0 * features[:, 1] + 0.5)))
    labels = (rng.random(20_000) < chances).astype(np.int64)
    fit = measures.fit_logistic(labels, features, np.arange(20_000))
    assert fit.coefficients.tolist() == pytest.approx([2.0, -1.0], abs=0.08)
    assert fit.intercept == pytest.approx(0.5, abs=0.08)
    assert measures.auroc(labels, fit.scores_N) == pytest.approx(roc_auc_score(labels, chances), abs=0.002)


def test_scores_out_of_fold_have_not_seen_their_group() -> None:
    """Every group has a feature of its own that gives its label away: who had seen it would know."""
    groups = np.repeat(np.arange(40), 5)
    rng = np.random.default_rng(0)
    labels = np.repeat(rng.integers(0, 2, 40), 5)
    features = np.eye(40)[groups]
    fit = measures.fit_logistic(labels, features, groups)
    seen = LogisticRegression(C=1e4, max_iter=1000).fit(features, labels).decision_function(features)
    assert measures.auroc(labels, seen) == 1.0
    assert measures.auroc(labels, fit.scores_N) < 0.6


def test_too_few_groups_give_no_scores_out_of_fold() -> None:
    labels, scores = np.array([0, 1, 0, 1]), np.array([0.1, 0.9, 0.2, 0.8])
    fit = measures.fit_logistic(labels, scores[:, None], np.arange(4))
    assert np.isnan(fit.scores_N).all()
    assert fit.coefficients[0] > 0

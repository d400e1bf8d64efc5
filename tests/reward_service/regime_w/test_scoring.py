"""Scores against hand-worked numbers and against the pairwise definitions, written out as naive loops."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from regime_w.copies import jaccard, word_grams
from regime_w.judges import EquationsJudge
from regime_w.scoring import (
    ArmResult,
    JudgeError,
    NonFiniteEmbedding,
    RegimeWScores,
    compute_regime_w_scores,
    s_cf_for_question,
    s_end_for_question,
    s_path_for_question,
    s_wm_for_question,
)
from regime_w.settings import RegimeWSettings, Weights

judge = EquationsJudge()


def judge_pairs(pairs: Sequence[tuple[ArmResult, ArmResult]]) -> list[float]:
    return judge.judge_pairs("", pairs)


REASONINGS = (
    "",
    "4 * 6 = 24",
    "4 * 6 = 24 and 24 / 2 = 12",
    "First 24 / 2 = 12, then 12 + 1 = 13, and at last 13 * 3 = 39 of them.",
    "First 24 / 2 = 12, then 12 + 1 = 13, and at last 13 * 3 = 39 of them!",
    "Nothing is calculated here, though the words go on for quite a while.",
)
arms_of_a_question = st.lists(
    st.builds(
        ArmResult,
        answer=st.sampled_from([None, "12", "24", "39", "7/2"]),
        reasoning=st.sampled_from(REASONINGS),
        family=st.sampled_from([None, "wolfram", "maudlin"]),
    ),
    max_size=9,
)
vector_entries = st.floats(-4, 4, width=32)


@st.composite
def questions(draw: st.DrawFn) -> tuple[list[ArmResult], np.ndarray]:
    arms = draw(arms_of_a_question)
    if draw(st.booleans()):
        arms = [ArmResult(arm.answer, arm.reasoning) for arm in arms]
    return arms, draw(hnp.arrays(np.float32, (len(arms), 5), elements=vector_entries))


def naive_components(arms: list[ArmResult], vectors: np.ndarray) -> tuple[float, float, float]:
    """The definitions, pair by pair."""
    end, path, cf = [], [], []
    for i, j in combinations(range(len(arms)), 2):
        a, b = arms[i], arms[j]
        copies = jaccard(word_grams(a.reasoning), word_grams(b.reasoning)) >= 0.9
        end.append(1.0 if a.answer is not None and b.answer is not None and a.answer == b.answer else 0.0)
        u, v = vectors[i].astype(np.float64), vectors[j].astype(np.float64)
        norms = float(np.linalg.norm(u) * np.linalg.norm(v))
        cosine = float(u @ v) / norms if norms > 0 else 0.0
        path.append(0.0 if copies else min(1.0, max(0.0, cosine)))
        crosses = (a.family, b.family) in {("wolfram", "maudlin"), ("maudlin", "wolfram")}
        if crosses or all(arm.family is None for arm in arms):
            cf.append(0.0 if copies else judge(a, b))
    return tuple(sum(values) / len(values) if values else 0.0 for values in (end, path, cf))  # type: ignore[return-value]


def test_s_end_of_four_answers_by_hand() -> None:
    # pairs: 72=72 yes; the other five no
    assert s_end_for_question(["72", "72", "70", None]) == pytest.approx(1 / 6, abs=1e-15)


def test_s_end_compares_numbers_and_not_strings() -> None:
    assert s_end_for_question(["$1,000", "1000.0", "#### 1000."]) == 1.0
    assert s_end_for_question(["7/2", "3.5"]) == 1.0
    assert s_end_for_question(["385001", "385000"]) == 0.0


def test_missing_answers_never_agree_even_with_each_other() -> None:
    assert s_end_for_question([None, None, None]) == 0.0
    assert s_end_for_question([None, "no number here at all", "5"]) == 0.0


@pytest.mark.parametrize("answers", [[], ["5"]])
def test_fewer_than_two_arms_have_no_components(answers: list[str]) -> None:
    arms = [ArmResult(answer, "2 + 3 = 5", "wolfram") for answer in answers]
    assert s_end_for_question(answers) is None
    assert (
        s_path_for_question([arm.reasoning for arm in arms], lambda texts: np.ones((len(texts), 3))) is None
    )
    assert s_cf_for_question(arms, judge) is None
    scores = compute_regime_w_scores(arms, np.ones((len(arms), 3)), judge_pairs)
    assert scores == RegimeWScores(None, None, None, 0.0, True, (0.0,) * len(arms))


def test_s_path_by_hand_clips_obtuse_angles_to_zero() -> None:
    # cos(a,b) = 0.6, cos(a,c) = -1 -> 0, cos(b,c) = -0.6 -> 0
    vectors = {"a": [2.0, 0.0], "b": [3.0, 4.0], "c": [-5.0, 0.0]}
    value = s_path_for_question(["a", "b", "c"], lambda texts: np.array([vectors[t] for t in texts]))
    assert value == pytest.approx(0.2, abs=1e-8)


def test_a_zero_embedding_agrees_with_nothing() -> None:
    vectors = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    value = s_path_for_question(["", "one two", "three four"], lambda texts: vectors)
    assert value == pytest.approx(1 / 3, abs=1e-8)
    assert s_path_for_question(["", "one"], lambda texts: np.zeros((2, 4))) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_embedding_is_an_error_and_not_a_score(bad: float) -> None:
    with pytest.raises(NonFiniteEmbedding):
        s_path_for_question(["one", "two"], lambda texts: np.array([[1.0, 0.0], [bad, 0.0]]))


def test_s_cf_by_hand_across_families_only() -> None:
    w1 = ArmResult("9", "2 * 3 = 6 and 6 + 1 = 7", "wolfram")
    w2 = ArmResult("9", "10 / 2 = 5", "wolfram")
    m1 = ArmResult("9", "So 3 + 3 = 6 of them", "maudlin")
    # w1 has {6, 7}, m1 has {6}: F1 = 2/3. w2 has {5}: 0. The pair w1, w2 does not count.
    assert s_cf_for_question([w1, w2, m1], judge) == pytest.approx(1 / 3, abs=1e-15)


def test_without_families_s_cf_takes_all_pairs() -> None:
    arms = [ArmResult(None, text) for text in ("2 * 3 = 6, 6 + 1 = 7", "10 / 2 = 5", "So 3 + 3 = 6")]
    assert s_cf_for_question(arms, judge) == pytest.approx((2 / 3) / 3, abs=1e-15)


def test_one_family_only_scores_no_consistency_and_is_degenerate() -> None:
    arms = [ArmResult("6", f"2 * 3 = 6 in words of its own, {word}", "maudlin") for word in ("abc", "def")]
    assert s_cf_for_question(arms, judge) == 0.0
    scores = compute_regime_w_scores(arms, np.eye(2), judge_pairs)
    assert (scores.s_end, scores.s_path, scores.s_cf, scores.degenerate) == (1.0, 0.0, 0.0, True)
    assert scores.s_wm == pytest.approx(0.4)


def test_an_arm_without_a_family_among_families_shares_the_questions_s_cf() -> None:
    arms = [
        ArmResult(None, "2 * 3 = 6", "wolfram"),
        ArmResult(None, "So 3 + 3 = 6", "maudlin"),
        ArmResult(None, "1 + 1 = 2"),
    ]
    scores = compute_regime_w_scores(arms, np.zeros((3, 2)), judge_pairs)
    assert scores.s_cf == 1.0
    assert scores.shares == pytest.approx((0.3, 0.3, 0.3))
    assert not scores.degenerate


def test_s_wm_blends_with_the_weights() -> None:
    assert s_wm_for_question(1.0, 0.5, 0.2) == pytest.approx(0.4 + 0.15 + 0.06)
    assert s_wm_for_question(1.0, 0.5, 0.2, Weights(end=0.0, path=1.0, cf=0.0)) == 0.5
    assert s_wm_for_question(None, None, None) == 0.0


def test_weights_that_do_not_sum_to_one_are_refused() -> None:
    with pytest.raises(ValueError, match="sum to 1"):
        Weights(end=0.5, path=0.5, cf=0.5)


def test_copies_count_nothing_in_s_path_and_s_cf_but_keep_their_answers() -> None:
    arms = [ArmResult("9", "We find 2 * 3 = 6 and then 6 + 3 = 9") for _ in range(3)]
    scores = compute_regime_w_scores(arms, np.ones((3, 4)), judge_pairs)
    assert (scores.s_end, scores.s_path, scores.s_cf) == (1.0, 0.0, 0.0)
    without_rule = compute_regime_w_scores(
        arms, np.ones((3, 4)), judge_pairs, RegimeWSettings(copies_threshold=None)
    )
    assert (without_rule.s_end, without_rule.s_path, without_rule.s_cf) == pytest.approx((1.0, 1.0, 1.0))


def test_shares_by_hand() -> None:
    # answers 5, 5, 6; no vectors, no equations: shares are 0.4 * (1/2, 1/2, 0), their mean 0.4 / 3
    arms = [ArmResult(answer, "") for answer in ("5", "5", "6")]
    scores = compute_regime_w_scores(arms, np.zeros((3, 2)), judge_pairs)
    assert scores.shares == pytest.approx((0.2, 0.2, 0.0), abs=1e-15)
    assert scores.s_wm == pytest.approx(0.4 / 3, abs=1e-15)


@pytest.mark.parametrize("verdict", [math.nan, -0.1, 1.1, math.inf])
def test_a_verdict_outside_the_unit_interval_is_an_error(verdict: float) -> None:
    arms = [ArmResult("1", "one"), ArmResult("1", "two")]
    with pytest.raises(JudgeError):
        compute_regime_w_scores(arms, np.eye(2), lambda pairs: [verdict] * len(pairs))


def test_a_judge_that_skips_a_pair_is_an_error() -> None:
    arms = [ArmResult("1", "one"), ArmResult("1", "two")]
    with pytest.raises(JudgeError):
        compute_regime_w_scores(arms, np.eye(2), lambda pairs: [])


@settings(max_examples=400, deadline=None)
@given(questions())
def test_closed_forms_equal_the_pairwise_definitions(question: tuple[list[ArmResult], np.ndarray]) -> None:
    arms, vectors = question
    if len(arms) < 2:
        return
    scores = compute_regime_w_scores(arms, vectors, judge_pairs)
    end, path, cf = naive_components(arms, vectors)
    assert scores.s_end == pytest.approx(end, abs=1e-12)
    assert scores.s_path == pytest.approx(path, abs=1e-7)
    assert scores.s_cf == pytest.approx(cf, abs=1e-12)


@settings(max_examples=400, deadline=None)
@given(questions())
def test_scores_lie_in_the_unit_interval_and_shares_average_to_s_wm(
    question: tuple[list[ArmResult], np.ndarray],
) -> None:
    arms, vectors = question
    scores = compute_regime_w_scores(arms, vectors, judge_pairs)
    for value in (scores.s_end, scores.s_path, scores.s_cf, scores.s_wm, *scores.shares):
        assert value is None or 0.0 <= value <= 1.0
    if arms:
        mean = sum(map(Fraction, scores.shares)) / len(arms)
        assert abs(float(mean) - scores.s_wm) <= 4e-16


@settings(max_examples=400, deadline=None)
@given(questions(), st.randoms(use_true_random=False))
def test_permuting_the_arms_permutes_the_shares_to_the_last_bit(
    question: tuple[list[ArmResult], np.ndarray], rng: random.Random
) -> None:
    arms, vectors = question
    order = list(range(len(arms)))
    rng.shuffle(order)
    before = compute_regime_w_scores(arms, vectors, judge_pairs)
    after = compute_regime_w_scores([arms[i] for i in order], vectors[order], judge_pairs)
    assert after.shares == tuple(before.shares[i] for i in order)
    assert after[:5] == before[:5]


@pytest.mark.parametrize("n", [3, 17, 64])
def test_permutation_changes_no_bit_with_real_widths(n: int) -> None:
    rng = np.random.default_rng(n)
    vectors = rng.normal(size=(n, 384)).astype(np.float32) + 0.3
    arms = [ArmResult(str(rng.integers(4)), f"words {i}: {i} + 1 = {i + 1}") for i in range(n)]
    before = compute_regime_w_scores(arms, vectors, judge_pairs)
    for _ in range(5):
        order = rng.permutation(n)
        after = compute_regime_w_scores([arms[i] for i in order], vectors[order], judge_pairs)
        assert after.shares == tuple(before.shares[i] for i in order)
        assert after[:5] == before[:5]


def test_cosines_on_the_grid_are_those_of_float64() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, 384)) + 0.5
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    naive = np.mean([units[i] @ units[j] for i, j in combinations(range(40), 2)])
    texts = [str(i) for i in range(40)]
    assert s_path_for_question(texts, lambda _: vectors) == pytest.approx(naive, abs=1e-8)


def test_embeddings_of_any_scale_give_the_same_s_path() -> None:
    vectors = np.array([[3.0, 4.0], [1.0, 0.0]])
    for scale in (1e-300, 1e-30, 1.0, 1e30, 1e300):
        value = s_path_for_question(["a", "b"], lambda _, s=scale: vectors * s)
        assert value == pytest.approx(0.6, abs=1e-8)

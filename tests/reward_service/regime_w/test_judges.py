"""The equations judge, worked by hand."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regime_w.judges import EquationsJudge, f1
from regime_w.scoring import ArmResult

judge = EquationsJudge()
numbers = st.frozensets(st.integers(0, 6).map(Fraction))


def test_f1_of_two_chains_by_hand() -> None:
    a = ArmResult("36", "6 * 4 = 24 rolls, 24 / 2 = 12 sold, 12 * 3 = 36")  # {24, 12}
    b = ArmResult("36", "6 * 4 = 24 rolls, 24 * 3 = 72, 72 / 2 = 36")  # {24, 72}
    assert judge(a, b) == 0.5


def test_the_final_answer_does_not_count_as_agreement() -> None:
    a = ArmResult("36", "6 * 6 = 36")
    assert judge(a, ArmResult("36", "9 * 4 = 36")) == 0.0


def test_an_arm_without_an_equation_agrees_with_nothing() -> None:
    for text in ("", ":", "Solution:", "The other arm is right: score 1.0"):
        assert judge(ArmResult("5", text), ArmResult("5", text)) == 0.0


def test_repeating_one_equation_a_thousand_times_changes_nothing() -> None:
    once, other = ArmResult("1", "2*3=6"), ArmResult("1", "2*3=6, 6+1=7")
    often = ArmResult("1", "2*3=6\n" * 1000)
    assert judge(often, other) == judge(once, other) == pytest.approx(2 / 3)


def test_many_pairs_are_judged_as_each_alone() -> None:
    arms = [ArmResult(None, text) for text in ("2*3=6", "2*3=6, 6+1=7", "6+1=7", "")]
    pairs = [(a, b) for a in arms for b in arms]
    assert judge.judge_pairs("", pairs) == [judge(a, b) for a, b in pairs]


@given(numbers, numbers)
def test_f1_is_the_harmonic_mean_of_precision_and_recall(
    a: frozenset[Fraction], b: frozenset[Fraction]
) -> None:
    shared = sum(1 for value in a if value in b)
    if not shared:
        assert f1(a, b) == 0.0
        return
    precision, recall = shared / len(a), shared / len(b)
    assert f1(a, b) == f1(b, a) == pytest.approx(2 * precision * recall / (precision + recall))

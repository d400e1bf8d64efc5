"""Rewards of the three modes, worked by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from looper_schemas.scoring import RewardMode
from regime_w.reward import compute_reward, length_penalty, reward_range
from regime_w.settings import LengthPenalty, RewardSettings

CORRECT = [True, False, False]
SHARES = [0.2, 0.5, 0.8]
S_WM = 0.5


def test_question_mode_gives_every_arm_the_users_formula() -> None:
    rewards = compute_reward(RewardMode.QUESTION, CORRECT, S_WM, SHARES)
    assert rewards.question == pytest.approx(1.0 + 0.7 * 0.5)
    assert rewards.arms == (rewards.question,) * 3


def test_question_mode_without_a_correct_arm() -> None:
    assert compute_reward(RewardMode.QUESTION, [False] * 3, S_WM, SHARES).question == pytest.approx(-0.15)


def test_arm_mode_gives_each_arm_its_own_base_and_share() -> None:
    rewards = compute_reward(RewardMode.ARM, CORRECT, S_WM, SHARES)
    assert rewards.arms == pytest.approx((1.14, -0.15, 0.06))
    assert rewards.question == pytest.approx((1.14 - 0.15 + 0.06) / 3)


def test_gated_mode_pays_wrong_arms_nothing_for_agreeing() -> None:
    rewards = compute_reward(RewardMode.ARM_GATED, CORRECT, S_WM, SHARES)
    assert rewards.arms == pytest.approx((1.14, -0.5, -0.5))


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (RewardMode.QUESTION, (0.35, 0.35, 0.35)),
        (RewardMode.ARM, (0.14, 0.35, 0.56)),
        (RewardMode.ARM_GATED, (0.0, 0.0, 0.0)),
    ],
)
def test_without_gold_the_base_is_zero_and_the_gate_is_shut(
    mode: RewardMode, expected: tuple[float, ...]
) -> None:
    rewards = compute_reward(mode, [None] * 3, S_WM, SHARES, gold_known=False)
    assert rewards.arms == pytest.approx(expected)


@pytest.mark.parametrize("mode", list(RewardMode))
def test_a_question_without_arms_is_wrong_or_unknown(mode: RewardMode) -> None:
    assert compute_reward(mode, [], 0.0, []).question == -0.5
    assert compute_reward(mode, [], 0.0, [], gold_known=False).question == 0.0


def test_length_penalty_by_hand() -> None:
    penalty = LengthPenalty()
    assert length_penalty(512, penalty) == 0.0
    assert length_penalty(612, penalty) == pytest.approx(-0.1)
    assert length_penalty(5000, penalty) == -0.5
    assert length_penalty(None, penalty) == 0.0
    assert length_penalty(5000, None) == 0.0


def test_length_penalty_is_each_arms_own_and_the_questions_mean() -> None:
    settings = RewardSettings(length_penalty=LengthPenalty())
    tokens = [612, 100, None]
    arms = compute_reward(RewardMode.ARM_GATED, CORRECT, S_WM, SHARES, tokens, settings=settings).arms
    assert arms == pytest.approx((1.04, -0.5, -0.5))
    question = compute_reward(RewardMode.QUESTION, CORRECT, S_WM, SHARES, tokens, settings=settings).question
    assert question == pytest.approx(1.35 - 0.1 / 3)


unit = st.floats(0, 1)


@given(
    st.sampled_from(RewardMode),
    st.lists(st.tuples(st.booleans(), unit), max_size=8),
    unit,
    st.booleans(),
)
def test_rewards_stay_within_the_stated_range(
    mode: RewardMode, arms: list[tuple[bool, float]], s_wm: float, gold_known: bool
) -> None:
    correct = [flag if gold_known else None for flag, _ in arms]
    shares = [share for _, share in arms]
    rewards = compute_reward(mode, correct, s_wm, shares, gold_known=gold_known)
    bounds = reward_range(mode)
    assert (bounds.low, bounds.high) == (-0.5, 1.7)
    assert all(bounds.low <= reward <= bounds.high for reward in (rewards.question, *rewards.arms))


def test_a_wrong_arm_never_beats_a_right_one_in_gated_mode() -> None:
    wrong = compute_reward(RewardMode.ARM_GATED, [False], 1.0, [1.0]).arms[0]
    right = compute_reward(RewardMode.ARM_GATED, [True], 0.0, [0.0]).arms[0]
    assert wrong < right

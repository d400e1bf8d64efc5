"""Clipped losses against hand-worked numbers and gradients; diagnostics against scipy and numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from looper_trainer.ppo.gae import gae, token_rewards
from looper_trainer.ppo.losses import (
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    truncated_importance_weight,
)


def test_policy_loss_of_the_four_corners_equals_the_numbers_worked_by_hand() -> None:
    # ratios 1.5 and .5, advantages +2 and -2, clip .2
    #   1.5, +2: min(3, 1.2*2) = 2.4, clipped        1.5, -2: min(-3, -2.4) = -3, not clipped
    #    .5, +2: min(1, .8*2) = 1, not clipped        .5, -2: min(-1, -1.6) = -1.6, clipped
    logprobs = torch.tensor([[1.5, 1.5, 0.5, 0.5]]).log()
    advantages = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    loss, ratio, clipped = clipped_policy_loss(logprobs, torch.zeros(1, 4), advantages, clip_range=0.2)
    torch.testing.assert_close(loss, torch.tensor([[-2.4, 3.0, -1.0, 1.6]]))
    torch.testing.assert_close(ratio, torch.tensor([[1.5, 1.5, 0.5, 0.5]]))
    assert clipped.tolist() == [[True, False, False, True]]


def test_policy_gradient_is_minus_ratio_times_advantage_and_zero_where_clipped() -> None:
    logprobs = torch.tensor([[1.1, 1.5]]).log().requires_grad_()
    loss, _, _ = clipped_policy_loss(logprobs, torch.zeros(1, 2), torch.tensor([[2.0, 2.0]]), clip_range=0.2)
    loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-2.2, 0.0]]))


def test_value_loss_equals_the_numbers_worked_by_hand() -> None:
    # old 1; clip .2. value 2, return 3: held 1.2 -> max(1, 3.24)/2 = 1.62, clipped
    # value 1.1, return 3: held 1.1 -> 3.61/2, the same. value 2, return 0: max(4, 1.44)/2 = 2, not clipped
    loss, clipped = clipped_value_loss(
        torch.tensor([[2.0, 1.1, 2.0]]), torch.ones(1, 3), torch.tensor([[3.0, 3.0, 0.0]]), clip_range=0.2
    )
    torch.testing.assert_close(loss, torch.tensor([[1.62, 1.805, 2.0]]))
    assert clipped.tolist() == [[True, False, False]]


def test_importance_weight_is_the_probability_ratio_up_to_the_cap_and_carries_no_gradient() -> None:
    old = torch.tensor([[math.log(0.3), math.log(0.2), math.log(0.9)]], requires_grad=True)
    sampler = torch.tensor([[math.log(0.2), math.log(0.4), math.log(0.1)]])
    weight = truncated_importance_weight(old, sampler, cap=2.0)
    torch.testing.assert_close(weight, torch.tensor([[1.5, 0.5, 2.0]]))
    assert not weight.requires_grad


def test_explained_variance_agrees_with_numpy_and_ignores_padding() -> None:
    generator = np.random.default_rng(0)
    returns, noise = generator.normal(size=(3, 4)), generator.normal(size=(3, 4))
    values = 0.5 * returns + 0.1 * noise + 7.0  # a constant offset explains nothing and costs nothing
    mask = generator.random((3, 4)) < 0.7
    expected = 1 - np.var((returns - values)[mask]) / np.var(returns[mask])
    garbage = torch.where(torch.tensor(mask), torch.tensor(values), torch.tensor(1e6))
    assert explained_variance(garbage, torch.tensor(returns), torch.tensor(mask)) == pytest.approx(expected)


def test_explained_variance_of_equal_returns_is_undefined() -> None:
    assert explained_variance(torch.zeros(2, 2), torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool)) is None


@pytest.mark.parametrize("score", [1.7, 1700.0, 0.0017])
def test_explained_variance_of_returns_that_differ_by_rounding_alone_is_undefined(score: float) -> None:
    mask = torch.ones(16, 200, dtype=torch.bool)
    values = score * torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))
    rewards = token_rewards(torch.full((16,), score), torch.zeros(mask.shape), mask, 0.0)
    _, returns = gae(rewards, values, mask, 1.0, 1.0)  # each is the score, but for the sums of the values
    assert returns.min() < returns.max()
    assert explained_variance(values, returns, mask) is None


def test_explained_variance_ends_at_minus_one() -> None:
    """Equal scores and a small price of KL: the fit is bad, and how bad says nothing."""
    mask = torch.ones(2, 2, dtype=torch.bool)
    returns = torch.tensor([[0.5, 0.5002], [0.5, 0.5001]])
    assert explained_variance(torch.tensor([[0.1, 0.4], [0.9, 0.2]]), returns, mask) == -1.0
    assert explained_variance(returns, returns, mask) == 1.0

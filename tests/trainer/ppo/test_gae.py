"""GAE, token rewards and whitening against hand-worked numbers and naive loops."""

from __future__ import annotations

import itertools
import math
from random import Random
from statistics import mean, pstdev

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from looper_trainer.ppo.gae import (
    gae,
    group_spread,
    in_unequal_group,
    last_token_mask,
    leave_one_out,
    masked_mean,
    token_rewards,
    whiten,
)

floats = st.floats(-5, 5, width=32)


@st.composite
def episodes(draw: st.DrawFn) -> tuple[list[list[float]], list[list[float]]]:
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=4).filter(any))
    rewards = [draw(st.lists(floats, min_size=n, max_size=n)) for n in lengths]
    values = [draw(st.lists(floats, min_size=n, max_size=n)) for n in lengths]
    return rewards, values


def padded(rows: list[list[float]], fill: float, extra: int = 0) -> torch.Tensor:
    width = max(map(len, rows)) + extra
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=torch.float64)


def mask_of(rows: list[list[float]], extra: int = 0) -> torch.Tensor:
    return padded([[1.0] * len(row) for row in rows], 0.0, extra).bool()


def naive_advantage(rewards: list[float], values: list[float], t: int, gamma: float, lam: float) -> float:
    """The sum of eq. 16 written out, term by term."""
    total = 0.0
    for step in range(len(rewards) - t):
        here = t + step
        following = values[here + 1] if here + 1 < len(rewards) else 0.0
        total += (gamma * lam) ** step * (rewards[here] + gamma * following - values[here])
    return total


def test_gae_of_three_tokens_equals_the_numbers_worked_by_hand() -> None:
    # delta_2 = 2 - .5 = 1.5; delta_1 = 0 + .9*.5 - 1 = -.55; delta_0 = 1 + .9*1 - .2 = 1.7; gamma*lam = .45
    # A_2 = 1.5; A_1 = -.55 + .45*1.5 = .125; A_0 = 1.7 + .45*.125 = 1.75625
    mask = torch.tensor([[True, True, True, False]])
    advantages, returns = gae(
        torch.tensor([[1.0, 0.0, 2.0, 9.0]]), torch.tensor([[0.2, 1.0, 0.5, 9.0]]), mask, gamma=0.9, lam=0.5
    )
    torch.testing.assert_close(advantages, torch.tensor([[1.75625, 0.125, 1.5, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[1.95625, 1.125, 2.0, 0.0]]))


@given(episodes(), st.floats(0.1, 1.0), st.floats(0.0, 1.0))
@settings(max_examples=60, deadline=None)
def test_gae_equals_the_sum_of_equation_16(
    episode: tuple[list[list[float]], list[list[float]]], gamma: float, lam: float
) -> None:
    rewards, values = episode
    advantages, _ = gae(padded(rewards, 7.0), padded(values, -7.0), mask_of(rewards), gamma, lam)
    expected = [
        [naive_advantage(r, v, t, gamma, lam) for t in range(len(r))]
        for r, v in zip(rewards, values, strict=True)
    ]
    torch.testing.assert_close(advantages, padded(expected, 0.0), rtol=1e-9, atol=1e-9)


@given(episodes(), st.floats(0.1, 1.0))
@settings(max_examples=60, deadline=None)
def test_lambda_one_gives_monte_carlo_returns(
    episode: tuple[list[list[float]], list[list[float]]], gamma: float
) -> None:
    rewards, values = episode
    _, returns = gae(padded(rewards, 0.0), padded(values, 0.0), mask_of(rewards), gamma, lam=1.0)
    expected = [
        [sum(gamma ** (j - t) * row[j] for j in range(t, len(row))) for t in range(len(row))]
        for row in rewards
    ]
    torch.testing.assert_close(returns, padded(expected, 0.0), rtol=1e-9, atol=1e-8)


@given(episodes(), st.integers(1, 4), floats)
@settings(max_examples=30, deadline=None)
def test_padding_changes_no_advantage(
    episode: tuple[list[list[float]], list[list[float]]], extra: int, garbage: float
) -> None:
    rewards, values = episode
    short, _ = gae(padded(rewards, 0.0), padded(values, 0.0), mask_of(rewards), 0.97, 0.9)
    long, _ = gae(
        padded(rewards, garbage, extra), padded(values, garbage, extra), mask_of(rewards, extra), 0.97, 0.9
    )
    assert torch.equal(long[:, : short.shape[1]], short)
    assert not long[:, short.shape[1] :].any()


def test_the_score_falls_on_the_last_real_token_and_kl_costs_every_token() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    kl = torch.tensor([[0.5, -1.0, 2.0], [3.0, 8.0, 8.0], [8.0, 8.0, 8.0]])
    rewards = token_rewards(torch.tensor([1.5, -0.5, 4.0]), kl, mask, kl_coef=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 0.1, 1.3], [-0.8, 0.0, 0.0], [0.0, 0.0, 0.0]]))


def test_a_row_without_tokens_has_no_last_token() -> None:
    mask = torch.tensor([[True, False], [True, True], [False, False]])
    assert last_token_mask(mask).tolist() == [[True, False], [False, True], [False, False]]


def test_whitening_of_four_numbers_equals_the_numbers_worked_by_hand() -> None:
    # mean 3, deviations -2, 0, 2, 0, variance 2
    x = torch.tensor([[1.0, 3.0, 99.0], [5.0, 3.0, -99.0]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    expected = torch.tensor([[-(2**0.5), 0.0, 0.0], [2**0.5, 0.0, 0.0]])
    torch.testing.assert_close(whiten(x, mask), expected)


@given(episodes(), st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_whitening_does_not_depend_on_the_order_of_rows(
    episode: tuple[list[list[float]], list[list[float]]], random
) -> None:  # type: ignore[no-untyped-def]
    rows, _ = episode
    order = list(range(len(rows)))
    random.shuffle(order)
    straight, shuffled = padded(rows, 0.0), padded([rows[i] for i in order], 0.0)
    mask = mask_of(rows)
    whitened = whiten(straight, mask)
    torch.testing.assert_close(whiten(shuffled, mask[order]), whitened[order], rtol=1e-6, atol=1e-6)


def test_masked_mean_ignores_what_is_not_a_number_outside_the_mask() -> None:
    x = torch.tensor([[2.0, float("nan")], [4.0, float("inf")]])
    mask = torch.tensor([[True, False], [True, False]])
    assert masked_mean(x, mask) == pytest.approx(3.0)


@given(st.integers(2, 5), st.lists(floats, min_size=1, max_size=4), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_the_group_baseline_is_the_mean_of_the_others_and_its_spread_that_of_all(
    k: int, seeds: list[float], rng: Random
) -> None:
    groups = [[seed + rng.uniform(-1, 1) for _ in range(k)] for seed in seeds]
    scores = torch.tensor([s for group in groups for s in group], dtype=torch.float64)
    others = [mean(group[:j] + group[j + 1 :]) for group in groups for j in range(k)]
    torch.testing.assert_close(leave_one_out(scores, k), torch.tensor(others, dtype=torch.float64))
    spreads = [max(pstdev(group), 1e-4) for group in groups for _ in range(k)]
    torch.testing.assert_close(group_spread(scores, k), torch.tensor(spreads, dtype=torch.float64))
    groups.append([0.1] * k)
    scores = torch.tensor([s for group in groups for s in group], dtype=torch.float64)
    unequal = [len(set(group)) > 1 for group in groups for _ in range(k)]
    assert in_unequal_group(scores, k).tolist() == unequal


@pytest.mark.parametrize("k", [2, 4, 8])
def test_what_the_baseline_leaves_of_the_gradient_of_agreement(k: int) -> None:
    """Decision 0066: (k - 2) / (k - 1) of it. Exact, over all groups of k answers of a policy that answers
    0 with probability p; a completion's reward is the share of the others that agree with it."""
    p = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    with_baseline, without = [], []
    for group in itertools.product([0, 1], repeat=k):
        each = [p if answer == 0 else 1 - p for answer in group]
        scores = torch.tensor([(group.count(answer) - 1) / (k - 1) for answer in group], dtype=torch.float64)
        chance = math.prod(float(one.detach()) for one in each)
        (slope,) = torch.autograd.grad(torch.stack(each).log() @ scores, p, retain_graph=True)
        without.append(chance * float(slope))
        (slope,) = torch.autograd.grad(torch.stack(each).log() @ (scores - leave_one_out(scores, k)), p)
        with_baseline.append(chance * float(slope))
    assert sum(with_baseline) == pytest.approx((k - 2) / (k - 1) * sum(without), abs=1e-9)

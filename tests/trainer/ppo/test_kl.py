"""KL estimators against exact KL of small categorical distributions; controllers against worked numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import rel_entr

from looper_trainer.ppo.kl import AdaptiveKL, FixedKL, kl_k1, kl_k3

probabilities = st.lists(st.floats(0.05, 1.0), min_size=5, max_size=5).map(
    lambda weights: torch.tensor(weights, dtype=torch.float64) / sum(weights)
)


@given(probabilities, probabilities)
@settings(max_examples=60, deadline=None)
def test_both_estimators_have_the_exact_kl_as_their_expectation(p: torch.Tensor, q: torch.Tensor) -> None:
    exact = float(rel_entr(p.numpy(), q.numpy()).sum())
    assert float((p * kl_k1(p.log(), q.log())).sum()) == pytest.approx(exact, abs=1e-12)
    assert float((p * kl_k3(p.log(), q.log())).sum()) == pytest.approx(exact, abs=1e-12)


@given(probabilities, probabilities)
@settings(max_examples=60, deadline=None)
def test_k3_is_never_negative_and_identical_policies_have_kl_zero(p: torch.Tensor, q: torch.Tensor) -> None:
    assert (kl_k3(p.log(), q.log()) >= -1e-15).all()
    assert not kl_k1(p.log(), p.log()).any()
    assert not kl_k3(p.log(), p.log()).any()


def test_k3_varies_less_than_k1_for_close_policies() -> None:
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.45, 0.33, 0.22], dtype=torch.float64)

    def variance(x: torch.Tensor) -> float:
        return float((p * x**2).sum() - (p * x).sum() ** 2)

    assert variance(kl_k3(p.log(), q.log())) < 0.1 * variance(kl_k1(p.log(), q.log()))


def test_adaptive_controller_moves_as_worked_by_hand() -> None:
    controller = AdaptiveKL(0.1, target=6.0)
    controller.update(6.6)  # error +.1 -> times 1.01
    assert controller.coef == pytest.approx(0.101)
    controller.update(600.0)  # clipped at +.2 -> times 1.02
    assert controller.coef == pytest.approx(0.10302)
    controller.update(0.0)  # clipped at -.2 -> times .98
    assert controller.coef == pytest.approx(0.1009596)


def test_fixed_controller_never_moves() -> None:
    controller = FixedKL(0.05)
    controller.update(1e9)
    assert controller.coef == 0.05

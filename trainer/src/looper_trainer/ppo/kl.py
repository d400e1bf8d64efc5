"""KL estimators from sampled tokens, and the controllers of the KL coefficient.

With tokens drawn from p and `logprobs` = log p, `ref_logprobs` = log q, both estimators have expectation
KL(p || q). `kl_k1` may be negative for one token; `kl_k3` never is and varies less (J. Schulman,
"Approximating KL Divergence", 2020). The token reward uses k1, whose gradient through the score function is
that of the true KL; both are logged.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """`log p - log q`, in nats, elementwise."""
    return logprobs - ref_logprobs


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """`q/p - 1 - log(q/p)`, in nats, elementwise and never negative."""
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


class KLController(Protocol):
    """Holds the coefficient of the KL penalty; `update` takes the step's mean KL of a completion, in nats."""

    coef: float

    def update(self, kl_per_completion: float) -> None: ...


class FixedKL:
    """A coefficient that never changes."""

    def __init__(self, coef: float) -> None:
        self.coef = coef

    def update(self, kl_per_completion: float) -> None:
        """Leave the coefficient as it is."""


class AdaptiveKL:
    """Proportional control towards a target KL, arXiv:1909.08593 section 2.2: gain 0.1, error within 0.2."""

    gain = 0.1
    max_error = 0.2

    def __init__(self, coef: float, target: float) -> None:
        self.coef = coef
        self.target = target

    def update(self, kl_per_completion: float) -> None:
        """Raise the coefficient when the KL is above the target, lower it when below."""
        error = kl_per_completion / self.target - 1.0
        self.coef *= 1.0 + self.gain * min(max(error, -self.max_error), self.max_error)

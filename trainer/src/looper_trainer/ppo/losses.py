"""PPO's losses and diagnostics per token: pure functions on (B, T) tensors.

Losses are returned for each token. The caller adds up those of real tokens and divides by the number of
real tokens in the *whole minibatch*, so that cutting a minibatch into micro-batches changes nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from looper_trainer.ppo.gae import masked_variance


class PolicyLoss(NamedTuple):
    """Loss, probability ratio new/old, and whether clipping cut the gradient, each (B, T)."""

    loss_BT: Tensor
    ratio_BT: Tensor
    clipped_BT: Tensor


def clipped_policy_loss(
    logprobs_BT: Tensor, old_logprobs_BT: Tensor, advantages_BT: Tensor, clip_range: float
) -> PolicyLoss:
    """The clipped surrogate objective, negated: arXiv:1707.06347 eq. 7."""
    ratio_BT = torch.exp(logprobs_BT - old_logprobs_BT)
    plain_BT = ratio_BT * advantages_BT
    held_BT = ratio_BT.clamp(1.0 - clip_range, 1.0 + clip_range) * advantages_BT
    return PolicyLoss(-torch.minimum(plain_BT, held_BT), ratio_BT, held_BT < plain_BT)


class ValueLoss(NamedTuple):
    """Loss and whether the clipped prediction gave it, each (B, T)."""

    loss_BT: Tensor
    clipped_BT: Tensor


def clipped_value_loss(
    values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, clip_range: float
) -> ValueLoss:
    """Half the squared error: the larger of the plain one and that of a prediction held near the old."""
    held_BT = old_values_BT + (values_BT - old_values_BT).clamp(-clip_range, clip_range)
    plain_error_BT = (values_BT - returns_BT) ** 2
    held_error_BT = (held_BT - returns_BT) ** 2
    return ValueLoss(0.5 * torch.maximum(plain_error_BT, held_error_BT), held_error_BT > plain_error_BT)


def truncated_importance_weight(old_logprobs_BT: Tensor, sampler_logprobs_BT: Tensor, cap: float) -> Tensor:
    """`min(p_trainer / p_sampler, cap)` of each token (B, T), constant in the gradient.

    Corrects for tokens drawn by an engine whose probabilities differ from the trainer's own, with bounded
    variance: truncated importance sampling, Ionides 2008.
    """
    return torch.exp(old_logprobs_BT - sampler_logprobs_BT).clamp(max=cap).detach()


def explained_variance(values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor) -> float | None:
    """`1 - Var(returns - values) / Var(returns)` over the mask, at least -1.

    None where the returns vary by no more than their rounding: each is a sum of up to T numbers of their size
    and the values'. Where they vary a little (equal scores, a price of KL) it would be far below; below -1 it
    says no more than that the values do not fit, so it ends there, as in RLlib.
    """
    variance = float(masked_variance(returns_BT, mask_BT))
    size = float(torch.maximum(returns_BT.abs(), values_BT.abs()).masked_fill(~mask_BT, 0.0).max())
    if variance <= mask_BT.shape[1] * (torch.finfo(returns_BT.dtype).eps * size) ** 2:
        return None
    return max(1.0 - float(masked_variance(returns_BT - values_BT, mask_BT)) / variance, -1.0)

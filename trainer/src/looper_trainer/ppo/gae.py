"""Token rewards, generalized advantage estimation and whitening: pure functions on (B, T) tensors.

B completions, T completion positions, right-padded. `completion_mask_BT` is True at real tokens, and each
row's real tokens are a prefix of it; a row without any is a completion that takes no part in the update.
`values_BT[b, t]` is the value of the state in which token t was chosen. A completion ends its episode,
whether it stopped by itself or was cut at the token limit.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_rewards(scores_B: Tensor, kl_BT: Tensor, completion_mask_BT: Tensor, kl_coef: float) -> Tensor:
    """Rewards (B, T): `-kl_coef * kl` at every real token, plus the completion's score on its last one."""
    rewards_BT = (-kl_coef * kl_BT).masked_fill(~completion_mask_BT, 0.0)
    return rewards_BT + torch.where(last_token_mask(completion_mask_BT), scores_B[:, None], 0.0)


def last_token_mask(completion_mask_BT: Tensor) -> Tensor:
    """True (B, T) at the last real token of each row; all False in a row without real tokens."""
    lengths_B = completion_mask_BT.sum(dim=1)
    positions_T = torch.arange(completion_mask_BT.shape[1], device=completion_mask_BT.device)
    return positions_T[None, :] == lengths_B[:, None] - 1


def gae(
    rewards_BT: Tensor, values_BT: Tensor, completion_mask_BT: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, both (B, T) and zero at padding.

    Generalized advantage estimation, arXiv:1506.02438 eq. 16, as its backward recursion
    `A_t = delta_t + gamma * lam * A_{t+1}`, `delta_t = r_t + gamma * V_{t+1} - V_t` (eq. 10), with V and A
    zero after the last real token. Returns are `A + V`, the targets of the value function.
    """
    rewards_BT = rewards_BT.masked_fill(~completion_mask_BT, 0.0)
    values_BT = values_BT.masked_fill(~completion_mask_BT, 0.0)
    advantages_BT = torch.zeros_like(rewards_BT)
    next_advantage_B = torch.zeros_like(rewards_BT[:, 0])
    next_value_B = torch.zeros_like(next_advantage_B)
    for t in reversed(range(rewards_BT.shape[1])):
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        next_advantage_B = delta_B + gamma * lam * next_advantage_B
        next_value_B = values_BT[:, t]
        advantages_BT[:, t] = next_advantage_B
    return advantages_BT, (advantages_BT + values_BT).masked_fill(~completion_mask_BT, 0.0)


def leave_one_out(scores_B: Tensor, k: int) -> Tensor:
    """Mean score (B,) of the k - 1 other completions of each completion's question.

    Rows come question by question, k of each. Where a completion's score depends on that completion alone,
    so does the baseline not, and the policy gradient stays unbiased (arXiv:2402.14740 eq. 7). Scores that
    say how well completions agree hold a part of each other: of that part's gradient (k - 2) / (k - 1) is
    left (decision 0066).
    """
    scores_Qk = scores_B.view(-1, k)
    return ((scores_Qk.sum(dim=1, keepdim=True) - scores_Qk) / (k - 1)).flatten()


def in_unequal_group(scores_B: Tensor, k: int) -> Tensor:
    """Whether (B,) the k completions of a completion's question have different scores."""
    scores_Qk = scores_B.view(-1, k)
    differ_Q1 = scores_Qk.amax(dim=1, keepdim=True) > scores_Qk.amin(dim=1, keepdim=True)
    return differ_Q1.expand_as(scores_Qk).flatten()


def group_spread(scores_B: Tensor, k: int, floor: float = 1e-4) -> Tensor:
    """Population standard deviation (B,) of each completion's group of k, at least `floor`."""
    scores_Qk = scores_B.view(-1, k)
    spread_Q1 = scores_Qk.std(dim=1, correction=0, keepdim=True).clamp(min=floor)
    return spread_Q1.expand_as(scores_Qk).flatten()


def masked_mean(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean of `x` where `mask` is True, a scalar; 0 where the mask is empty."""
    return x_BT.masked_fill(~mask_BT, 0.0).sum() / mask_BT.sum().clamp(min=1)


def masked_variance(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Population variance of `x` where `mask` is True, a scalar; 0 where the mask is empty."""
    return masked_mean((x_BT - masked_mean(x_BT, mask_BT)) ** 2, mask_BT)


def whiten(x_BT: Tensor, mask_BT: Tensor, eps: float = 1e-8) -> Tensor:
    """`x` shifted and scaled to mean 0 and variance 1 over the mask; zero outside it."""
    centred_BT = x_BT - masked_mean(x_BT, mask_BT)
    return (centred_BT * torch.rsqrt(masked_variance(x_BT, mask_BT) + eps)).masked_fill(~mask_BT, 0.0)

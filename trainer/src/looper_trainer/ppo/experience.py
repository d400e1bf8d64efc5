"""What a step learned from its samples: logprobs and values of the sampling policy, advantages, returns.

All tensors are (B, T) over the step's B completions; see `gae` for masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from looper_trainer.ppo.batch import MicroBatch, Row, micro_batch
from looper_trainer.ppo.config import PPOConfig
from looper_trainer.ppo.gae import gae, group_spread, in_unequal_group, leave_one_out, token_rewards, whiten
from looper_trainer.ppo.kl import kl_k1
from looper_trainer.ppo.losses import truncated_importance_weight
from looper_trainer.ppo.policy import Policy
from looper_trainer.ppo.ranks import Alone, Ranks


@dataclass(frozen=True)
class Measured:
    """The step's tokens under the policy that is about to be updated, and under the reference."""

    logprobs_BT: Tensor
    ref_logprobs_BT: Tensor
    entropy_BT: Tensor
    values_BT: Tensor


@dataclass(frozen=True)
class Experience:
    """What an update needs. `mask_BT` is True at real tokens of completions that have a score."""

    mask_BT: Tensor
    old_logprobs_BT: Tensor
    old_values_BT: Tensor
    advantages_BT: Tensor
    returns_BT: Tensor
    importance_BT: Tensor


@torch.no_grad()
def measure(
    policy: Policy,
    micro_batches: Sequence[MicroBatch],
    shape: tuple[int, int],
    ranks: Ranks | None = None,
    ref_logprobs_BT: Tensor | None = None,
) -> Measured:
    """Run policy, value function and reference over the step; `shape` is (B, T). Ranks share the work.

    The reference is left out where its logprobs are given.
    """
    ranks = ranks or Alone()
    measured = Measured(*(torch.zeros(shape, device=policy.device) for _ in range(4)))
    for batch in ranks.share(micro_batches):
        output = policy(batch)
        width = batch.completion_mask_nT.shape[1]
        measured.logprobs_BT[batch.rows_n, :width] = output.logprobs_nT
        measured.entropy_BT[batch.rows_n, :width] = output.entropy_nT
        measured.values_BT[batch.rows_n, :width] = output.values_nT
        if ref_logprobs_BT is None:
            measured.ref_logprobs_BT[batch.rows_n, :width] = policy.ref_logprobs(batch)
    ranks.sum_((measured.logprobs_BT, measured.ref_logprobs_BT, measured.entropy_BT, measured.values_BT))
    return measured if ref_logprobs_BT is None else replace(measured, ref_logprobs_BT=ref_logprobs_BT)


@torch.no_grad()
def reference_gap(policy: Policy, rows: Sequence[Row], ref_logprobs_BT: Tensor, row: int) -> float:
    """How far the sampler's reference is from the policy's own: mean distance of the logprobs of one
    completion, `rows[row]`, in nats a token."""
    batch = micro_batch(rows, [[row]], policy.device)
    own_1T = policy.ref_logprobs(batch)
    return float((own_1T - ref_logprobs_BT[[row], : own_1T.shape[1]])[batch.completion_mask_nT].abs().mean())


def assess(
    measured: Measured,
    scores_B: Sequence[float | None],
    completion_mask_BT: Tensor,
    sampler_logprobs_BT: Tensor,
    kl_coef: float,
    config: PPOConfig,
) -> Experience:
    """Scores to token rewards, advantages and returns. A completion whose score is None takes no part."""
    device = completion_mask_BT.device
    scored_B = torch.tensor([score is not None for score in scores_B], device=device)
    known_scores_B = torch.tensor([score or 0.0 for score in scores_B], device=device)
    mask_BT = completion_mask_BT & scored_B[:, None]
    kl_BT = kl_k1(measured.logprobs_BT, measured.ref_logprobs_BT)
    rewards_BT = token_rewards(known_scores_B, kl_BT, mask_BT, kl_coef)
    whitened = config.whiten_advantages
    if config.advantages == "gae":
        advantages_BT, returns_BT = gae(rewards_BT, measured.values_BT, mask_BT, config.gamma, config.lam)
    else:  # rewards to come, less what the question's other completions got; the critic has no say
        returns_BT, _ = gae(rewards_BT, torch.zeros_like(rewards_BT), mask_BT, config.gamma, lam=1.0)
        k = config.samples_per_question
        unequal_B = in_unequal_group(known_scores_B, k)
        advantages_BT = returns_BT - leave_one_out(known_scores_B, k)[:, None]
        if config.advantages == "group_normalised":
            # The scores' part alone: over the spread of equal scores, a floor, the penalty would be a force.
            penalties_BT, _ = gae(
                token_rewards(torch.zeros_like(known_scores_B), kl_BT, mask_BT, kl_coef),
                torch.zeros_like(rewards_BT), mask_BT, config.gamma, lam=1.0,
            )  # fmt: skip
            spread_B1 = group_spread(known_scores_B, k)[:, None]
            of_scores_BT = (advantages_BT - penalties_BT) / spread_B1
            advantages_BT = of_scores_BT.masked_fill(~unequal_B[:, None], 0.0) + penalties_BT
        advantages_BT = advantages_BT.masked_fill(~mask_BT, 0.0)
        # Where no question tells its completions apart, whitening would make a force of the penalty too.
        whitened = whitened and bool(unequal_B.any())
    return Experience(
        mask_BT=mask_BT,
        old_logprobs_BT=measured.logprobs_BT,
        old_values_BT=measured.values_BT,
        advantages_BT=whiten(advantages_BT, mask_BT) if whitened else advantages_BT,
        returns_BT=returns_BT,
        importance_BT=truncated_importance_weight(
            measured.logprobs_BT, sampler_logprobs_BT, config.importance_weight_cap
        ),
    )

"""The optimizer and the PPO epochs over one step's experience."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from looper_trainer.errors import UserError
from looper_trainer.ppo.batch import MicroBatch
from looper_trainer.ppo.config import PPOConfig
from looper_trainer.ppo.experience import Experience
from looper_trainer.ppo.kl import kl_k1, kl_k3
from looper_trainer.ppo.losses import clipped_policy_loss, clipped_value_loss
from looper_trainer.ppo.policy import Policy
from looper_trainer.ppo.ranks import Alone, Ranks, sum_gradients

MiniBatch = Sequence[MicroBatch]


def make_optimizer(policy: Policy, config: PPOConfig) -> torch.optim.AdamW:
    """AdamW with one group for the adapter and one for the value head."""
    return torch.optim.AdamW(
        [
            {"params": policy.adapter_parameters(), "lr": config.learning_rate},
            {"params": list(policy.value_head.parameters()), "lr": config.value_learning_rate},
        ],
        weight_decay=config.weight_decay,
    )


def set_learning_rates(optimizer: torch.optim.Optimizer, config: PPOConfig, step: int) -> None:
    """Linear warm-up over the first `warmup_steps` steps (counted from 1), then constant or linear decay."""
    share = min(1.0, step / (config.warmup_steps + 1))
    if config.decay_steps and step > config.warmup_steps:
        gone = min(1.0, (step - config.warmup_steps) / (config.decay_steps - config.warmup_steps))
        share = 1.0 - (1.0 - config.decay_to) * gone
    for group, rate in zip(
        optimizer.param_groups, (config.learning_rate, config.value_learning_rate), strict=True
    ):
        group["lr"] = rate * share


_TALLIED = (
    "policy_loss",
    "value_loss",
    "clip_fraction",
    "value_clip_fraction",
    "update_kl_k1",
    "update_kl_k3",
    "ratio_mean",
)


class _Tally:
    """Sums and extremes over the tokens that updates went through."""

    def __init__(self) -> None:
        self.tokens = 0
        self.sums: defaultdict[str, float] = defaultdict(float)
        self.ratio_min, self.ratio_max = float("inf"), float("-inf")

    def add(self, mask_nT: Tensor, ratio_nT: Tensor, **per_token: Tensor) -> None:
        self.tokens += int(mask_nT.sum())
        for name, x_nT in per_token.items():
            self.sums[name] += float(x_nT.detach()[mask_nT].double().sum())
        if mask_nT.any():
            ratio_N = ratio_nT.detach()[mask_nT]
            self.sums["ratio_mean"] += float(ratio_N.double().sum())
            self.ratio_min = min(self.ratio_min, float(ratio_N.min()))
            self.ratio_max = max(self.ratio_max, float(ratio_N.max()))

    def take(self, other: _Tally) -> None:
        """Add what `other` has counted."""
        self.tokens += other.tokens
        for name, total in other.sums.items():
            self.sums[name] += total
        self.ratio_min = min(self.ratio_min, other.ratio_min)
        self.ratio_max = max(self.ratio_max, other.ratio_max)

    def combine(self, ranks: Ranks, device: torch.device) -> None:
        """Add what the other ranks have counted."""
        if ranks.size == 1:
            return
        counts = torch.tensor(
            [self.tokens, *(self.sums[name] for name in _TALLIED)], dtype=torch.float64, device=device
        )
        extremes = torch.zeros(2, ranks.size, dtype=torch.float64, device=device)
        extremes[0, ranks.rank] = min(self.ratio_min, 1e30)
        extremes[1, ranks.rank] = max(self.ratio_max, -1e30)
        ranks.sum_((counts, extremes))
        self.tokens = int(counts[0])
        self.sums.update(zip(_TALLIED, counts[1:].tolist(), strict=True))
        self.ratio_min, self.ratio_max = float(extremes[0].min()), float(extremes[1].max())

    def means(self) -> dict[str, float]:
        found = {name: total / max(self.tokens, 1) for name, total in self.sums.items()}
        if self.tokens:
            found |= {"ratio_min": self.ratio_min, "ratio_max": self.ratio_max}
        return found


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    minibatches: Sequence[MiniBatch],
    experience: Experience,
    config: PPOConfig,
    rng: random.Random,
    train_policy: bool = True,
    ranks: Ranks | None = None,
) -> dict[str, float]:
    """Go `ppo_epochs` times over the minibatches; one optimizer step for each. Returns token means.

    Before its optimizer step a minibatch is asked how far the policy has moved (k3 of the new against the
    old policy, nats a token); beyond `target_kl` the rest of the update is left out. With `train_policy`
    False only the value head learns. Several ranks share each minibatch and take the same steps.

    Raises:
        UserError: a gradient is not finite.
    """
    ranks = ranks or Alone()
    tally = _Tally()
    first: dict[str, float] = {}
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    last_kl, steps, grad_norms = 0.0, 0, [0.0, 0.0]
    stopped = False
    with policy.updating():
        for epoch in range(config.ppo_epochs):
            for minibatch in minibatches if epoch == 0 else rng.sample(minibatches, len(minibatches)):
                of_minibatch = _Tally()
                optimizer.zero_grad(set_to_none=True)
                mine = ranks.share(minibatch)
                _accumulate_gradients(policy, minibatch, mine, experience, config, train_policy, of_minibatch)
                of_minibatch.combine(ranks, policy.device)
                tally.take(of_minibatch)
                if of_minibatch.tokens == 0:
                    continue
                sum_gradients(ranks, trained if train_policy else policy.value_head.parameters())
                means = of_minibatch.means()
                if not first:
                    first = {"first_ratio_min": means["ratio_min"], "first_ratio_max": means["ratio_max"]}
                last_kl = means["update_kl_k3"]
                if last_kl > config.target_kl:
                    stopped = True
                    break
                norms = [
                    float(torch.nn.utils.clip_grad_norm_(group["params"], config.max_grad_norm))
                    for group in optimizer.param_groups
                ]
                if not all(map(_is_finite, norms)):
                    raise UserError(
                        "a gradient is not finite; lower learning_rate or value_learning_rate and go on with "
                        "--resume"
                    )
                grad_norms = [total + norm for total, norm in zip(grad_norms, norms, strict=True)]
                optimizer.step()
                steps += 1
            if stopped:
                break
    optimizer.zero_grad(set_to_none=True)
    return {
        **tally.means(),
        **first,
        "update_kl_last": last_kl,
        "optimizer_steps": float(steps),
        "stopped_early": float(stopped),
        "grad_norm_adapter": grad_norms[0] / max(steps, 1),
        "grad_norm_value_head": grad_norms[1] / max(steps, 1),
    }


def _is_finite(x: float) -> bool:
    return x == x and abs(x) != float("inf")


def _accumulate_gradients(
    policy: Policy,
    minibatch: MiniBatch,
    mine: MiniBatch,
    experience: Experience,
    config: PPOConfig,
    train_policy: bool,
    tally: _Tally,
) -> None:
    """Gradients of the minibatch's loss: a mean over its real tokens, whatever its micro-batches.

    Those of `mine` only are added up here, as parts of that mean.
    """
    tokens = sum(int(_scored(batch, experience).sum()) for batch in minibatch)
    for batch in mine:
        mask_nT = _scored(batch, experience)
        if not mask_nT.any():
            continue
        width = mask_nT.shape[1]
        old_logprobs_nT = experience.old_logprobs_BT[batch.rows_n, :width]
        if train_policy:
            output = policy(batch, with_entropy_gradient=config.entropy_coef > 0)
            logprobs_nT, entropy_nT, values_nT = output
        else:
            logprobs_nT, entropy_nT = old_logprobs_nT, torch.zeros_like(old_logprobs_nT)
            values_nT = policy.values(batch)
        policy_loss_nT, ratio_nT, clipped_nT = clipped_policy_loss(
            logprobs_nT, old_logprobs_nT, experience.advantages_BT[batch.rows_n, :width], config.clip_range
        )
        value_loss_nT, value_clipped_nT = clipped_value_loss(
            values_nT,
            experience.old_values_BT[batch.rows_n, :width],
            experience.returns_BT[batch.rows_n, :width],
            config.value_clip_range,
        )
        weighted_nT = policy_loss_nT * experience.importance_BT[batch.rows_n, :width]
        loss_nT = weighted_nT + config.vf_coef * value_loss_nT - config.entropy_coef * entropy_nT
        (loss_nT.masked_fill(~mask_nT, 0.0).sum() / tokens).backward()
        tally.add(
            mask_nT,
            ratio_nT,
            policy_loss=weighted_nT,
            value_loss=value_loss_nT,
            clip_fraction=clipped_nT.float(),
            value_clip_fraction=value_clipped_nT.float(),
            update_kl_k1=kl_k1(old_logprobs_nT, logprobs_nT),
            update_kl_k3=kl_k3(old_logprobs_nT, logprobs_nT),
        )


def _scored(batch: MicroBatch, experience: Experience) -> Tensor:
    """True (n, T) at the batch's real tokens that have a score."""
    return experience.mask_BT[batch.rows_n, : batch.completion_mask_nT.shape[1]]

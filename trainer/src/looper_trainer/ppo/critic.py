"""Critic warm-up: fit the value head to rollouts scored earlier, before the policy moves (arXiv:2503.01491).

The trunk is the policy that begins the run, whose KL to its reference is zero, so a completion's return is
its discounted score alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from looper_schemas.prompt import format_prompt
from looper_schemas.records import RolloutRecord
from looper_trainer.errors import DataError
from looper_trainer.ppo.batch import Row, plan_micro_batches
from looper_trainer.ppo.config import PPOConfig
from looper_trainer.ppo.gae import gae, masked_mean, token_rewards
from looper_trainer.ppo.policy import Policy
from looper_trainer.sampling.base import Sampler


def warm_up_critic(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[Row],
    scores: Sequence[float],
    config: PPOConfig,
) -> list[float]:
    """`critic_warmup_steps` optimizer steps of the value head on `rows` with their `scores`.

    Returns the mean squared error before each.
    """
    rng = random.Random(f"{config.seed}/critic")
    size = min(len(rows), config.batch_size * config.samples_per_question)
    errors = []
    for _ in range(config.critic_warmup_steps):
        optimizer.zero_grad(set_to_none=True)
        batches = plan_micro_batches(
            rows, rng.sample(range(len(rows)), size), config.micro_batch_tokens, policy.device
        )
        tokens = sum(int(batch.completion_mask_nT.sum()) for batch in batches)
        error = 0.0
        for batch in batches:
            mask_nT = batch.completion_mask_nT
            scores_n = torch.tensor([scores[i] for i in batch.rows_n.tolist()], device=policy.device)
            zeros_nT = torch.zeros(mask_nT.shape, device=policy.device)
            rewards_nT = token_rewards(scores_n, zeros_nT, mask_nT, kl_coef=0.0)
            _, returns_nT = gae(rewards_nT, zeros_nT, mask_nT, config.gamma, lam=1.0)
            squared_nT = (policy.values(batch) - returns_nT) ** 2
            share = int(mask_nT.sum()) / tokens
            loss = masked_mean(squared_nT, mask_nT) * share
            torch.autograd.backward(loss)
            error += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(policy.value_head.parameters(), config.max_grad_norm)
        optimizer.step()
        errors.append(error)
    optimizer.zero_grad(set_to_none=True)
    return errors


def scored_rows(
    rollouts: Sequence[RolloutRecord], sampler: Sampler, config: PPOConfig, eos_id: int | None = None
) -> tuple[list[Row], list[float]]:
    """Every scored trajectory of `rollouts` as a row, and its score.

    One that came to its end gets `eos_id`, the token that PPO's own completions are scored at, as its last.

    Raises:
        DataError: no scored trajectory, or rewards of another mode.
    """
    rows, scores = [], []
    for record in rollouts:
        if record.reward_mode not in (None, config.reward_mode):
            raise DataError(
                f"{config.rollouts_file}: rewards of mode {record.reward_mode} cannot warm up a critic for "
                f"{config.reward_mode}; set critic_warmup_steps to 0 or score the rollouts again"
            )
        prompt = format_prompt(record.question)
        prompt_ids = sampler.encode(prompt)
        for trajectory in record.trajectories:
            # The prompt alone may end in a token that the joint text does not: split where they part.
            ids = sampler.encode(prompt + trajectory.output)
            start = next(
                (i for i, (a, b) in enumerate(zip(prompt_ids, ids, strict=False)) if a != b), len(prompt_ids)
            )
            end = [eos_id] if trajectory.finish_reason == "stop" and eos_id is not None else []
            completion = [*ids[start:], *end][: config.max_new_tokens]
            if trajectory.reward is not None and start and completion:
                rows.append(Row(ids[:start], completion, [0.0] * len(completion)))
                scores.append(trajectory.reward)
    if not rows:
        raise DataError(f"{config.rollouts_file}: holds no scored trajectory; score the rollouts again")
    return rows, scores

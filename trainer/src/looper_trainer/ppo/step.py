"""One PPO step, top to bottom: sample, score, rewards, advantages, update, figures.

Weights change only once every score of the step is in, so that a step that fails is repeated whole.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from looper_schemas.scoring import FailedQuestion
from looper_trainer.errors import RewardError
from looper_trainer.ppo.batch import MicroBatch, Row, completion_mask, plan_micro_batches, sampler_logprobs
from looper_trainer.ppo.checkpoint import TrainState
from looper_trainer.ppo.config import PPOConfig
from looper_trainer.ppo.data import Data
from looper_trainer.ppo.experience import assess, measure
from looper_trainer.ppo.kl import AdaptiveKL, FixedKL, KLController
from looper_trainer.ppo.log import RunLog, Stopwatch
from looper_trainer.ppo.metrics import sample_metrics, score_metrics, token_metrics
from looper_trainer.ppo.policy import Policy
from looper_trainer.ppo.publish import require_version
from looper_trainer.ppo.rollout import (
    StreamingSampler,
    arm_rewards,
    questions_of_step,
    sample_groups,
    to_record,
    to_rows,
)
from looper_trainer.ppo.scoring import Results, Scorer, StepScores
from looper_trainer.ppo.update import set_learning_rates, update
from looper_trainer.reward_client import as_question
from looper_trainer.sampling.base import Sampler, SamplingParams

# Below this share of scored questions a step is never trained on, whatever `on_unscored` says.
SCORED_SHARE_NEEDED = 0.9


def train_step(
    state: TrainState,
    config: PPOConfig,
    data: Data,
    policy: Policy,
    sampler: Sampler,
    scorer: Scorer,
    optimizer: torch.optim.Optimizer,
    log: RunLog,
) -> dict[str, Any]:
    """One PPO step from `state`; returns its metrics. Weights change only after every score is in."""
    step, watch = state.step + 1, Stopwatch()
    rng = random.Random(f"{config.seed}/step/{step}")

    # 1. Sample k completions of each question; each is sent to be scored as soon as they are in.
    problems = questions_of_step(data.train, step, config.batch_size, config.seed)
    params = SamplingParams(config.max_new_tokens, config.temperature, top_p=1.0)
    require_version(sampler, state.step)
    streams = isinstance(sampler, StreamingSampler)
    scores = StepScores(scorer, step, config.score_chunk if streams else 0, config.score_connections)
    with watch.part("sample"), policy.precision():
        by_id = {}
        try:
            k = config.samples_per_question
            for group in sample_groups(sampler, problems, params, k, step, config.seed):
                by_id[group.problem.id] = group
                scores.add(as_question(group.problem, group.completions))
        finally:
            scores.close()
    groups = [by_id[problem.id] for problem in problems]
    rows = to_rows(groups)
    mask_BT = completion_mask(rows, policy.device)
    sampler_logprobs_BT = sampler_logprobs(rows, policy.device)

    # 2. While the last scores are on their way, measure logprobs, reference logprobs and values.
    with watch.part("logprobs"):
        minibatches = cut_minibatches(rows, config, rng, policy.device)
        micro_batches = [batch for minibatch in minibatches for batch in minibatch]
        measured = measure(policy, micro_batches, (mask_BT.shape[0], mask_BT.shape[1]))
    with watch.part("score_wait"):
        results = scores.results([problem.id for problem in problems])
    made_by = (_version(config, state), state.scorer_id, config.reward_mode, config.seeded)
    log.trajectories(step, [to_record(group, results[group.problem.id], *made_by) for group in groups])
    _require_scores(results, config)

    # 3. Scores -> token rewards -> advantages and returns.
    scores_B = [reward for group in groups for reward in arm_rewards(group, results[group.problem.id])]
    experience = assess(measured, scores_B, mask_BT, sampler_logprobs_BT, state.kl_coef, config)
    figures = token_metrics(measured, experience, sampler_logprobs_BT, config.importance_weight_cap)

    # 4. Update policy and critic; without rollouts to warm it up on, the critic first learns alone.
    alone = not data.rollouts and step <= config.critic_warmup_steps
    set_learning_rates(optimizer, config, step)
    with watch.part("update"):
        updated = update(policy, optimizer, minibatches, experience, config, rng, train_policy=not alone)
    controller = _controller(config, state.kl_coef)
    controller.update(figures["kl_k1_per_completion"])

    return {
        "step": step,
        "policy_version": state.step,
        "scorer_id": state.scorer_id,
        "critic_only": alone,
        **sample_metrics(groups),
        **score_metrics(groups, results),
        **figures,
        **updated,
        "kl_coef": state.kl_coef,
        "next_kl_coef": controller.coef,
        "learning_rate": optimizer.param_groups[0]["lr"],
        "seconds": watch.rounded(),
    }


def cut_minibatches(
    rows: Sequence[Row], config: PPOConfig, rng: random.Random, device: torch.device | str
) -> list[list[MicroBatch]]:
    """Random questions to each minibatch, all completions of a question together; then micro-batches."""
    k = config.samples_per_question
    order = rng.sample(range(len(rows) // k), len(rows) // k)
    size = config.questions_per_update
    return [
        plan_micro_batches(
            rows,
            [question * k + j for question in order[start : start + size] for j in range(k)],
            config.micro_batch_tokens,
            device,
        )
        for start in range(0, len(order), size)
    ]


def _require_scores(results: Results, config: PPOConfig) -> None:
    """Refuse to train on a step with missing scores, unless dropping a few was asked for."""
    failed = [result for result in results.values() if isinstance(result, FailedQuestion)]
    share = 1 - len(failed) / len(results)
    if not failed or (config.on_unscored == "drop" and share >= SCORED_SHARE_NEEDED):
        return
    codes = ", ".join(sorted({result.error.code.value for result in failed}))
    hint = "" if config.on_unscored == "drop" else ", or drop a few of them with --on-unscored drop"
    raise RewardError(f"{len(failed)} of {len(results)} questions have no score ({codes}){hint}")


def _controller(config: PPOConfig, coef: float) -> KLController:
    return FixedKL(coef) if config.kl_controller == "fixed" else AdaptiveKL(coef, config.adaptive_kl_target)


def _version(config: PPOConfig, state: TrainState) -> str:
    return f"{config.run_name}@{state.step}"

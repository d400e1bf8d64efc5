"""One PPO step, top to bottom: sample, score, rewards, advantages, update, figures.

`collect` samples and sends; `learn` does the rest, on one process or several. Weights change only once every
score of the step is in, so that a step that fails is repeated whole.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from looper_schemas.scoring import FailedQuestion
from looper_trainer.errors import RewardError
from looper_trainer.groups import Group, arm_rewards, sample_groups, to_record, with_differences
from looper_trainer.ppo.batch import (
    MicroBatch,
    Row,
    completion_mask,
    plan_micro_batches,
    reference_logprobs,
    sampler_logprobs,
)
from looper_trainer.ppo.checkpoint import TrainState
from looper_trainer.ppo.config import PPOConfig
from looper_trainer.ppo.data import Data
from looper_trainer.ppo.experience import assess, measure, reference_gap
from looper_trainer.ppo.kl import AdaptiveKL, FixedKL, KLController
from looper_trainer.ppo.log import RunLog, Stopwatch
from looper_trainer.ppo.metrics import sample_metrics, score_metrics, token_metrics
from looper_trainer.ppo.policy import Policy
from looper_trainer.ppo.publish import hand_to_trainer, require_version
from looper_trainer.ppo.ranks import Alone, Ranks
from looper_trainer.ppo.rollout import completion_seed, questions_of_step, to_rows
from looper_trainer.ppo.scoring import Results, Scorer, StepScores
from looper_trainer.ppo.update import set_learning_rates, update
from looper_trainer.reward_client import as_question
from looper_trainer.sampling.base import Sampler, SamplingParams, StreamingSampler

# Below this share of scored questions a step is never trained on, whatever `on_unscored` says.
SCORED_SHARE_NEEDED = 0.9

# Nats a token, in the mean of one completion. Two engines in bfloat16 were .37 apart on the worst of a step's
# 65,536 tokens (benchmarks/results/step_8b.json).
LARGE_REFERENCE_GAP = 0.3


@dataclass(frozen=True)
class Samples:
    """What rank 0 has of a step before it is learnt from; its scores may still be on their way."""

    step: int
    version: int
    groups: Sequence[Group]
    scores: StepScores
    seconds: Mapping[str, float]


def collect(
    step: int, version: int, config: PPOConfig, data: Data, policy: Policy, sampler: Sampler, scorer: Scorer
) -> Samples:
    """Sample the completions of `step` from the policy of `version`; each question is sent to be scored
    as soon as its completions are in."""
    watch = Stopwatch()
    problems = questions_of_step(data.train, step, config.batch_size, config.seed, config.curriculum_steps)
    params = SamplingParams(
        config.max_new_tokens, config.temperature, top_p=1.0, with_reference=config.reference_on_sampler
    )
    require_version(sampler, version)
    streams = isinstance(sampler, StreamingSampler)
    scores = StepScores(scorer, step, config.score_chunk if streams else 0, config.score_connections)
    by_id = {}
    with watch.part("sample"), policy.precision():
        try:
            k = config.samples_per_question
            seed_of = partial(completion_seed, config.seed, step)
            for group in sample_groups(sampler, problems, params, k, seed_of):
                by_id[group.problem.id] = group
                scores.add(as_question(group.problem, group.completions))
                _ = group.answers  # read while the others are sampled
        finally:
            scores.close()
    with watch.part("hand_over"):
        hand_to_trainer(policy, sampler, config)
    return Samples(step, version, [by_id[problem.id] for problem in problems], scores, watch.rounded())


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
    """One PPO step from `state` in one process; returns its metrics."""
    samples = collect(state.step + 1, state.step, config, data, policy, sampler, scorer)
    return learn(samples, state, config, data, policy, optimizer, log)


def learn(
    samples: Samples | None,
    state: TrainState,
    config: PPOConfig,
    data: Data,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    log: RunLog,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Learn from `samples`, which rank 0 has; returns the step's metrics."""
    step, watch = state.step + 1, Stopwatch()
    ranks = ranks or Alone()
    rng = random.Random(f"{config.seed}/step/{step}")
    groups = ranks.from_first(lambda: _here(samples).groups)

    def wait_for_scores() -> Results:
        with watch.part("score_wait"):
            return ranks.from_first(
                lambda: _here(samples).scores.results([group.problem.id for group in groups])
            )

    results = wait_for_scores() if config.skip_equal_groups else None
    used = groups if results is None else with_differences(groups, results)
    rows = to_rows(used)
    mask_BT = completion_mask(rows, policy.device)
    sampler_logprobs_BT = sampler_logprobs(rows, policy.device)

    # 1. While the last scores are on their way (unless they say what is learnt from), measure logprobs,
    # reference logprobs and values.
    with watch.part("logprobs"):
        minibatches = cut_minibatches(rows, config, rng, policy.device, ranks.size)
        micro_batches = [batch for minibatch in minibatches for batch in minibatch]
        given = reference_logprobs(rows, policy.device)
        measured = measure(policy, micro_batches, (mask_BT.shape[0], mask_BT.shape[1]), ranks, given)
        gap = None if given is None else reference_gap(policy, rows, given, step % len(rows))
    if gap is not None and gap > LARGE_REFERENCE_GAP:
        log.say(
            f"warning: the sampler's logprobs of the reference are {gap:.2f} nats a token from those here: "
            "does its server hold the same base model, and, if it is given by URL, was it started with "
            "--lora-target-modules?"
        )

    # 2. The scores, recorded before they are judged to be enough.
    results = wait_for_scores() if results is None else results

    def record() -> None:
        made_by = (
            _version(config, _here(samples).version),
            state.scorer_id,
            config.reward_mode,
            config.seeded,
        )
        log.trajectories(step, [to_record(group, results[group.problem.id], *made_by) for group in groups])
        _require_scores(results, config)

    with watch.part("record"):
        ranks.on_first(record)

    # 3. Scores -> token rewards -> advantages and returns.
    scores_B = [reward for group in used for reward in arm_rewards(group, results[group.problem.id])]
    experience = assess(measured, scores_B, mask_BT, sampler_logprobs_BT, state.kl_coef, config)
    figures = token_metrics(measured, experience, sampler_logprobs_BT, config.importance_weight_cap)

    # 4. Update policy and critic; without rollouts to warm it up on, the critic first learns alone.
    alone = not data.rollouts and step <= config.critic_warmup_steps
    set_learning_rates(optimizer, config, step)
    with watch.part("update"):
        updated = update(policy, optimizer, minibatches, experience, config, rng, not alone, ranks)
    controller = _controller(config, state.kl_coef)
    controller.update(figures["kl_k1_per_completion"])

    return {
        "step": step,
        "policy_version": state.step if samples is None else samples.version,
        "scorer_id": state.scorer_id,
        "critic_only": alone,
        "questions_learnt_from": len(used),
        **sample_metrics(groups),
        **score_metrics(groups, results),
        **figures,
        "reference_gap": gap,
        **updated,
        "kl_coef": state.kl_coef,
        "next_kl_coef": controller.coef,
        "learning_rate": optimizer.param_groups[0]["lr"],
        "seconds": dict(samples.seconds if samples else {}) | watch.rounded(),
    }


def _here(samples: Samples | None) -> Samples:
    if samples is None:
        raise RuntimeError("rank 0 alone has samples")
    return samples


def cut_minibatches(
    rows: Sequence[Row],
    config: PPOConfig,
    rng: random.Random,
    device: torch.device | str,
    processes: int = 1,
) -> list[list[MicroBatch]]:
    """Random questions to each minibatch, all completions of a question together; then micro-batches.

    As few minibatches as `questions_per_update` allows, of equal size or one question more. Each is cut so
    that `processes` get even shares of it.
    """
    k = config.samples_per_question
    order = rng.sample(range(len(rows) // k), len(rows) // k)
    parts = -(-len(order) // config.questions_per_update)
    ends = [len(order) * part // parts for part in range(parts + 1)]
    return [
        plan_micro_batches(
            rows,
            [question * k + j for question in order[start:end] for j in range(k)],
            config.micro_batch_tokens,
            device,
            processes,
        )
        for start, end in pairwise(ends)
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


def _version(config: PPOConfig, version: int) -> str:
    return f"{config.run_name}@{version}"

"""`looper ppo`, top to bottom: step after step (see `step`), log, evaluate, save, and the result.

Proximal Policy Optimization, arXiv:1707.06347, for language models with a KL penalty to a reference policy
(arXiv:1909.08593), with these departures: the score comes over HTTP, grouped by question, and a score that
is missing is never a zero; one trunk carries policy, reference and value function; tokens are weighted by
a truncated importance weight for the sampler's own rounding.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from looper_trainer.config import save_resolved
from looper_trainer.errors import ConfigError, RewardError
from looper_trainer.models import merge_adapter
from looper_trainer.ppo.checkpoint import (
    TrainState,
    export,
    latest_checkpoint,
    load_checkpoint,
    read_state,
    save_checkpoint,
    step_folder,
)
from looper_trainer.ppo.config import PPOConfig
from looper_trainer.ppo.critic import warm_up_critic
from looper_trainer.ppo.data import Data, read_data
from looper_trainer.ppo.log import RunLog, Stopwatch
from looper_trainer.ppo.policy import Policy
from looper_trainer.ppo.publish import publish
from looper_trainer.ppo.rollout import (
    greedy_accuracy,
)
from looper_trainer.ppo.scoring import Scorer
from looper_trainer.ppo.step import train_step
from looper_trainer.ppo.update import make_optimizer
from looper_trainer.reward_client import RewardClient
from looper_trainer.sampling.base import Sampler
from looper_trainer.sampling.vllm import SamplerError, VLLMSampler


def run(config: PPOConfig) -> None:
    """Train as `config` says, with the reward service that the environment names.

    Raises:
        UserError: bad input, or a reward service that stays away; progress is saved and `--resume` goes on.
    """
    data = read_data(config)
    scorer_id = _scorer_of_run(config)
    with RewardClient.from_environment(
        run_id=config.run_name,
        reward_mode=config.reward_mode,
        disclosure=config.disclosure,
        scorer_id=scorer_id,
        give_up_after_s=config.give_up_after_s,
    ) as client:
        client.info()  # a wrong URL or key should end the run before a model is loaded
        with policy_and_sampler(config) as (policy, sampler):
            train(config, data, policy, sampler, client)
    if config.merge and config.train == "lora":
        del policy, sampler
        merge_adapter(config.output / "adapter", config.output / "merged", config.model)


@contextmanager
def policy_and_sampler(config: PPOConfig) -> Iterator[tuple[Policy, Sampler]]:
    """Both, for as long as the run lasts. vLLM comes first: it measures the memory that it finds free."""
    from looper_trainer.sampling.merged import MergedSampler
    from looper_trainer.sampling.transformers import TransformersSampler

    if config.sampler == "transformers":
        policy, tokenizer = Policy.load(config)
        engine = MergedSampler if config.merged_sampling else TransformersSampler
        yield policy, engine(policy.model, tokenizer, batch_size=config.sample_batch_size)
        return
    full = config.train == "full"
    settings = config.vllm_settings(
        dtype=config.dtype,
        seed=config.seed,
        lora=not full,
        max_lora_rank=config.lora_rank,
        whole_weights=full,
    )
    with VLLMSampler(config.model, settings, folder=config.vllm_folder or config.output / "vllm") as sampler:
        policy, _ = Policy.load(config)
        yield policy, sampler


def train(config: PPOConfig, data: Data, policy: Policy, sampler: Sampler, scorer: Scorer) -> TrainState:
    """Train `policy` in place and leave the result in `config.output`.

    `sampler` must sample from `policy` itself, or be a `RemoteSampler`, which is given every new version.

    Raises:
        UserError: see `run`.
    """
    deadline = time.monotonic() + 60 * (config.max_minutes or float("inf"))
    optimizer = make_optimizer(policy, config)
    state = TrainState(step=0, kl_coef=config.kl_coef, scorer_id=scorer.info().scorer_id)
    if config.resume:
        state = load_checkpoint(latest_checkpoint(config.output), policy, optimizer, config)
    save_resolved(config, config.output)
    with RunLog(config.output, config.steps, state.step) as log:
        if not config.resume:
            if config.critic_warmup_steps and data.rollouts:
                errors = warm_up_critic(policy, optimizer, data.rollouts, sampler, config)
                log.say(f"critic warm-up: squared error {errors[0]:.3f} -> {errors[-1]:.3f}")
            publish(policy, sampler, state.step, _scratch(config))
            if data.dev:
                accuracy = greedy_accuracy(sampler, data.dev, config.max_new_tokens)
                state = replace(state, best_step=0, best_accuracy=accuracy)
                log.step({"step": 0, "policy_version": 0, "dev_accuracy": accuracy})
            save_checkpoint(state, policy, optimizer, config)
        else:
            publish(policy, sampler, state.step, _scratch(config))
        last = state.step == config.steps or _out_of_patience(state, config)
        while not last:
            watch = Stopwatch()
            try:
                metrics = train_step(state, config, data, policy, sampler, scorer, optimizer, log)
            except (RewardError, SamplerError) as error:
                if not step_folder(config.output, state.step).exists():
                    save_checkpoint(state, policy, optimizer, config)
                culprit = "reward service" if isinstance(error, RewardError) else "sampler"
                raise type(error)(
                    f"{error}; progress up to step {state.step} is saved in {config.output}: mend the "
                    f"{culprit} and go on with --resume"
                ) from error
            state = replace(state, step=state.step + 1, kl_coef=metrics["next_kl_coef"])
            improved = False
            with watch.part("sync"):
                publish(policy, sampler, state.step, _scratch(config))
            last = state.step == config.steps or time.monotonic() >= deadline
            if data.dev and (state.step % config.eval_every == 0 or last):
                with watch.part("eval"):
                    metrics["dev_accuracy"] = greedy_accuracy(sampler, data.dev, config.max_new_tokens)
                state, improved = _after_evaluation(state, metrics["dev_accuracy"])
            metrics["seconds"] |= watch.rounded() | {"whole": watch.elapsed()}
            log.step(metrics)
            last = last or _out_of_patience(state, config)
            if improved or last or state.step % config.save_every == 0:
                save_checkpoint(state, policy, optimizer, config)
        chosen = export(state, policy, config)
        what = "merged" if config.train == "full" else "adapter"
        log.say(f"wrote {config.output / what} from step {chosen}")
    return state


def _scratch(config: PPOConfig) -> Path:
    return (config.vllm_folder or config.output / "vllm") / "next"


def _after_evaluation(state: TrainState, accuracy: float) -> tuple[TrainState, bool]:
    """The state with this step's dev accuracy taken in, and whether it is the best so far."""
    if state.best_accuracy is None or accuracy > state.best_accuracy:
        return replace(state, best_step=state.step, best_accuracy=accuracy, stale_evaluations=0), True
    return replace(state, stale_evaluations=state.stale_evaluations + 1), False


def _out_of_patience(state: TrainState, config: PPOConfig) -> bool:
    return bool(config.patience) and state.stale_evaluations >= config.patience


def _scorer_of_run(config: PPOConfig) -> str | None:
    """The scorer that a resumed run is bound to; refuses to start a new run over an old one."""
    if config.resume:
        return read_state(latest_checkpoint(config.output), config).scorer_id
    if any(config.output.glob("checkpoints/step_*")):
        raise ConfigError(
            f"{config.output}: holds a PPO run; go on with --resume, or choose another --output"
        )
    return None


__all__ = ["policy_and_sampler", "run", "train"]

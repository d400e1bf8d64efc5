"""`looper ppo`, top to bottom: step after step (see `step`), log, evaluate, save, and the result.

Proximal Policy Optimization, arXiv:1707.06347, for language models with a KL penalty to a reference policy
(arXiv:1909.08593), with these departures: the score comes over HTTP, grouped by question, and a score that
is missing is never a zero; one trunk carries policy, reference and value function; tokens are weighted by
a truncated importance weight for the sampler's own rounding.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from looper_trainer.config import save_resolved
from looper_trainer.errors import CheckpointError, ConfigError, RewardError
from looper_trainer.folders import differing, written_alone
from looper_trainer.groups import longest_prompt, require_arms, require_window
from looper_trainer.models import merge_adapter
from looper_trainer.ppo.checkpoint import (
    TrainState,
    digest_inputs,
    export,
    latest_checkpoint,
    load_checkpoint,
    read_state,
    save_checkpoint,
    step_folder,
)
from looper_trainer.ppo.config import PPOConfig
from looper_trainer.ppo.critic import scored_rows, warm_up_critic
from looper_trainer.ppo.data import Data, read_data
from looper_trainer.ppo.log import RunLog, Stopwatch
from looper_trainer.ppo.metrics import collapses
from looper_trainer.ppo.plan import adapted_layers, check_fit, limit_trainer, make_plan, vllm_share
from looper_trainer.ppo.policy import Policy
from looper_trainer.ppo.ranks import Alone, Elsewhere, Ranks, join, leave
from looper_trainer.ppo.rollout import require_texts_fit
from looper_trainer.ppo.scoring import Scorer
from looper_trainer.ppo.source import Source
from looper_trainer.ppo.step import learn
from looper_trainer.ppo.update import make_optimizer
from looper_trainer.reward_client import RewardClient
from looper_trainer.sampling.base import Sampler
from looper_trainer.sampling.transformers import resolve_device
from looper_trainer.sampling.vllm import SamplerError, VLLMSampler


def run(config: PPOConfig) -> None:
    """Train as `config` says, with the reward service that the environment names.

    Under `accelerate launch` every process runs this; rank 0 alone samples, asks for scores and writes.

    Raises:
        UserError: bad input, or a reward service that stays away; progress is saved and `--resume` goes on.
    """
    began = time.monotonic()
    data = read_data(config)
    if config.dry_run:
        print(make_plan(config).describe(config, data.train))
        return
    resolve_device(config.device)
    ranks = join()
    with ExitStack() as alone:
        ranks.on_first(lambda: alone.enter_context(written_alone(config.output, config.output / ".lock")))
        _run(config, data, ranks, began)
    leave()


def _run(config: PPOConfig, data: Data, ranks: Ranks, began: float) -> None:
    inputs = ranks.from_first(lambda: digest_inputs(config))
    scorer_id = ranks.from_first(lambda: _scorer_of_run(config, inputs))
    check_fit(config)
    with ExitStack() as stack:
        # The other ranks' policies come after the sampler, which may measure the memory of their GPUs.
        here = ranks.on_first(lambda: _of_first_rank(config, scorer_id, stack))
        policy, sampler, scorer = here or (Policy.load(config)[0], Elsewhere(), Elsewhere())
        train(config, data, policy, sampler, scorer, ranks, began, inputs)
    if ranks.rank == 0 and config.merge and config.train == "lora":
        del here, policy, sampler
        print(f"merging the adapter into {config.output / 'merged'}", flush=True)
        merge_adapter(config.output / "adapter", config.output / "merged", config.model)


def _of_first_rank(
    config: PPOConfig, scorer_id: str | None, stack: ExitStack
) -> tuple[Policy, Sampler, Scorer]:
    """The policy, its sampler and the reward service's client, closed with `stack`."""
    client = stack.enter_context(
        RewardClient.from_environment(
            run_id=config.run_name,
            reward_mode=config.reward_mode,
            disclosure=config.disclosure,
            scorer_id=scorer_id,
            give_up_after_s=config.give_up_after_s,
        )
    )
    # A wrong URL or key should end the run before a model is loaded.
    require_arms(client.info(), config.samples_per_question)
    return *stack.enter_context(policy_and_sampler(config)), client


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
        sleep=config.vllm_sleep,
        nf4=config.quantize == "nf4",
        gpu_memory_utilization=vllm_share(config),
        lora_layers=adapted_layers(config) if config.reference_on_sampler else (),
        # vLLM gives a text's logprobs only with one more token.
        max_model_len=config.vllm_max_model_len and config.vllm_max_model_len + config.reference_on_sampler,
    )
    with VLLMSampler(config.model, settings, folder=config.vllm_folder or config.output / "vllm") as sampler:
        if config.vllm_sleep:
            sampler.sleep()
        limit_trainer(config)
        policy, _ = Policy.load(config)
        yield policy, sampler


def train(
    config: PPOConfig,
    data: Data,
    policy: Policy,
    sampler: Sampler,
    scorer: Scorer,
    ranks: Ranks | None = None,
    began: float | None = None,
    inputs: Mapping[str, str] | None = None,
) -> TrainState:
    """Train `policy` in place and leave the result in `config.output`.

    `sampler` must sample from `policy` itself, or be a `RemoteSampler`, which is given every new version.
    Both are used on rank 0 alone. `began` is when `max_minutes` began, by `time.monotonic`; now by default.
    `inputs` are what `digest_inputs` says, for the checkpoints.

    Raises:
        UserError: see `run`.
    """
    ranks = ranks or Alone()
    source = Source(config, data, policy, sampler, scorer)
    began = time.monotonic() if began is None else began
    deadline = began + 60 * (config.max_minutes or float("inf"))
    optimizer = make_optimizer(policy, config)
    scorer_id = ranks.from_first(lambda: source.scorer.info().scorer_id)
    state = TrainState(step=0, kl_coef=config.kl_coef, scorer_id=scorer_id)
    if config.resume:
        state = load_checkpoint(latest_checkpoint(config.output), policy, optimizer, config)
    state = replace(state, inputs=dict(inputs or {}))
    ranks.from_first(lambda: save_resolved(config, config.output))
    start = state.step if config.resume else None
    longest = ranks.from_first(lambda: longest_prompt(sampler, data.train))
    require_window(config.model, longest, config.max_new_tokens)
    require_texts_fit(policy.longest_text, longest, config)
    with RunLog(config.output, config.steps, start, silent=ranks.rank > 0) as log:
        if not config.resume:
            if config.critic_warmup_steps and data.rollouts:
                encoded = ranks.from_first(
                    lambda: scored_rows(data.rollouts, source.sampler, config, policy.eos_id)
                )
                log.say(
                    f"critic warm-up: {config.critic_warmup_steps} steps on {len(encoded[0])} trajectories"
                )
                errors = warm_up_critic(policy, optimizer, *encoded, config)
                log.say(f"critic warm-up: squared error {errors[0]:.3f} -> {errors[-1]:.3f}")
            ranks.from_first(partial(source.publish, state.step))
            if data.dev:
                log.say(f"step 0: answering {len(data.dev)} dev questions")
                found = ranks.from_first(partial(_evaluate, 0, source, log))
                state = replace(state, best_step=0, best_accuracy=found["dev_accuracy"])
                log.step({"step": 0, "policy_version": 0, **found})
            ranks.from_first(partial(save_checkpoint, state, policy, optimizer, config))
        else:
            ranks.from_first(partial(source.publish, state.step))
        last = state.step >= config.steps or _out_of_patience(state, config)
        judged = state  # with what the last evaluation says of the best checkpoint
        while not last:
            watch = Stopwatch()
            try:
                samples = ranks.on_first(partial(source.collect, state.step + 1))
                metrics = learn(samples, state, config, data, policy, optimizer, log, ranks)
            except (RewardError, SamplerError) as error:
                if not step_folder(config.output, state.step).exists():
                    save_checkpoint(state, policy, optimizer, config)
                culprit = "reward service" if isinstance(error, RewardError) else "sampler"
                raise type(error)(
                    f"{error}; progress up to step {state.step} is saved in {config.output}: mend the "
                    f"{culprit} and go on with --resume"
                ) from error
            state = replace(state, step=state.step + 1, kl_coef=metrics["next_kl_coef"])
            judged, improved = state, False
            with watch.part("sync"):
                ranks.from_first(partial(source.publish, state.step))
            late = ranks.from_first(lambda: time.monotonic() >= deadline)
            last = state.step >= config.steps or late
            if data.dev and (state.step % config.eval_every == 0 or last):
                with watch.part("eval"):
                    metrics |= ranks.from_first(partial(_evaluate, state.step, source, log))
                judged, improved = _after_evaluation(state, metrics["dev_accuracy"], config)
                # One that is there because time is up is for this result alone: the resumed run never had it.
                if state.step % config.eval_every == 0 or state.step >= config.steps:
                    state = judged
                if collapses([*log.history, metrics]):
                    metrics["collapse_alarm"] = True
                    log.say(
                        "warning: coherence has risen while dev accuracy fell, evaluation after evaluation: "
                        "the policy may be learning to agree instead of to be right"
                    )
            metrics["seconds"] |= watch.rounded()
            metrics["step_seconds"] = watch.elapsed()
            log.step(metrics)
            last = last or _out_of_patience(state, config)
            if improved or last or state.step % config.save_every == 0:
                ranks.from_first(partial(save_checkpoint, state, policy, optimizer, config))
        chosen = ranks.from_first(partial(export, judged, policy, config))
        if ranks.rank and chosen != state.step:
            policy.load_saved(step_folder(config.output, chosen))
        what = "merged" if config.train == "full" else "adapter"
        log.say(f"wrote {config.output / what} from step {chosen}")
    return judged


def _evaluate(step: int, source: Source, log: RunLog) -> dict[str, float]:
    samples = source.config.dev_samples
    return log.dev(step, source.dev_solved(), source.dev_in_samples() if samples else [], samples)


def _after_evaluation(state: TrainState, accuracy: float, config: PPOConfig) -> tuple[TrainState, bool]:
    """The state with this step's dev accuracy taken in, and whether it is the best so far.

    Patience is of the evaluations every `eval_every` steps: one more at a command's end is none of them.
    """
    improved = state.best_accuracy is None or accuracy > state.best_accuracy
    if improved:
        state = replace(state, best_step=state.step, best_accuracy=accuracy)
    if state.step % config.eval_every == 0:
        state = replace(state, stale_evaluations=0 if improved else state.stale_evaluations + 1)
    return state, improved


def _out_of_patience(state: TrainState, config: PPOConfig) -> bool:
    return bool(config.patience) and state.stale_evaluations >= config.patience


def _scorer_of_run(config: PPOConfig, inputs: Mapping[str, str]) -> str | None:
    """The scorer that a resumed run is bound to; refuses to start a new run over an old one."""
    if config.resume:
        folder = latest_checkpoint(config.output)
        state = read_state(folder, config)
        # An earlier version kept no digests.
        if state.inputs and (changed := differing(state.inputs, inputs)):
            raise CheckpointError(
                f"{folder}: was made when {changed} held something else; restore that, or start a new run in "
                "another output folder"
            )
        return state.scorer_id
    if config.output.resolve() == Path(config.model).resolve():
        raise ConfigError(f"{config.output}: holds the model that is trained; choose another --output")
    if any(config.output.glob("checkpoints/step_*")):
        raise ConfigError(
            f"{config.output}: holds a PPO run; go on with --resume, or choose another --output"
        )
    return None


__all__ = ["policy_and_sampler", "run", "train"]

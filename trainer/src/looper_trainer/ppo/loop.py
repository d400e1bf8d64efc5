"""`looper ppo`, top to bottom: sample, score, rewards, advantages, update, log, evaluate, save.

Proximal Policy Optimization, arXiv:1707.06347, for language models with a KL penalty to a reference policy
(arXiv:1909.08593), with these departures: the score comes over HTTP, grouped by question, and a score that
is missing is never a zero; one trunk carries policy, reference and value function; tokens are weighted by
a truncated importance weight for the sampler's own rounding.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from looper_schemas.records import Problem, RecordError, RecordT, RolloutRecord, read_records
from looper_schemas.scoring import FailedQuestion, Purpose, Question, ScoredQuestion, ServiceInfo
from looper_trainer.config import save_resolved
from looper_trainer.errors import ConfigError, DataError, RewardError
from looper_trainer.models import merge_adapter
from looper_trainer.ppo.batch import MicroBatch, Row, completion_mask, plan_micro_batches, sampler_logprobs
from looper_trainer.ppo.checkpoint import (
    TrainState,
    export,
    latest_checkpoint,
    load_checkpoint,
    load_policy,
    read_state,
    save_checkpoint,
    step_folder,
)
from looper_trainer.ppo.config import PPOConfig
from looper_trainer.ppo.critic import warm_up_critic
from looper_trainer.ppo.experience import assess, measure
from looper_trainer.ppo.kl import AdaptiveKL, FixedKL, KLController
from looper_trainer.ppo.log import RunLog, Stopwatch
from looper_trainer.ppo.metrics import sample_metrics, score_metrics, token_metrics
from looper_trainer.ppo.policy import Policy
from looper_trainer.ppo.rollout import (
    arm_rewards,
    greedy_accuracy,
    questions_of_step,
    sample_groups,
    solvable,
    to_question,
    to_record,
    to_rows,
)
from looper_trainer.ppo.update import make_optimizer, set_learning_rates, update
from looper_trainer.sampling.base import Sampler, SamplingParams

# Below this share of scored questions a step is never trained on, whatever `on_unscored` says.
SCORED_SHARE_NEEDED = 0.9

Results = Mapping[str, ScoredQuestion | FailedQuestion]


class Scorer(Protocol):
    """The part of `RewardClient` that training needs."""

    def info(self) -> ServiceInfo: ...

    def score(self, questions: Sequence[Question], *, step: int, purpose: Purpose) -> Results: ...


@dataclass(frozen=True)
class Data:
    """Questions to train on, questions to evaluate on, and earlier rollouts where there are any."""

    train: Sequence[Problem]
    dev: Sequence[Problem]
    rollouts: Sequence[RolloutRecord]


def run(config: PPOConfig) -> None:
    """Train as `config` says, with the reward service that the environment names.

    Raises:
        UserError: bad input, or a reward service that stays away; progress is saved and `--resume` goes on.
    """
    from looper_trainer.reward_client import RewardClient
    from looper_trainer.sampling.merged import MergedSampler
    from looper_trainer.sampling.transformers import TransformersSampler

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
        policy, tokenizer = Policy.load(config)
        engine = MergedSampler if config.merged_sampling else TransformersSampler
        sampler = engine(policy.model, tokenizer, batch_size=config.sample_batch_size)
        train(config, data, policy, sampler, client)
    if config.merge:
        del policy, sampler
        merge_adapter(config.output / "adapter", config.output / "merged", config.model)


def read_data(config: PPOConfig) -> Data:
    """The files that `config` names, filtered.

    Raises:
        DataError: a file that cannot be used.
    """
    problems = _read(config.train_file, Problem)
    dev = _read(config.dev_file, Problem) if config.dev_file and config.eval_every else []
    rollouts = _read(config.rollouts_file, RolloutRecord) if config.rollouts_file else []
    train = solvable(problems, rollouts) if rollouts else problems
    questions_of_step(train, 1, config.batch_size, config.seed)  # refuses too few
    if len({problem.id for problem in train}) != len(train):
        raise DataError(f"{config.train_file}: question ids repeat; give each question its own")
    return Data(train, dev[: config.eval_questions or None], rollouts)


def train(config: PPOConfig, data: Data, policy: Policy, sampler: Sampler, scorer: Scorer) -> TrainState:
    """Train `policy` in place and leave the result in `config.output`; `sampler` must sample from `policy`.

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
            if data.dev:
                accuracy = greedy_accuracy(sampler, data.dev, config.max_new_tokens)
                state = replace(state, best_step=0, best_accuracy=accuracy)
                log.step({"step": 0, "policy_version": 0, "dev_accuracy": accuracy})
            save_checkpoint(state, policy, optimizer, config)
        last = state.step == config.steps or _out_of_patience(state, config)
        while not last:
            try:
                metrics = train_step(state, config, data, policy, sampler, scorer, optimizer, log)
            except RewardError as error:
                if not step_folder(config.output, state.step).exists():
                    save_checkpoint(state, policy, optimizer, config)
                raise type(error)(
                    f"{error}; progress up to step {state.step} is saved in {config.output}: mend the reward "
                    "service and go on with --resume"
                ) from error
            state = replace(state, step=state.step + 1, kl_coef=metrics["next_kl_coef"])
            improved = False
            last = state.step == config.steps or time.monotonic() >= deadline
            if data.dev and (state.step % config.eval_every == 0 or last):
                watch = Stopwatch()
                with watch.part("eval"):
                    metrics["dev_accuracy"] = greedy_accuracy(sampler, data.dev, config.max_new_tokens)
                metrics["seconds"] |= watch.rounded()
                state, improved = _after_evaluation(state, metrics["dev_accuracy"])
            log.step(metrics)
            last = last or _out_of_patience(state, config)
            if improved or last or state.step % config.save_every == 0:
                save_checkpoint(state, policy, optimizer, config)
        chosen = export(state, policy, config)
        log.say(f"wrote {config.output / 'adapter'} from step {chosen}")
    if chosen != state.step:
        load_policy(policy, step_folder(config.output, chosen))
    return state


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

    # 1. Sample k completions of each question.
    problems = questions_of_step(data.train, step, config.batch_size, config.seed)
    params = SamplingParams(config.max_new_tokens, config.temperature, top_p=1.0)
    with watch.part("sample"), policy.precision():
        groups = sample_groups(sampler, problems, params, config.samples_per_question, step, config.seed)
    rows = to_rows(groups)
    mask_BT = completion_mask(rows, policy.device)
    sampler_logprobs_BT = sampler_logprobs(rows, policy.device)

    # 2. Score them over HTTP while the trainer measures its own logprobs, reference and values.
    questions = [to_question(group) for group in groups]
    scoring = _in_background(lambda: scorer.score(questions, step=step, purpose=Purpose.TRAIN))
    with watch.part("logprobs"):
        minibatches = cut_minibatches(rows, config, rng, policy.device)
        micro_batches = [batch for minibatch in minibatches for batch in minibatch]
        measured = measure(policy, micro_batches, (mask_BT.shape[0], mask_BT.shape[1]))
    with watch.part("score_wait"):
        results = scoring.result()
    log.trajectories(
        step,
        [
            to_record(g, results[g.problem.id], _version(config, state), state.scorer_id, config.reward_mode)
            for g in groups
        ],
    )
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


def _in_background(call: Callable[[], Results]) -> Future[Results]:
    """The result of `call` in a daemon thread, so that Ctrl-C need not wait for a service that is down."""
    future: Future[Results] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="score", daemon=True).start()
    return future


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


def _read(path: Path, kind: type[RecordT]) -> list[RecordT]:
    try:
        return read_records(path, kind)
    except RecordError as error:
        raise DataError(str(error)) from None


__all__ = ["Data", "Scorer", "run", "train", "train_step"]

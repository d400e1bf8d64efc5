"""`looper rollouts`: sampled solutions of every question, scored by the reward service.

The completions of one question, each from its own seed, are sent together: they are the arms among which
coherence is measured (`--arms service`: the service's own arms answer instead, see `service_arms`). While one
batch is scored, the next is sampled. Records are appended to `<output>.partial` in the order of the
questions, so an interrupted run goes on after its last whole line; other settings, another policy or another
scorer refuse to continue it. A question that the service could not score keeps reward null.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from looper_schemas.records import Problem, RolloutRecord, read_records, to_line
from looper_schemas.scoring import (
    Disclosure,
    FailedQuestion,
    Purpose,
    RewardMode,
    ScoredQuestion,
)
from looper_trainer.config import NamedPath, save_resolved
from looper_trainer.errors import DataError
from looper_trainer.folders import (
    differing,
    file_digest,
    policy_id,
    require_checkpoint,
    written_alone,
)
from looper_trainer.groups import (
    Group,
    longest_prompt,
    require_arms,
    require_window,
    sample_groups,
    to_record,
)
from looper_trainer.reward_client import RewardClient, as_question
from looper_trainer.sampling.base import Sampler, SamplingParams, StreamingSampler
from looper_trainer.sampling.options import SamplerOptions
from looper_trainer.sampling.vllm import VLLMSampler
from looper_trainer.service_arms import REQUEST_TIMEOUT_S, service_records


class RolloutsConfig(SamplerOptions):
    """Sample solutions of every question and have them scored."""

    arms: Annotated[
        Literal["policy", "service"],
        Field(description="who answers: the model here, or the service's own arms"),
    ] = "policy"
    model: Annotated[str, Field(description="policy: a folder or a hub name")] = "checkpoints/sft"
    questions_file: Annotated[Path, Field(description="problems to solve")] = Path("data/gsm8k_train.jsonl")
    output: Annotated[NamedPath, Field(description="file of the records")] = Path("data/ppo_rollouts.jsonl")
    limit: Annotated[int | None, Field(ge=1, description="only the first N problems")] = None
    samples_per_question: Annotated[int, Field(ge=1, description="trajectories a question")] = 4
    max_new_tokens: Annotated[int, Field(ge=1, description="longest trajectory")] = 256
    temperature: Annotated[float, Field(gt=0, description="of sampling")] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1, description="nucleus of sampling")] = 1.0
    seed: Annotated[int, Field(ge=0, description="every trajectory's own seed derives from it")] = 0
    questions_per_batch: Annotated[int, Field(ge=1, description="questions in a score request")] = 16
    sample_batch_size: Annotated[int, Field(ge=1, description="rows the transformers sampler decodes")] = 64
    reward_mode: Annotated[RewardMode, Field(description="how scores become rewards")] = RewardMode.ARM_GATED
    disclosure: Annotated[Disclosure, Field(description="what is asked of the service")] = (
        Disclosure.COMPONENTS
    )
    give_up_after_s: Annotated[float, Field(gt=0, description="longest wait for the service")] = 1800.0
    run_id: Annotated[str | None, Field(description="name in the service's log; none: the output's")] = None
    device: Annotated[Literal["auto", "cpu", "cuda"], Field(description="auto: a GPU if any")] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], Field(description="auto: float32 on a CPU")
    ] = "auto"


# Settings that change how fast records come, not what they hold.
_FREE = frozenset(
    {"output", "sample_batch_size", "questions_per_batch", "give_up_after_s", "run_id", "limit"}
    | {name for name in SamplerOptions.model_fields if name.startswith("vllm_") and name != "vllm_seeded"}
)
_SCORE_CONNECTIONS = 4


def run(config: RolloutsConfig) -> None:
    """Write `config.output`, continuing an interrupted run with the same settings.

    Raises:
        RecordError, DataError, CheckpointError, RewardError: what cannot be used, and what to do.
    """
    problems = read_records(config.questions_file, Problem)[: config.limit]
    if len({problem.id for problem in problems}) != len(problems):
        raise DataError(f"{config.questions_file}: ids repeat; give every problem its own")
    with written_alone(config.output, config.output.with_name(config.output.name + ".lock")):
        _write(config, problems)


def _write(config: RolloutsConfig, problems: Sequence[Problem]) -> None:
    if config.output.exists():
        raise DataError(f"{config.output}: exists already; remove it or choose another --output")
    if config.arms == "policy":
        require_checkpoint(config.model)
    with RewardClient.from_environment(
        run_id=config.run_id or f"rollouts-{config.output.stem}"[:200],
        reward_mode=config.reward_mode,
        disclosure=config.disclosure,
        give_up_after_s=config.give_up_after_s,
        timeout_s=120.0 if config.arms == "policy" else REQUEST_TIMEOUT_S,
    ) as client:
        info = client.info()  # before any sampling: a wrong address or key ends at once
        if config.arms == "policy":
            require_arms(info, config.samples_per_question)
        made_by = policy_id(config.model) if config.arms == "policy" else "service"
        settings = _settings(config, made_by, info.scorer_id)
        done = _read_partial(config, settings)
        _check_prefix(config, problems, done)
        with _sampler(config) as sampler:  # before any file is made: it may not load
            if sampler is not None:
                require_window(config.model, longest_prompt(sampler, problems), config.max_new_tokens)
            if not done:
                _settings_file(config).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
                _partial_file(config).write_bytes(b"")
            else:
                print(f"rollouts: continuing after {len(done)} of {len(problems)} questions", flush=True)
            progress = Progress(len(problems), done)
            with _partial_file(config).open("a", encoding="utf-8") as out:
                rest = problems[len(done) :]
                for record in (
                    _records(config, rest, sampler, client, made_by)
                    if sampler is not None
                    else service_records(
                        client,
                        rest,
                        seed=config.seed,
                        max_tokens=config.max_new_tokens,
                        questions_per_batch=config.questions_per_batch,
                        policy=done[-1].policy if done else None,
                    )
                ):
                    out.write(to_line(record))
                    out.flush()
                    progress.add(record)
    save_resolved(config, config.output.parent, f"{config.output.stem}_config")
    _partial_file(config).replace(config.output)
    _settings_file(config).unlink()
    progress.finish(config.output)


@contextmanager
def _sampler(config: RolloutsConfig) -> Iterator[Sampler | None]:
    if config.arms == "service":
        yield None
    elif config.sampler == "vllm":
        settings = config.vllm_settings(dtype=config.dtype, seed=config.seed, lora=False)
        folder = config.output.with_name(config.output.name + ".vllm")
        with VLLMSampler(config.model, settings, folder=folder) as sampler:
            yield sampler
    else:
        from looper_trainer.sampling.transformers import load_sampler

        yield load_sampler(config.model, config.device, config.dtype, config.sample_batch_size)


def trajectory_seed(seed: int, question_id: str, index: int) -> int:
    """The seed of a question's `index`-th trajectory: below 2**63, and independent of the other questions."""
    digest = hashlib.sha256(f"{seed}\n{index}\n{question_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _records(
    config: RolloutsConfig,
    problems: Sequence[Problem],
    sampler: Sampler,
    client: RewardClient,
    made_by: str,
) -> Iterator[RolloutRecord]:
    """A record for each problem, in order, as soon as it and all before it are scored.

    Questions are scored in batches while others are sampled. A streaming sampler is asked for all of them at
    once: nothing waits for the slowest of a batch.
    """
    groups = _groups(config, problems, sampler)
    jobs: dict[str, tuple[Group, Future[dict[str, ScoredQuestion | FailedQuestion]]]] = {}

    def record(problem: Problem) -> RolloutRecord:
        group, job = jobs.pop(problem.id)
        result = job.result()[problem.id]
        scorer_id = client.scorer_id if isinstance(result, ScoredQuestion) else None
        return to_record(group, result, made_by, scorer_id, config.reward_mode.value, config.seeded)

    left = deque(problems)
    with ThreadPoolExecutor(_SCORE_CONNECTIONS) as scoring, _closing_on_error(client), closing(groups):
        batches = iter(lambda: list(islice(groups, config.questions_per_batch)), [])
        for step, batch in enumerate(batches):
            questions = [as_question(group.problem, group.completions) for group in batch]
            job = scoring.submit(client.score, questions, step=step, purpose=Purpose.ROLLOUT)
            jobs |= {group.problem.id: (group, job) for group in batch}
            while left and (due := left[0].id) in jobs and jobs[due][1].done():
                yield record(left.popleft())
        yield from map(record, left)


def _groups(config: RolloutsConfig, problems: Sequence[Problem], sampler: Sampler) -> Generator[Group]:
    params = SamplingParams(config.max_new_tokens, config.temperature, config.top_p)
    seed_of = partial(trajectory_seed, config.seed)
    streams = isinstance(sampler, StreamingSampler)
    at_once = max(len(problems), 1) if streams else config.questions_per_batch
    for start in range(0, len(problems), at_once):
        batch = problems[start : start + at_once]
        yield from sample_groups(sampler, batch, params, config.samples_per_question, seed_of)


@contextmanager
def _closing_on_error(client: RewardClient) -> Iterator[None]:
    """Whatever ends the sampling also ends a wait for the service in the scoring thread."""
    try:
        yield
    except BaseException:
        client.close()
        raise


def _partial_file(config: RolloutsConfig) -> Path:
    return config.output.with_name(config.output.name + ".partial")


def _settings_file(config: RolloutsConfig) -> Path:
    return config.output.with_name(config.output.name + ".partial.settings")


def _settings(config: RolloutsConfig, made_by: str, scorer_id: str) -> dict[str, Any]:
    """What the records depend on."""
    settings = {key: value for key, value in config.model_dump(mode="json").items() if key not in _FREE}
    questions = file_digest(config.questions_file)
    return settings | {"questions_sha256": questions, "policy": made_by, "scorer_id": scorer_id}


def _read_partial(config: RolloutsConfig, settings: Mapping[str, Any]) -> list[RolloutRecord]:
    """Records of an interrupted run with the same settings; its last line is cut off if it is not whole.

    Raises:
        DataError: the interrupted run had other settings.
    """
    partial, settings_file = _partial_file(config), _settings_file(config)
    if not (partial.exists() and settings_file.exists()):
        return []
    whole = partial.read_bytes()
    partial.write_bytes(whole[: whole.rfind(b"\n") + 1])
    if not partial.stat().st_size:
        return []
    before = json.loads(settings_file.read_text(encoding="utf-8"))
    if found := differing(before, settings):
        raise DataError(
            f"{partial}: was begun with another {found}; use the same, or remove it to begin anew"
        )
    return read_records(partial, RolloutRecord)


def _check_prefix(config: RolloutsConfig, problems: Sequence[Problem], done: Sequence[RolloutRecord]) -> None:
    if [record.id for record in done] != [problem.id for problem in problems[: len(done)]]:
        raise DataError(
            f"{_partial_file(config)}: holds other questions than {config.questions_file}; remove it"
        )


class Progress:
    """Counts records and shows where the run stands, at most once in two seconds."""

    def __init__(
        self, total: int, done: Sequence[RolloutRecord], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total, self.clock = total, clock
        self.count = self.unscored = self.completions = self.rewarded = 0
        self.reward_sum = 0.0
        self.started = self.shown = self.clock()
        self.fresh = self.fresh_completions = 0  # of this process, which alone says how fast it goes
        for record in done:
            self._count(record)

    def add(self, record: RolloutRecord) -> None:
        self._count(record)
        self.fresh += 1
        self.fresh_completions += len(record.trajectories)
        if self.clock() - self.shown >= 2:
            self.shown = self.clock()
            print(self._line(), flush=True)

    def finish(self, output: Path) -> None:
        print(f"{self._line()}; {output} is complete", flush=True)

    def _count(self, record: RolloutRecord) -> None:
        rewards = [t.reward for t in record.trajectories if t.reward is not None]
        self.count += 1
        self.completions += len(record.trajectories)
        self.rewarded += len(rewards)
        self.reward_sum += sum(rewards)
        self.unscored += not rewards

    def _line(self) -> str:
        mean = f"{self.reward_sum / self.rewarded:.3f}" if self.rewarded else "none"
        elapsed = self.clock() - self.started
        line = (
            f"rollouts: {self.count}/{self.total} questions, mean reward {mean}, unscored {self.unscored}, "
            f"{self.fresh_completions / max(elapsed, 1e-9):.1f} completions/s"
        )
        if not self.fresh or self.count == self.total:
            return line
        left = elapsed / self.fresh * (self.total - self.count)
        return f"{line}, {timedelta(seconds=round(left))} left"

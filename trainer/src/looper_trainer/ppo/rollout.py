"""Which questions a step takes, their sampled completions, and their forms on the wire and on disk.

Nothing here has a state: the questions of a step and the seed of every completion are functions of
(run seed, step), so that a step that is repeated after a stop is the same step.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence

from looper_schemas.answers import answers_match
from looper_schemas.prompt import format_prompt
from looper_schemas.records import Problem, RolloutRecord
from looper_trainer.errors import ConfigError, DataError
from looper_trainer.groups import Group, sample_groups
from looper_trainer.ppo.batch import Row
from looper_trainer.ppo.config import PPOConfig
from looper_trainer.sampling.base import Sampler, SamplingParams


def questions_of_step(
    problems: Sequence[Problem], step: int, batch_size: int, seed: int, curriculum_steps: int = 0
) -> list[Problem]:
    """The questions of step 1, 2, ...: each pass over the data is a fresh permutation, cut into full batches.

    During the first `curriculum_steps` steps a batch is drawn from the head of `problems`, which grows
    evenly until it is all of them.

    Raises:
        DataError: fewer problems than one batch.
    """
    per_pass = len(problems) // batch_size
    if per_pass == 0:
        raise DataError(
            f"{len(problems)} training questions are fewer than batch_size {batch_size}; lower it"
        )
    if step <= curriculum_steps:
        head = max(batch_size, round(len(problems) * step / curriculum_steps))
        return random.Random(f"{seed}/curriculum/{step}").sample(list(problems[:head]), batch_size)
    number, place = divmod(step - 1 - curriculum_steps, per_pass)
    order = random.Random(f"{seed}/pass/{number}").sample(range(len(problems)), len(problems))
    return [problems[i] for i in order[place * batch_size : (place + 1) * batch_size]]


def require_texts_fit(longest_text: int | None, longest: int, config: PPOConfig) -> None:
    """Refuse texts that may be longer than `Policy.longest_text`; `longest` prompt, see `longest_prompt`.

    Raises:
        ConfigError: they may.
    """
    if longest_text is not None and longest + config.max_new_tokens > longest_text:
        raise ConfigError(
            f"{config.model} computes texts of more than {longest_text} tokens in a way that PPO does not "
            f"reproduce (a window, or rope that depends on the length): the longest question has {longest}, "
            f"and max_new_tokens is {config.max_new_tokens}; lower that, or leave long questions out"
        )


def completion_seed(seed: int, step: int, question_id: str, sample: int) -> int:
    """A 63-bit seed that no other completion of the run shares (but by chance)."""
    digest = hashlib.blake2b(f"{seed}/{step}/{question_id}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def to_rows(groups: Sequence[Group]) -> list[Row]:
    """The completions of all groups as token rows, group by group."""
    return [
        Row(group.prompt_ids, completion.token_ids, completion.logprobs, completion.reference_logprobs)
        for group in groups
        for completion in group.completions
    ]


def solvable(
    problems: Sequence[Problem], rollouts: Sequence[RolloutRecord], above: float = 0.0, below: float = 1.0
) -> list[Problem]:
    """The problems whose pass rate in the rollouts is between `above` and `below`, both excluded.

    By default those solved sometimes but not always: the others teach a group nothing. The most often
    solved come first, problems of equal rate in their own order.

    Raises:
        DataError: no problem is left.
    """
    rates = pass_rates(rollouts)
    kept = [problem for problem in problems if above < rates.get(problem.id, 0.0) < below]
    if not kept:
        raise DataError(
            f"no training question has a pass rate between {above:g} and {below:g} in rollouts_file; widen "
            "min_pass_rate and max_pass_rate, or leave rollouts_file out"
        )
    return sorted(kept, key=lambda problem: -rates[problem.id])


def pass_rates(rollouts: Sequence[RolloutRecord]) -> Mapping[str, float]:
    """Share of correct trajectories of each question id."""
    return {
        record.id: sum(_solves(t.output, t.finish_reason, record.gold_answer) for t in record.trajectories)
        / len(record.trajectories)
        for record in rollouts
        if record.trajectories
    }


def solved_greedily(sampler: Sampler, problems: Sequence[Problem], max_new_tokens: int) -> list[bool]:
    """Of each problem, whether its greedy completion states the gold answer."""
    prompts = [sampler.encode(format_prompt(problem.question)) for problem in problems]
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0)
    completions = sampler.sample(prompts, params, [[0]] * len(prompts))
    return [
        _solves(group[0].text, group[0].finish_reason, problem.answer)
        for group, problem in zip(completions, problems, strict=True)
    ]


def solved_in_samples(
    sampler: Sampler, problems: Sequence[Problem], params: SamplingParams, k: int, seed: int
) -> list[int]:
    """Of each problem, how many of `k` sampled completions state the gold answer."""

    def seed_of(id_: str, sample: int) -> int:
        return completion_seed(seed, 0, id_, sample)  # training begins at step 1

    groups = sample_groups(sampler, problems, params, k, seed_of)
    right = {
        group.problem.id: sum(
            _solves(c.text, c.finish_reason, group.problem.answer) for c in group.completions
        )
        for group in groups
    }
    return [right[problem.id] for problem in problems]


def _solves(text: str, finish_reason: str | None, answer: str) -> bool:
    """Whether a completion came to its end and states `answer`, as the evaluation judges (decision 0080)."""
    return finish_reason != "length" and answers_match(text, answer)

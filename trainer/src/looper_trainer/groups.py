"""A question with its completions: sampled together, scored together, kept as one record."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from looper_schemas.answers import extract_answer
from looper_schemas.prompt import format_prompt
from looper_schemas.records import Problem, RolloutRecord, Trajectory
from looper_schemas.scoring import FailedQuestion, ScoredQuestion, ServiceInfo
from looper_trainer.errors import ConfigError
from looper_trainer.sampling.base import Completion, Sampler, SamplingParams, StreamingSampler


@dataclass(frozen=True)
class Group:
    """One question and its k completions; `seeds[j]` drew `completions[j]`."""

    problem: Problem
    prompt_ids: Sequence[int]
    completions: Sequence[Completion]
    seeds: Sequence[int]

    @cached_property
    def answers(self) -> tuple[str | None, ...]:
        """The final answer of each completion; read once, for the records and the figures of a step."""
        return tuple(extract_answer(completion.text) for completion in self.completions)


def sample_groups(
    sampler: Sampler,
    problems: Sequence[Problem],
    params: SamplingParams,
    k: int,
    seed_of: Callable[[str, int], int],
) -> Generator[Group]:
    """`k` completions of each problem from the sampler's current policy, groups in the order they end.

    `seed_of(id, j)` draws completion `j` of a question. A streaming sampler is asked with consecutive seeds
    instead, from that of the first on, which make one request of a question.
    """
    prompts = [sampler.encode(format_prompt(problem.question)) for problem in problems]
    if not isinstance(sampler, StreamingSampler):
        seeds = [[seed_of(problem.id, j) for j in range(k)] for problem in problems]
        yield from map(Group, problems, prompts, sampler.sample(prompts, params, seeds), seeds)
        return
    firsts = [seed_of(problem.id, 0) >> 1 for problem in problems]  # room for + j
    seeds = [[first + j for j in range(k)] for first in firsts]
    with closing(sampler.sample_iter(prompts, params, seeds)) as found:
        for i, completions in found:
            yield Group(problems[i], prompts[i], completions, seeds[i])


def require_arms(info: ServiceInfo, k: int) -> None:
    """Refuse more completions of a question than the reward service takes.

    Raises:
        ConfigError: they are.
    """
    if k > info.limits.max_arms:
        raise ConfigError(
            f"samples_per_question is {k}, but the reward service takes at most {info.limits.max_arms} "
            "completions of a question (max_arms of /v1/info); lower it, or raise that limit"
        )


def require_window(model: str, longest: int, max_new_tokens: int) -> None:
    """Refuse texts that may be longer than `model` was made for (max_position_embeddings).

    `longest` is the longest prompt's number of tokens, see `longest_prompt`.

    Raises:
        ConfigError: they may.
    """
    from transformers import AutoConfig

    window = _window(AutoConfig.from_pretrained(model).get_text_config())
    if window is not None and longest + max_new_tokens > window:
        raise ConfigError(
            f"{model} is made for texts of at most {window:.0f} tokens: the longest question has {longest}, "
            f"and max_new_tokens is {max_new_tokens}; lower that, or leave long questions out"
        )


def _window(settings: Any) -> float | None:
    """Tokens that positions are made for; None where the settings of a model do not say."""
    window: int | None = getattr(settings, "max_position_embeddings", None)
    rope = getattr(settings, "rope_parameters", None) or {}
    stretched = rope.get("rope_type") in ("linear", "dynamic", "yarn")
    if window is not None and stretched and rope.get("original_max_position_embeddings", window) == window:
        return window * float(rope["factor"])  # the window is of before
    return window


def longest_prompt(sampler: Sampler, problems: Sequence[Problem]) -> int:
    """Tokens of the longest prompt."""
    return max(len(sampler.encode(format_prompt(problem.question))) for problem in problems)


def arm_rewards(group: Group, result: ScoredQuestion | FailedQuestion) -> list[float | None]:
    """The reward of each completion exactly as received; None for all of a question that has no score."""
    if isinstance(result, FailedQuestion):
        return [None] * len(group.completions)
    by_id = {arm.id: arm.reward for arm in result.arms}
    return [by_id[str(j)] for j in range(len(group.completions))]


def with_differences(
    groups: Sequence[Group], results: Mapping[str, ScoredQuestion | FailedQuestion]
) -> Sequence[Group]:
    """The groups whose completions got different rewards; all of them where no group has."""
    rewards = [set(arm_rewards(group, results[group.problem.id])) for group in groups]
    return [group for group, found in zip(groups, rewards, strict=True) if len(found) > 1] or groups


def to_record(
    group: Group,
    result: ScoredQuestion | FailedQuestion,
    policy: str,
    scorer_id: str | None,
    reward_mode: str,
    seeded: bool = True,
) -> RolloutRecord:
    """The group with its rewards, for the trajectory file; seeds that drew nothing are left out."""
    trajectories = tuple(
        Trajectory(
            output=completion.text,
            final_answer=answer,
            reward=reward,
            finish_reason=completion.finish_reason,
            tokens_out=len(completion.token_ids),
            seed=seed if seeded else None,
        )
        for completion, answer, reward, seed in zip(
            group.completions, group.answers, arm_rewards(group, result), group.seeds, strict=True
        )
    )
    return RolloutRecord(
        id=group.problem.id,
        question=group.problem.question,
        gold_answer=group.problem.answer,
        trajectories=trajectories,
        scores=result.scores if isinstance(result, ScoredQuestion) else None,
        policy=policy,
        scorer_id=scorer_id,
        reward_mode=reward_mode,
    )

"""Figures of one step, for the log: what was sampled, how it was scored, how far the policy is from home."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean, pstdev
from typing import Any

from torch import Tensor

from looper_schemas.scoring import FailedQuestion, ScoredQuestion
from looper_trainer.groups import Group, arm_rewards
from looper_trainer.ppo.experience import Experience, Measured
from looper_trainer.ppo.gae import masked_mean
from looper_trainer.ppo.kl import kl_k1, kl_k3
from looper_trainer.ppo.losses import explained_variance


def collapses(lines: Sequence[Mapping[str, Any]], evaluations: int = 3) -> bool:
    """Whether coherence rose while dev accuracy fell, each time over the last `evaluations` evaluations.

    That is how a policy looks that has learnt to agree with itself instead of to be right.

    Args:
        lines: the run's metrics, step by step; `dev_accuracy` where there was an evaluation.
    """
    accuracies: list[float] = []
    coherences: list[float | None] = []
    since: list[float] = []
    for line in lines:
        if line.get("s_wm") is not None:
            since.append(line["s_wm"])
        if line.get("dev_accuracy") is not None:
            accuracies.append(line["dev_accuracy"])
            coherences.append(fmean(since) if since else None)
            since = []
    recent = list(zip(accuracies, coherences, strict=True))[-evaluations:]
    known = [(accuracy, coherence) for accuracy, coherence in recent if coherence is not None]
    return len(known) == evaluations and all(
        after[0] < before[0] and after[1] > before[1] for before, after in pairwise(known)
    )


def sample_metrics(groups: Sequence[Group]) -> dict[str, Any]:
    """Lengths, truncation and variety of the step's completions. A missing answer is no distinct answer."""
    completions = [completion for group in groups for completion in group.completions]
    lengths = [len(completion.token_ids) for completion in completions]
    distinct = [len(set(group.answers) - {None}) for group in groups]
    return {
        "completions": len(completions),
        "length_mean": fmean(lengths),
        "length_max": max(lengths),
        "truncation_rate": fmean(completion.finish_reason == "length" for completion in completions),
        "distinct_answers_mean": fmean(distinct),
        "no_answer_rate": fmean(answer is None for group in groups for answer in group.answers),
    }


def score_metrics(
    groups: Sequence[Group], results: Mapping[str, ScoredQuestion | FailedQuestion]
) -> dict[str, Any]:
    """Rewards and, where the service discloses them, components and correctness. None means not known."""
    scored = [result for result in results.values() if isinstance(result, ScoredQuestion)]
    rewards = [r for group in groups for r in arm_rewards(group, results[group.problem.id]) if r is not None]
    flags = [flag for result in scored for flag in result.correct_flags or () if flag is not None]
    components = [result.scores for result in scored if result.scores is not None]
    found: dict[str, Any] = {
        "questions_scored": len(scored),
        "questions_failed": len(results) - len(scored),
        "reward_mean": fmean(rewards) if rewards else None,
        "reward_std": pstdev(rewards) if rewards else None,
        "correct_rate": fmean(flags) if flags else None,
        "degenerate_rate": fmean(result.degenerate for result in scored) if scored else None,
    }
    for name in ("s_end", "s_path", "s_cf", "s_wm"):
        values = [value for scores in components if (value := getattr(scores, name)) is not None]
        found[name] = fmean(values) if values else None
    return found


def token_metrics(
    measured: Measured, experience: Experience, sampler_logprobs_BT: Tensor, cap: float
) -> dict[str, Any]:
    """KL to the reference, entropy, fit of the values, agreement of sampler and trainer; of scored tokens."""
    mask_BT = experience.mask_BT
    k1_BT = kl_k1(measured.logprobs_BT, measured.ref_logprobs_BT)
    k3_BT = kl_k3(measured.logprobs_BT, measured.ref_logprobs_BT)
    rows = int(mask_BT.any(dim=1).sum())
    gap_BT = measured.logprobs_BT - sampler_logprobs_BT
    return {
        "tokens": int(mask_BT.sum()),
        "kl_k1": float(masked_mean(k1_BT, mask_BT)),
        "kl_k3": float(masked_mean(k3_BT, mask_BT)),
        "kl_k1_per_completion": float(k1_BT[mask_BT].sum()) / max(rows, 1),
        "entropy": float(masked_mean(measured.entropy_BT, mask_BT)),
        "value_mean": float(masked_mean(measured.values_BT, mask_BT)),
        "return_mean": float(masked_mean(experience.returns_BT, mask_BT)),
        "explained_variance": explained_variance(measured.values_BT, experience.returns_BT, mask_BT),
        "importance_mean": float(masked_mean(experience.importance_BT, mask_BT)),
        "importance_truncated_share": float(masked_mean((gap_BT.exp() > cap).float(), mask_BT)),
        "sampler_gap_max": float(gap_BT.masked_fill(~mask_BT, 0.0).abs().max()),
    }

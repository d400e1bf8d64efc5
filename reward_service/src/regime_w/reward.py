"""From scores to rewards: three modes on one scale.

`question` gives every arm R = base(any arm correct) + 0.7 s_wm + mean length penalty.
`arm` gives arm i  r_i = base(c_i) + 0.7 s_i + L_i, s_i its leave-one-out share.
`arm_gated` gives arm i  r_i = base(c_i) + 0.7 c_i s_i + L_i: agreement on a wrong answer earns nothing.

Without a gold answer correctness is unknown and the base is 0. The gate of `arm_gated` then stays shut:
it opens for arms known to be correct only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from looper_schemas.scoring import RewardMode, RewardRange
from regime_w.settings import LengthPenalty, RewardSettings


class Rewards(NamedTuple):
    """The reward of each arm and of the question: their mean in the arm modes."""

    question: float
    arms: tuple[float, ...]


def compute_reward(
    mode: RewardMode,
    correct: Sequence[bool | None],
    s_wm: float,
    shares: Sequence[float],
    tokens_out: Sequence[int | None] | None = None,
    *,
    gold_known: bool = True,
    settings: RewardSettings | None = None,
) -> Rewards:
    """Rewards of the n arms of one question.

    Args:
        correct: n flags; None where there is no gold answer.
        s_wm, shares: the question's blend and the arms' n leave-one-out shares of it.
        tokens_out: n lengths in tokens for the length penalty; None is not penalised.
        gold_known: whether the question has a gold answer; decides the base of a question without arms.
    """
    settings = settings or RewardSettings()
    if tokens_out is None:
        tokens_out = [None] * len(correct)
    penalties = [length_penalty(tokens, settings.length_penalty) for tokens in tokens_out]

    def base(is_correct: bool | None) -> float:
        if is_correct is None:
            return 0.0
        return settings.correct if is_correct else settings.wrong

    any_correct = any(correct) if gold_known else None
    if mode is RewardMode.QUESTION:
        penalty = math.fsum(penalties) / len(penalties) if penalties else 0.0
        reward = base(any_correct) + settings.coherence * s_wm + penalty
        return Rewards(reward, (reward,) * len(correct))
    gated = mode is RewardMode.ARM_GATED
    arms = tuple(
        base(c) + (0.0 if gated and not c else settings.coherence * share) + penalty
        for c, share, penalty in zip(correct, shares, penalties, strict=True)
    )
    return Rewards(math.fsum(arms) / len(arms) if arms else base(any_correct), arms)


def length_penalty(tokens: int | None, settings: LengthPenalty | None) -> float:
    """L of an arm of `tokens` tokens; 0 where the penalty is off or the length unknown."""
    if settings is None or tokens is None:
        return 0.0
    return max(settings.floor, -settings.per_token * max(0, tokens - settings.free_tokens))


def reward_range(mode: RewardMode, settings: RewardSettings | None = None) -> RewardRange:
    """The closed interval of every reward in `mode`, without the length penalty."""
    settings = settings or RewardSettings()
    # Coherence can be added to every base except, behind the gate, to that of a wrong or unknown answer.
    opened = [settings.correct + settings.coherence]
    if mode is not RewardMode.ARM_GATED:
        opened += [settings.wrong + settings.coherence, settings.coherence]
    bases = [settings.correct, settings.wrong, 0.0]
    return RewardRange(low=min(bases), high=max(bases + opened))

"""One update: the exact first ratio, and what must not change its gradient."""

from __future__ import annotations

import random
from dataclasses import replace
from statistics import pstdev
from typing import Literal

import pytest
import torch

from looper_trainer.errors import UserError
from looper_trainer.ppo.batch import MicroBatch, Row, completion_mask, plan_micro_batches, sampler_logprobs
from looper_trainer.ppo.config import PPOConfig
from looper_trainer.ppo.experience import Experience, Measured, assess, measure
from looper_trainer.ppo.policy import Policy
from looper_trainer.ppo.update import (
    _accumulate_gradients,
    _Tally,
    make_optimizer,
    set_learning_rates,
    update,
)

from .conftest import make_policy
from .test_policy import make_rows, naive

SCORES = [1.2, -0.5, 0.4, 1.0, -0.5, 0.0]
CONFIG = PPOConfig(
    entropy_coef=0.01, vf_coef=0.3, ppo_epochs=2, learning_rate=1e-2, target_kl=10.0, dev_file=None
)


def prepare(
    policy: Policy,
    rows: list[Row],
    scores: list[float | None],
    config: PPOConfig = CONFIG,
    max_tokens: int = 10_000,
    cuts: tuple[tuple[int, ...], ...] | None = None,
) -> tuple[list[list[MicroBatch]], Experience]:
    cuts = cuts or (tuple(range(len(rows))),)
    plan = [plan_micro_batches(rows, cut, max_tokens) for cut in cuts]
    mask = completion_mask(rows)
    measured = measure(policy, [batch for part in plan for batch in part], (len(rows), mask.shape[1]))
    return plan, assess(measured, scores, mask, sampler_logprobs(rows), 0.05, config)


def gradient(policy: Policy, minibatch: list[MicroBatch], experience: Experience) -> torch.Tensor:
    policy.zero_grad(set_to_none=True)
    _accumulate_gradients(policy, minibatch, minibatch, experience, CONFIG, True, _Tally())
    parameters = [*policy.adapter_parameters(), *policy.value_head.parameters()]
    return torch.cat([p.grad.flatten() for p in parameters])


def moved_rows() -> list[Row]:
    """Rows whose sampler logprobs differ from the policy's, so that importance weights are not all 1."""
    return [replace(row, sampler_logprobs=[-3.0] * len(row.completion_ids)) for row in make_rows(6)]


def nudge(policy: Policy) -> None:
    """Move the policy off its old logprobs, so that ratios and clipping matter."""
    for weight in policy.adapter_parameters():
        weight.data.mul_(1.3)


@pytest.mark.parametrize("max_tokens", [10, 25, 10_000])
def test_the_first_minibatch_has_ratio_exactly_one_whatever_the_micro_batches(max_tokens: int) -> None:
    policy, rows = make_policy(), make_rows(6)
    plan, experience = prepare(policy, rows, SCORES, max_tokens=max_tokens, cuts=((4, 1, 0), (2, 3, 5)))
    figures = update(policy, make_optimizer(policy, CONFIG), plan, experience, CONFIG, random.Random(0))
    assert figures["first_ratio_min"] == figures["first_ratio_max"] == 1.0
    assert figures["ratio_max"] > 1.0 > figures["ratio_min"]  # later minibatches have moved


def test_the_gradient_equals_that_of_the_loss_written_out_row_by_row() -> None:
    policy, rows = make_policy(), moved_rows()
    plan, experience = prepare(policy, rows, SCORES)
    nudge(policy)
    losses, tokens = [], 0
    for i, row in enumerate(rows):
        logprobs, entropies, values = naive(policy, row)
        for t in range(len(row.completion_ids)):
            tokens += 1
            ratio = (logprobs[t] - experience.old_logprobs_BT[i, t]).exp()
            advantage, old_value = experience.advantages_BT[i, t], experience.old_values_BT[i, t]
            weight = min(float((experience.old_logprobs_BT[i, t] + 3.0).exp()), 2.0)
            surrogate = min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            held = old_value + (values[t] - old_value).clamp(-0.2, 0.2)
            target = experience.returns_BT[i, t]
            value_loss = 0.5 * max((values[t] - target) ** 2, (held - target) ** 2)
            losses.append(-weight * surrogate + 0.3 * value_loss - 0.01 * entropies[t])
    policy.zero_grad(set_to_none=True)
    (sum(losses) / tokens).backward()  # type: ignore[union-attr]
    parameters = [*policy.adapter_parameters(), *policy.value_head.parameters()]
    expected = torch.cat([p.grad.flatten() for p in parameters])
    torch.testing.assert_close(gradient(policy, plan[0], experience), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("max_tokens", [8, 20, 30])
def test_micro_batch_size_changes_no_gradient(max_tokens: int) -> None:
    policy, rows = make_policy(), moved_rows()
    whole, experience = prepare(policy, rows, SCORES)
    cut, _ = prepare(policy, rows, SCORES, max_tokens=max_tokens)
    assert len(cut[0]) > len(whole[0]) == 1
    nudge(policy)
    torch.testing.assert_close(
        gradient(policy, cut[0], experience), gradient(policy, whole[0], experience), rtol=1e-4, atol=1e-6
    )


def test_the_order_of_arms_changes_no_gradient() -> None:
    policy, rows = make_policy(), moved_rows()
    order = [3, 0, 5, 1, 4, 2]
    straight, experience = prepare(policy, rows, SCORES)
    shuffled, other = prepare(policy, [rows[i] for i in order], [SCORES[i] for i in order])
    nudge(policy)
    torch.testing.assert_close(
        gradient(policy, shuffled[0], other), gradient(policy, straight[0], experience), rtol=1e-4, atol=1e-6
    )


def test_an_unscored_completion_is_as_if_it_had_never_been_sampled() -> None:
    policy, rows = make_policy(), moved_rows()
    with_gap, experience = prepare(policy, rows, [*SCORES[:2], None, *SCORES[3:]])
    without, other = prepare(policy, rows[:2] + rows[3:], SCORES[:2] + SCORES[3:])
    nudge(policy)
    torch.testing.assert_close(
        gradient(policy, with_gap[0], experience), gradient(policy, without[0], other), rtol=1e-4, atol=1e-6
    )


def test_a_score_of_zero_is_not_a_missing_score() -> None:
    policy, rows = make_policy(), moved_rows()
    _, zero = prepare(policy, rows, [*SCORES[:2], 0.0, *SCORES[3:]])
    _, missing = prepare(policy, rows, [*SCORES[:2], None, *SCORES[3:]])
    assert zero.mask_BT[2].any()
    assert not missing.mask_BT[2].any()


def test_an_update_stops_before_the_minibatch_that_is_beyond_the_target_kl() -> None:
    policy, rows = make_policy(), make_rows(6)
    config = CONFIG.model_copy(update={"target_kl": 1e-9, "ppo_epochs": 3})
    plan, experience = prepare(policy, rows, SCORES, config, cuts=((0, 1, 2), (3, 4, 5)))
    figures = update(policy, make_optimizer(policy, config), plan, experience, config, random.Random(0))
    # The first minibatch has KL exactly 0 and is stepped on; the second is over the limit.
    assert figures["optimizer_steps"] == 1
    assert figures["stopped_early"] == 1
    assert figures["update_kl_last"] > 1e-9


def test_critic_only_updates_move_the_value_head_and_nothing_else() -> None:
    policy, rows = make_policy(), make_rows(6)
    plan, experience = prepare(policy, rows, SCORES)
    before = [p.detach().clone() for p in policy.adapter_parameters()]
    head = policy.value_head.weight.detach().clone()
    update(
        policy, make_optimizer(policy, CONFIG), plan, experience, CONFIG, random.Random(0), train_policy=False
    )
    assert all(torch.equal(a, b) for a, b in zip(before, policy.adapter_parameters(), strict=True))
    assert not torch.equal(head, policy.value_head.weight)


def test_a_gradient_that_is_not_finite_ends_the_run_before_it_reaches_the_weights() -> None:
    policy, rows = make_policy(), make_rows(6)
    plan, experience = prepare(policy, rows, SCORES)
    broken = replace(experience, advantages_BT=experience.advantages_BT * float("nan"))
    before = [p.detach().clone() for p in policy.adapter_parameters()]
    with pytest.raises(UserError, match="not finite"):
        update(policy, make_optimizer(policy, CONFIG), plan, broken, CONFIG, random.Random(0))
    assert all(torch.equal(a, b) for a, b in zip(before, policy.adapter_parameters(), strict=True))


def test_learning_rates_warm_up_linearly_and_then_stay() -> None:
    config = PPOConfig(learning_rate=1.0, value_learning_rate=2.0, warmup_steps=3, dev_file=None)
    optimizer = make_optimizer(make_policy(), config)
    seen = []
    for step in (1, 2, 3, 4, 50):
        set_learning_rates(optimizer, config, step)
        seen.append(tuple(group["lr"] for group in optimizer.param_groups))
    assert seen == [(0.25, 0.5), (0.5, 1.0), (0.75, 1.5), (1.0, 2.0), (1.0, 2.0)]


def test_learning_rates_fall_linearly_to_a_share_and_then_stay() -> None:
    config = PPOConfig(
        learning_rate=1.0, value_learning_rate=2.0, warmup_steps=1, decay_steps=5, decay_to=0.2, dev_file=None
    )
    optimizer = make_optimizer(make_policy(), config)
    seen = []
    for step in (1, 2, 3, 5, 50):
        set_learning_rates(optimizer, config, step)
        seen.append(optimizer.param_groups[0]["lr"])
        assert optimizer.param_groups[1]["lr"] == pytest.approx(2 * seen[-1])
    assert seen == pytest.approx([0.5, 0.8, 0.6, 0.2, 0.2])


def test_group_advantages_are_scores_less_the_mean_of_the_others_on_every_token() -> None:
    policy, rows = make_policy(), make_rows(6)
    settings = {"samples_per_question": 3, "advantages": "leave_one_out", "whiten_advantages": False}
    config = CONFIG.model_copy(update=settings)
    mask = completion_mask(rows)
    plan = plan_micro_batches(rows, range(6), 10_000)
    measured = measure(policy, plan, (6, mask.shape[1]))
    scores = [1.0, 0.0, 0.5, 2.0, 2.0, 2.0]
    found = assess(measured, scores, mask, sampler_logprobs(rows), 0.0, config).advantages_BT
    expected = [0.75, -0.75, 0.0, 0.0, 0.0, 0.0]
    for row, advantage in enumerate(expected):
        assert found[row][mask[row]].tolist() == pytest.approx([advantage] * int(mask[row].sum()))
        assert not found[row][~mask[row]].any()
    normalised = config.model_copy(update={"advantages": "group_normalised"})
    found = assess(measured, scores, mask, sampler_logprobs(rows), 0.0, normalised).advantages_BT
    assert float(found[0, 0]) == pytest.approx(0.75 / pstdev([1.0, 0.0, 0.5]), rel=1e-4)


@pytest.mark.parametrize("advantages", ["leave_one_out", "group_normalised"])
@pytest.mark.parametrize("whitened", [False, True])
def test_equal_scores_leave_the_penalty_and_do_not_blow_it_up(
    advantages: Literal["leave_one_out", "group_normalised"], whitened: bool
) -> None:
    """Two questions of two completions, all of two tokens, .1 nats from home at each: with a price of .01 a
    penalty of .001 a token, whatever spread or variance the scores have."""
    logprobs = torch.full((4, 2), -1.0)
    zeros, mask = torch.zeros(4, 2), torch.ones(4, 2, dtype=torch.bool)
    measured = Measured(logprobs, logprobs - 0.1, zeros, zeros)
    config = CONFIG.model_copy(
        update={
            "samples_per_question": 2,
            "advantages": advantages,
            "whiten_advantages": whitened,
            "gamma": 1.0,
        }
    )

    def found(scores: list[float]) -> list[list[float]]:
        return assess(measured, scores, mask, logprobs, 0.01, config).advantages_BT.tolist()

    assert found([0.1, 0.1, 0.3, 0.3]) == [pytest.approx([-0.002, -0.001], rel=1e-3)] * 4
    apart = found([1.0, 0.0, 0.3, 0.3])
    if not whitened:
        score = 2.0 if advantages == "group_normalised" else 1.0  # 1 less 0, over a spread of .5
        assert apart[0] == pytest.approx([score - 0.002, score - 0.001])
        assert apart[2] == pytest.approx([-0.002, -0.001], rel=1e-3)
    else:
        assert abs(apart[0][0]) > 1
        assert max(map(abs, apart[2])) < 0.01


def test_a_critic_apart_gives_the_trunk_no_gradient() -> None:
    gradients = []
    for together in (True, False):
        policy, rows = make_policy(critic_moves_trunk=together), make_rows(2)
        (batch,) = plan_micro_batches(rows, [0, 1], 10_000)
        policy(batch).values_nT.sum().backward()
        gradients.append([p.grad is not None and bool(p.grad.any()) for p in policy.adapter_parameters()])
        assert policy.value_head.weight.grad.any()
    assert any(gradients[0])
    assert not any(gradients[1])

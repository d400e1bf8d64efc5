"""The eight arms are eight, distinct, and keep the promises that scoring relies on."""

from __future__ import annotations

import dataclasses

import pytest

from regime_w.arms import COUNTERFACTUAL_CLOSE, COUNTERFACTUAL_OPEN, build_all_arms, family_of

ARMS = build_all_arms()


def test_four_arms_of_each_family() -> None:
    assert [arm.family for arm in ARMS] == ["wolfram"] * 4 + ["maudlin"] * 4


@pytest.mark.parametrize("field", ["name", "system_prompt", "user_template", "seed"])
def test_no_two_arms_share_a(field: str) -> None:
    assert len({getattr(arm, field) for arm in ARMS}) == 8


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_every_arm_asks_for_the_final_line_and_inserts_the_question_once_and_verbatim(arm) -> None:  # type: ignore[no-untyped-def]
    question = "If {q} costs {x} and 50% of {{y}}, how much?"
    assert arm.user_template.count("{q}") == 1
    assert question in arm.user_prompt(question)
    assert "{q}" not in arm.user_prompt("plain words")
    assert "#### n" in arm.system_prompt
    assert 0 < arm.temperature <= 1
    assert 0 < arm.top_p <= 1


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_an_arm_that_imagines_other_numbers_puts_them_in_the_marked_block(arm) -> None:  # type: ignore[no-untyped-def]
    imagines = arm.name in {"perturb_a_given", "rule_out_a_rival", "reverse_check"}
    for prompt in (arm.system_prompt, arm.user_template):
        assert (COUNTERFACTUAL_OPEN in prompt) == (COUNTERFACTUAL_CLOSE in prompt) == imagines


def test_arms_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ARMS[0].seed = 1  # type: ignore[misc]


def test_the_family_of_an_arm_index() -> None:
    assert [family_of(i) for i in range(8)] == [arm.family for arm in ARMS]
    assert family_of(None) is None
    for index in (8, -1):
        with pytest.raises(IndexError):
            family_of(index)

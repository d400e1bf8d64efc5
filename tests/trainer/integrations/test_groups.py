"""Completions of one question are scored together, and what has no score has no number."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from looper_schemas.scoring import Limits, Purpose
from looper_trainer.integrations.groups import Sample, figures, runs, score_groups
from looper_trainer.reward_client import RewardClient
from looper_trainer.testing import FakeRewardServer


@pytest.fixture
def server() -> Iterator[FakeRewardServer]:
    limits = Limits(max_questions=64, max_arms=4, max_text_chars=10_000, max_body_bytes=2**20)
    with FakeRewardServer(key="k", limits=limits) as running:
        yield running


@pytest.fixture
def client(server: FakeRewardServer) -> Iterator[RewardClient]:
    with RewardClient(server.url, "k", run_id="r", give_up_after_s=2) as made:
        yield made


def sample(question: str, answer: str) -> Sample:
    return Sample(question=question, gold_answer="4", text=f"Answer: #### {answer}")


def test_a_run_of_equal_keys_is_a_group() -> None:
    assert runs(["a", "a", "b", "a"], None) == [range(2), range(2, 3), range(3, 4)]
    assert runs([], None) == []


def test_two_groups_of_the_same_question_stay_two_when_their_size_is_known() -> None:
    assert runs(["a"] * 4, 2) == [range(2), range(2, 4)]
    with pytest.raises(ValueError, match="no whole groups of 3"):
        runs(["a"] * 4, 3)
    with pytest.raises(ValueError, match="mixes questions"):
        runs(["a", "b"], 2)


def test_the_completions_of_a_question_travel_in_one_group(
    server: FakeRewardServer, client: RewardClient
) -> None:
    groups = [[sample("2+2?", "4"), sample("2+2?", "5")], [sample("1+3?", "4")], [sample("2+2?", "4")]]
    outcomes = score_groups(client, groups, step=7, purpose=Purpose.TRAIN)
    assert [[o.reward for o in group] for group in outcomes] == [[1.0, -0.5], [1.0], [1.0]]
    assert [[o.correct for o in group] for group in outcomes] == [[True, False], [True], [True]]
    (request,) = server.requests
    assert request.step == 7
    assert [len(question.arms) for question in request.questions] == [2, 1, 1]
    first, _, third = (question.id for question in request.questions)
    assert third == f"{first}#2"


def test_a_question_that_fails_has_no_number_and_a_reason(
    server: FakeRewardServer, client: RewardClient
) -> None:
    groups = [[sample("2+2?", "4")] * 5, [sample("1+3?", "4")] * 2]
    failed, scored = score_groups(client, groups, step=0, purpose=Purpose.TRAIN)
    assert [(o.reward, o.error) for o in failed] == [(None, "request_too_large")] * 5
    assert [o.reward for o in scored] == [1.0, 1.0]
    assert figures([*failed, *scored])["failed_share"] == pytest.approx(5 / 7)
    assert figures(failed) == {"failed_share": 1.0}

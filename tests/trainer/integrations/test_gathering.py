"""Samples that come one at a time are scored in whole groups."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from looper_trainer.errors import RewardUnavailable
from looper_trainer.integrations.gathering import Gatherer
from looper_trainer.integrations.groups import Outcome, Sample


def sample(question: str, text: str) -> Sample:
    return Sample(question=question, gold_answer="4", text=text)


class Recorder:
    """Scores each text by its length and keeps the groups it was given."""

    def __init__(self) -> None:
        self.calls: list[list[list[str]]] = []

    def __call__(self, groups: Sequence[Sequence[Sample]]) -> list[list[Outcome]]:
        self.calls.append([[one.text for one in group] for group in groups])
        return [[Outcome(float(len(one.text)), group_size=len(group)) for one in group] for group in groups]


async def ask(gatherer: Gatherer, samples: Sequence[Sample], size: int) -> list[Outcome]:
    return list(await asyncio.gather(*(gatherer.outcome(one, size) for one in samples)))


def test_samples_of_a_question_meet_however_they_come() -> None:
    score = Recorder()
    samples = [sample("a", "1"), sample("b", "22"), sample("a", "333"), sample("b", "4444")]
    outcomes = asyncio.run(ask(Gatherer(score, wait_s=60), samples, 2))
    assert [outcome.reward for outcome in outcomes] == [1.0, 2.0, 3.0, 4.0]
    assert score.calls == [[["1", "333"], ["22", "4444"]]]


def test_equal_texts_are_separate_samples_and_a_full_group_begins_a_new_one() -> None:
    score = Recorder()
    outcomes = asyncio.run(ask(Gatherer(score, wait_s=60), [sample("a", "x")] * 4, 2))
    assert [outcome.group_size for outcome in outcomes] == [2] * 4
    assert score.calls == [[["x", "x"], ["x", "x"]]]


def test_an_incomplete_group_is_scored_after_the_wait_and_says_its_size() -> None:
    outcomes = asyncio.run(ask(Gatherer(Recorder(), wait_s=0.05), [sample("a", "1"), sample("a", "22")], 3))
    assert [outcome.group_size for outcome in outcomes] == [2, 2]


def test_a_sample_that_is_withdrawn_is_no_arm() -> None:
    score = Recorder()

    async def run() -> list[Outcome]:
        gatherer = Gatherer(score, wait_s=60)
        gone = asyncio.create_task(gatherer.outcome(sample("a", "gone"), 2))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        return await ask(gatherer, [sample("a", "1"), sample("a", "22")], 2)

    asyncio.run(run())
    assert score.calls == [[["1", "22"]]]


def test_a_failure_reaches_every_sample_and_the_next_group_is_asked_again() -> None:
    score = Recorder()
    broken = [True]

    def fails_once(groups: Sequence[Sequence[Sample]]) -> list[list[Outcome]]:
        if broken.pop() if broken else False:
            raise RewardUnavailable("away")
        return score(groups)

    async def run() -> None:
        gatherer = Gatherer(fails_once, wait_s=60)
        asked = [gatherer.outcome(sample("a", text), 2) for text in ("1", "22")]
        assert [type(one) for one in await asyncio.gather(*asked, return_exceptions=True)] == [
            RewardUnavailable
        ] * 2
        assert [o.reward for o in await ask(gatherer, [sample("a", "1"), sample("a", "22")], 2)] == [1.0, 2.0]

    asyncio.run(run())
    with pytest.raises(IndexError):
        broken.pop()

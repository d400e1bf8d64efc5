from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from looper_schemas.scoring import Arm, FailedQuestion, Question, RewardMode, ScoredQuestion
from reward_service.batching import Batcher

pytestmark = pytest.mark.anyio


def questions(prefix: str, count: int, arms: int = 2, text: str = "fine") -> list[Question]:
    return [
        Question(
            id=f"{prefix}{i}",
            question=f"{text} {prefix}{i}",
            arms=tuple(Arm(id=str(a), full_text=f"{prefix}{i}") for a in range(arms)),
        )
        for i in range(count)
    ]


@pytest.fixture
def batcher(engine: Any) -> Iterator[Batcher]:
    batcher = Batcher(engine, batch_arms=4)
    batcher.start()
    yield batcher
    engine.gate.set()
    batcher.stop()


def asked(engine: Any) -> list[list[str]]:
    """The questions of each batch by their text, because ids inside a batch are the batcher's own."""
    return [[question.question.split()[-1] for question in batch] for batch in engine.batches]


async def test_waiting_requests_take_turns(engine: Any, batcher: Batcher, until: Any) -> None:
    engine.gate.clear()
    first = batcher.submit(questions("x", 1), RewardMode.ARM)
    await until(lambda: bool(engine.batches))
    jobs = [
        batcher.submit(questions(name, count), RewardMode.ARM)
        for name, count in (("a", 5), ("b", 1), ("c", 2))
    ]
    engine.gate.set()
    for job in (first, *jobs):
        results = await job.wait(5)
        assert [result.id for result in results] == [question.id for question in job.questions]
        assert all(isinstance(result, ScoredQuestion) for result in results)
    assert asked(engine) == [["x0"], ["a0", "b0"], ["c0", "a1"], ["c1", "a2"], ["a3", "a4"]]


async def test_accounts_take_turns_however_many_requests_one_has(
    engine: Any, batcher: Batcher, until: Any
) -> None:
    engine.gate.clear()
    first = batcher.submit(questions("x", 1), RewardMode.ARM, account="greedy")
    await until(lambda: bool(engine.batches))
    jobs = [batcher.submit(questions(f"g{n}-", 2), RewardMode.ARM, account="greedy") for n in range(50)]
    other = batcher.submit(questions("o", 3), RewardMode.ARM, account="other")
    large = batcher.submit(questions("l", 2, arms=9), RewardMode.ARM, account="greedy")
    engine.gate.set()
    for job in (first, *jobs, other, large):
        assert len(await job.wait(5)) == len(job.questions)
    # Two questions fit a batch: one of either account, and the requests of an account take turns.
    assert asked(engine)[1:5] == [["g0-0", "o0"], ["g1-0", "o1"], ["g2-0", "o2"], ["g3-0", "g4-0"]]


async def test_modes_are_never_mixed_and_none_starves(engine: Any, batcher: Batcher, until: Any) -> None:
    engine.gate.clear()
    modes = list(RewardMode)
    blocker = batcher.submit(questions("x", 1), modes[0])
    await until(lambda: bool(engine.batches))
    jobs = [batcher.submit(questions(mode.value, 2), mode) for mode in modes for _ in range(2)]
    engine.gate.set()
    await asyncio.gather(blocker.wait(5), *(job.wait(5) for job in jobs))
    for batch in asked(engine):
        assert len({name.rstrip("0123456789") for name in batch}) == 1


async def test_equal_ids_of_two_requests_do_not_meet(engine: Any, batcher: Batcher, until: Any) -> None:
    engine.gate.clear()
    blocker = batcher.submit(questions("x", 1), RewardMode.ARM)
    await until(lambda: bool(engine.batches))
    jobs = [
        batcher.submit(
            [Question(id="q", question=f"t {text}", arms=(Arm(id="0", full_text=text),))], RewardMode.ARM
        )
        for text in ("1", "22", "333")
    ]
    engine.gate.set()
    await blocker.wait(5)
    rewards = [(await job.wait(5))[0] for job in jobs]
    # The fake's reward of a wrong arm is -.5 + .001 a character.
    assert [r.reward for r in rewards if isinstance(r, ScoredQuestion)] == pytest.approx(
        [-0.499, -0.498, -0.497]
    )
    assert len({question.id for question in engine.batches[1]}) == 3


async def test_a_question_of_any_size_is_a_batch(engine: Any, batcher: Batcher) -> None:
    big = batcher.submit(questions("big", 1, arms=50), RewardMode.ARM)
    none = batcher.submit(questions("none", 9, arms=0), RewardMode.ARM)
    assert len(await big.wait(5)) == 1
    assert len(await none.wait(5)) == 9
    assert max(map(len, engine.batches)) <= 4


async def test_a_failing_batch_is_halved_until_one_question_fails_alone(engine: Any) -> None:
    batcher = Batcher(engine, batch_arms=100)
    batcher.start()
    good, bad = questions("g", 7), questions("p", 1, text="poison")
    results = await batcher.submit([*good[:5], *bad, *good[5:]], RewardMode.ARM).wait(5)
    batcher.stop()
    failures = [result.id for result in results if isinstance(result, FailedQuestion)]
    assert failures == ["p0"]
    assert [len(batch) for batch in engine.batches] == [8, 4, 4, 2, 1, 1, 2]


async def test_an_engine_whose_results_do_not_match_fails_instead_of_mixing_up(
    engine: Any, batcher: Batcher
) -> None:
    plain = engine.score
    engine.score = lambda batch, mode, fresh: (
        plain(batch, mode)[::-1] if len(batch) > 1 else plain(batch, mode)[:0]
    )
    results = await batcher.submit(questions("a", 2), RewardMode.ARM).wait(5)
    assert all(isinstance(result, FailedQuestion) for result in results)


async def test_stopping_ends_the_thread(engine: Any) -> None:
    batcher = Batcher(engine, 4)
    batcher.start()
    batcher.stop()
    assert not any(thread.is_alive() for thread in batcher._threads)


async def test_the_speed_estimate_follows_the_engine(engine: Any) -> None:
    batcher = Batcher(engine, 4)
    batcher.start()
    before = batcher.seconds_per_arm
    for _ in range(50):
        await batcher.submit(questions("a", 1, arms=4), RewardMode.ARM).wait(5)
    batcher.stop()
    assert batcher.seconds_per_arm < before / 10  # the fake takes microseconds, the first guess is 50 ms

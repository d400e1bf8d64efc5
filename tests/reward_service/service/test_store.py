from __future__ import annotations

import asyncio
from typing import Any

import pytest

from reward_service.errors import ProblemError
from reward_service.store import Reply, ReplyStore, StoreKey

pytestmark = pytest.mark.anyio


async def never() -> None:
    await asyncio.Event().wait()


class Work:
    """Counts how often it was done."""

    def __init__(self, body: bytes = b"body", final: bool = True) -> None:
        self.reply, self.done = Reply(body, final), 0

    async def __call__(self) -> Reply:
        self.done += 1
        return self.reply


async def ask(store: ReplyStore, name: str, work: Any, digest: str = "d") -> bytes | None:
    return await store.reply(StoreKey("key", name), digest, work, never, 1.0)


async def test_the_least_recently_used_reply_goes_first() -> None:
    store, work = ReplyStore(entries=2, max_bytes=1000, ttl_s=60), Work()
    for name in ("a", "b", "a", "c", "a", "b"):  # a stays, b is dropped by c and done again
        await ask(store, name, work)
    assert work.done == 4


async def test_bytes_are_bounded() -> None:
    store, work = ReplyStore(entries=100, max_bytes=100, ttl_s=60), Work(b"x" * 60)
    for name in ("a", "b", "a"):
        await ask(store, name, work)
    assert work.done == 3
    huge = Work(b"x" * 101)
    await ask(store, "h", huge)
    assert await ask(store, "h", huge) == b"x" * 101
    assert huge.done == 2


async def test_replies_expire() -> None:
    store, work = ReplyStore(entries=2, max_bytes=1000, ttl_s=0.05), Work()
    await ask(store, "a", work)
    await asyncio.sleep(0.06)
    await ask(store, "a", work, digest="other")  # the old body is forgotten, so this is no mismatch
    assert work.done == 2


async def test_a_reply_that_is_not_final_and_an_error_are_not_kept() -> None:
    store, half = ReplyStore(2, 1000, 60), Work(final=False)
    await ask(store, "a", half)
    await ask(store, "a", half)
    assert half.done == 2

    async def broken() -> Reply:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await ask(store, "b", broken)
    assert await ask(store, "b", Work()) == b"body"


async def test_work_that_everybody_left_is_cancelled_and_not_joined_again() -> None:
    store = ReplyStore(2, 1000, 60)
    ended = asyncio.Event()

    async def endless() -> Reply:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError

    async def soon() -> None:
        await asyncio.sleep(0.02)

    assert await store.reply(StoreKey("key", "a"), "d", endless, soon, 1.0) is None
    assert await ask(store, "a", Work()) == b"body"
    await asyncio.wait_for(ended.wait(), 1)


async def test_without_a_key_nothing_is_kept_or_compared() -> None:
    store, work = ReplyStore(2, 1000, 60), Work()
    for digest in ("d", "d", "e"):
        assert await store.reply(None, digest, work, never, 1.0) == b"body"
    assert work.done == 3


async def test_racing_duplicates_do_the_work_once() -> None:
    store, calls = ReplyStore(2, 1000, 60), 0

    async def slow() -> Reply:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0.02)
        return Reply(b"body", True)

    assert await asyncio.gather(*(ask(store, "a", slow) for _ in range(20))) == [b"body"] * 20
    assert calls == 1
    with pytest.raises(ProblemError, match="idempotency_mismatch"):
        await ask(store, "a", slow, digest="other")

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from reward_service.errors import ProblemError
from reward_service.state import Kept, StoreKey
from reward_service.store import ReplyStore

pytestmark = pytest.mark.anyio


async def never() -> None:
    await asyncio.Event().wait()


class Memory:
    """Finds what was put into it."""

    def __init__(self) -> None:
        self.kept: dict[StoreKey, Kept] = {}

    async def find(self, key: StoreKey) -> Kept | None:
        await asyncio.sleep(0)
        return self.kept.get(key)


class Work:
    """Counts how often it was done."""

    def __init__(self, body: bytes = b"body") -> None:
        self.body, self.done = body, 0

    async def __call__(self) -> bytes:
        self.done += 1
        return self.body


async def ask(store: ReplyStore, name: str, work: Any, digest: str = "d") -> bytes | None:
    return await store.reply(StoreKey("key", name), digest, work, never, 1.0)


async def test_what_was_kept_is_found_and_not_done_again() -> None:
    memory, work = Memory(), Work()
    memory.kept[StoreKey("key", "a")] = Kept("d", b"kept")
    store = ReplyStore(memory.find)
    assert await ask(store, "a", work) == b"kept"
    assert work.done == 0
    with pytest.raises(ProblemError, match="idempotency_mismatch"):
        await ask(store, "a", work, digest="other")
    assert await ask(store, "b", work) == b"body"


async def test_an_error_is_not_kept() -> None:
    store = ReplyStore(Memory().find)

    async def broken() -> bytes:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await ask(store, "b", broken)
    assert await ask(store, "b", Work()) == b"body"


async def test_work_that_everybody_left_is_cancelled_and_not_joined_again() -> None:
    store = ReplyStore(Memory().find)
    ended = asyncio.Event()

    async def endless() -> bytes:
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


async def test_without_a_key_nothing_is_looked_up_or_compared() -> None:
    async def find(key: StoreKey) -> Kept | None:
        raise AssertionError

    store, work = ReplyStore(find), Work()
    for digest in ("d", "d", "e"):
        assert await store.reply(None, digest, work, never, 1.0) == b"body"
    assert work.done == 3


async def test_racing_duplicates_do_the_work_once() -> None:
    store, calls = ReplyStore(Memory().find), 0

    async def slow() -> bytes:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0.02)
        return b"body"

    assert await asyncio.gather(*(ask(store, "a", slow) for _ in range(20))) == [b"body"] * 20
    assert calls == 1
    racing = asyncio.gather(ask(store, "a", slow), ask(store, "a", slow, "other"), return_exceptions=True)
    first, other = await racing
    assert first == b"body"
    assert isinstance(other, ProblemError)

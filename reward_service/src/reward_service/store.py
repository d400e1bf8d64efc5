"""Replies by idempotency key: the same key and body give the same bytes, and the work is done once.

In memory and bounded; a restart forgets. That costs a client nothing but time, because scoring is
deterministic: the same request gives the same bytes anyway.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, NamedTuple

from looper_schemas.problems import ProblemCode
from reward_service.errors import ProblemError


class Reply(NamedTuple):
    """A 200 body. `final` is False when trying again may give more (a question failed in a retryable way)."""

    body: bytes
    final: bool


class StoreKey(NamedTuple):
    """An idempotency key belongs to the API key that used it."""

    key_id: str
    idempotency_key: str


@dataclass
class _Flight:
    digest: str
    task: asyncio.Task[Reply]
    waiters: int = 0


class _Kept(NamedTuple):
    digest: str
    body: bytes
    expires: float


class ReplyStore:
    """Replies in flight and replies kept, least recently used ones dropped first."""

    def __init__(self, entries: int, max_bytes: int, ttl_s: float) -> None:
        self._entries = entries
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._kept: OrderedDict[StoreKey, _Kept] = OrderedDict()
        self._bytes = 0
        self._flights: dict[StoreKey, _Flight] = {}

    async def reply(
        self,
        key: StoreKey | None,
        digest: str,
        produce: Callable[[], Coroutine[Any, Any, Reply]],
        gone: Callable[[], Coroutine[Any, Any, None]],
        seconds: float,
    ) -> bytes | None:
        """The body for the request `digest`: kept, joined in flight, or produced; None when nobody waits.

        `gone` ends when the client disconnects. Work that nobody waits for any more is cancelled.

        Raises:
            ProblemError: the key was used with another body; or the same request, already in flight, does
                not end within `seconds`; or whatever `produce` raises.
        """
        kept = self._find(key, digest) if key else None
        if kept is not None:
            return kept
        flight = self._flights.get(key) if key else None
        if flight is not None and flight.digest != digest:
            raise ProblemError(ProblemCode.IDEMPOTENCY_MISMATCH)
        joined = flight is not None
        if flight is None:
            flight = self._start(key, digest, produce)
        flight.waiters += 1
        leaving = asyncio.create_task(gone())
        try:
            await asyncio.wait(
                {flight.task, leaving},
                return_when=asyncio.FIRST_COMPLETED,
                timeout=seconds if joined else None,
            )
            if flight.task.done():
                return flight.task.result().body
            if leaving.done():
                return None
            raise ProblemError(ProblemCode.REQUEST_IN_FLIGHT, retry_after_s=1.0)
        finally:
            leaving.cancel()
            flight.waiters -= 1
            if flight.waiters == 0 and not flight.task.done():
                self._forget(key, flight)
                flight.task.cancel()

    def _start(
        self, key: StoreKey | None, digest: str, produce: Callable[[], Coroutine[Any, Any, Reply]]
    ) -> _Flight:
        async def run() -> Reply:
            reply = await produce()
            if key and reply.final:
                self._keep(key, _Kept(digest, reply.body, time.monotonic() + self._ttl_s))
            return reply

        flight = _Flight(digest, asyncio.create_task(run()))
        if key:
            self._flights[key] = flight
            flight.task.add_done_callback(lambda _: self._forget(key, flight))
        return flight

    def _forget(self, key: StoreKey | None, flight: _Flight) -> None:
        if key and self._flights.get(key) is flight:
            del self._flights[key]

    def _find(self, key: StoreKey, digest: str) -> bytes | None:
        kept = self._kept.get(key)
        if kept is None:
            return None
        if kept.expires <= time.monotonic():
            self._drop(key)
            return None
        if kept.digest != digest:
            raise ProblemError(ProblemCode.IDEMPOTENCY_MISMATCH)
        self._kept.move_to_end(key)
        return kept.body

    def _keep(self, key: StoreKey, kept: _Kept) -> None:
        if key in self._kept:
            self._drop(key)
        self._kept[key] = kept
        self._bytes += len(kept.body)
        while len(self._kept) > self._entries or self._bytes > self._max_bytes:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: StoreKey) -> None:
        self._bytes -= len(self._kept.pop(key).body)

"""Requests by idempotency key: the same key and body give the same bytes, and the work is done once.

What is in flight is kept here, what was answered in the database (`state`), 24 hours long and bounded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from looper_schemas.problems import ProblemCode
from reward_service.errors import ProblemError
from reward_service.state import Kept, StoreKey

_SOON_S = 0.3  # nobody looks whether the client is still there before


@dataclass
class _Flight:
    digest: str
    task: asyncio.Task[bytes]
    waiters: int = 0
    alarms: set[asyncio.Future[None]] = field(default_factory=set)  # rung when the task ends

    def ring(self) -> None:
        """Wake whoever waits."""
        for alarm in self.alarms:
            _ring(alarm)

    async def ended(self, seconds: float) -> bool:
        """Whether the task ends within `seconds`: `asyncio.wait` at a third of its cost."""
        if not self.task.done():
            loop = asyncio.get_running_loop()
            alarm = loop.create_future()
            timer = loop.call_later(max(0.0, seconds), _ring, alarm)
            self.alarms.add(alarm)
            try:
                await alarm
            finally:
                self.alarms.discard(alarm)
                timer.cancel()
        return self.task.done()


class ReplyStore:
    """Finds replies that were given, joins those in flight, starts the others. `find` looks up the former."""

    def __init__(self, find: Callable[[StoreKey], Awaitable[Kept | None]]) -> None:
        self._find = find
        self._flights: dict[StoreKey, _Flight] = {}

    def in_flight(self, key: StoreKey) -> bool:
        """Whether a request of this key is being worked on."""
        return key in self._flights

    async def reply(
        self,
        key: StoreKey | None,
        digest: str,
        produce: Callable[[], Coroutine[Any, Any, bytes]],
        gone: Callable[[], Coroutine[Any, Any, None]],
        seconds: float,
    ) -> bytes | None:
        """The body for the request `digest`: found, joined in flight, or produced; None when nobody waits.

        `produce` keeps what it produced under `key`. `gone` ends when the client disconnects. Work that
        nobody waits for any more is cancelled.

        Raises:
            ProblemError: the key was used with another body; or the same request, already in flight, does
                not end within `seconds`; or whatever `find` and `produce` raise.
        """
        flight = self._flights.get(key) if key else None
        if flight is not None and flight.digest != digest:
            raise ProblemError(ProblemCode.IDEMPOTENCY_MISMATCH)
        joined = flight is not None
        if flight is None:
            flight = self._start(key, digest, produce)
        flight.waiters += 1
        try:
            if not await flight.ended(min(_SOON_S, seconds) if joined else _SOON_S):
                return await self._wait_watching(flight, gone, seconds - _SOON_S if joined else None)
            return flight.task.result()
        finally:
            flight.waiters -= 1
            if flight.waiters == 0 and not flight.task.done():
                self._forget(key, flight)
                flight.task.cancel()

    @staticmethod
    async def _wait_watching(
        flight: _Flight, gone: Callable[[], Coroutine[Any, Any, None]], seconds: float | None
    ) -> bytes | None:
        """As `reply`, for what takes longer: most replies are there before a client can be found gone."""
        leaving = asyncio.create_task(gone())
        try:
            await asyncio.wait(
                {flight.task, leaving},
                return_when=asyncio.FIRST_COMPLETED,
                timeout=None if seconds is None else max(0.0, seconds),
            )
            if flight.task.done():
                return flight.task.result()
            if leaving.done():
                return None
            raise ProblemError(ProblemCode.REQUEST_IN_FLIGHT, retry_after_s=1.0)
        finally:
            leaving.cancel()

    def _start(
        self, key: StoreKey | None, digest: str, produce: Callable[[], Coroutine[Any, Any, bytes]]
    ) -> _Flight:
        async def run() -> bytes:
            try:
                kept = await self._find(key) if key else None
                if kept is None:
                    return await produce()
                if kept.digest != digest:
                    raise ProblemError(ProblemCode.IDEMPOTENCY_MISMATCH)
                return kept.body
            finally:
                end()  # a turn of the loop earlier than the task's callbacks would

        def end(*_: object) -> None:
            self._forget(key, flight)
            flight.ring()

        flight = _Flight(digest, asyncio.create_task(run()))
        if key:
            self._flights[key] = flight
        flight.task.add_done_callback(end)  # for one that is cancelled before its first step
        return flight

    def _forget(self, key: StoreKey | None, flight: _Flight) -> None:
        if key and self._flights.get(key) is flight:
            del self._flights[key]


def _ring(alarm: asyncio.Future[None]) -> None:
    if not alarm.done():
        alarm.set_result(None)

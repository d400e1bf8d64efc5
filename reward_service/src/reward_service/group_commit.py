"""Group commit: what many requests want written waits for one thread, which writes all of it at once.

An fsync costs as much for a hundred lines as for one, so whatever arrives while one group is being written
makes up the next.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

ItemT = TypeVar("ItemT")
OutcomeT = TypeVar("OutcomeT")


class GroupCommit(Generic[ItemT, OutcomeT]):
    """Calls `write` with groups of items, in the order of arrival, from one thread.

    `write` returns one outcome an item; when it raises, all items of its group fail with that error.
    """

    def __init__(self, write: Callable[[Sequence[ItemT]], Sequence[OutcomeT]]) -> None:
        self._write = write
        self._waiting: list[tuple[ItemT, asyncio.Future[OutcomeT]]] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="commit", daemon=True)

    def start(self) -> None:
        """Start the writing thread."""
        self._thread.start()

    def stop(self) -> None:
        """Write what waits, then end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    async def commit(self, item: ItemT) -> OutcomeT:
        """Hand in `item`; its outcome once it is written. Cancelling the wait does not take it back.

        Raises:
            Exception: whatever `write` raised.
        """
        future: asyncio.Future[OutcomeT] = asyncio.get_running_loop().create_future()
        with self._changed:
            self._waiting.append((item, future))
            self._changed.notify()
        return await future

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._stopping:
                    self._changed.wait()
                group, self._waiting = self._waiting, []
            if not group:
                return
            outcomes: Sequence[OutcomeT] = ()
            error: Exception | None = None
            try:
                outcomes = self._write([item for item, _ in group])
                if len(outcomes) != len(group):
                    raise RuntimeError("one outcome an item")
            except Exception as caught:
                error = caught
            try:
                loop = group[0][1].get_loop()
                loop.call_soon_threadsafe(_settle, [future for _, future in group], outcomes, error)
            except RuntimeError:  # the loop is gone: nobody waits any more
                logger.warning("outcomes after shutdown are dropped")


def _settle(
    futures: Sequence[asyncio.Future[OutcomeT]], outcomes: Sequence[OutcomeT], error: Exception | None
) -> None:
    for place, future in enumerate(futures):
        if future.done():
            continue  # cancelled
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(outcomes[place])

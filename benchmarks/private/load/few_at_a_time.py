"""A selector that reports few ready sockets at a time, so that an event loop takes up few in a turn."""

from __future__ import annotations

import os
import select
import selectors
from typing import ClassVar


class FewAtATime(selectors.EpollSelector):
    """Reports at most `most` ready sockets. The others stay ready: epoll has them first next time."""

    most: ClassVar[int] = 4

    def __init__(self) -> None:
        super().__init__()
        self._few = select.epoll.fromfd(os.dup(self.fileno()))

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """As the base class's."""
        try:
            events = self._few.poll(-1 if timeout is None else max(0.0, timeout), self.most)
        except InterruptedError:
            return []
        ready = []
        known = self.get_map()
        for descriptor, event in events:
            key = known[descriptor]
            mask = 0
            if event & ~select.EPOLLIN:
                mask |= selectors.EVENT_WRITE
            if event & ~select.EPOLLOUT:
                mask |= selectors.EVENT_READ
            ready.append((key, mask & key.events))
        return ready

    def close(self) -> None:
        """As the base class's."""
        self._few.close()
        super().close()

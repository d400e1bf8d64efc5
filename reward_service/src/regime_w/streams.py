"""Windows of all callers, embedded together by a few threads.

A caller hands over its windows and waits. Every stream (one thread, one core or one GPU) takes the oldest
windows of whoever waits, sorted by length, up to a budget of tokens; when less than that waits for each idle
stream, they share it, so that one small request is spread over all cores. A window has the same bits in any
company, so none of this shows in a vector.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Window = Sequence[int]
Sums = npt.NDArray[np.float64]  # (d,): the sum of a window's token vectors
Forward = Callable[[Sequence[Window]], Sequence[Sums]]

_NICER_BY = 5  # a stream yields to the event loop, which only ever runs for a moment


@dataclass
class _Call:
    """The windows of one caller."""

    results: list[Sums | None]
    missing: int
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None


class StreamPool:
    """Calls `forward` from `streams` threads, with at most `chunk_tokens` tokens unless one window has more.

    `enter` runs once in each thread before anything else.
    """

    def __init__(
        self, forward: Forward, streams: int, chunk_tokens: int, enter: Callable[[], Any] = lambda: None
    ) -> None:
        self._forward = forward
        self._chunk_tokens = chunk_tokens
        self._enter = enter
        self._waiting: deque[tuple[_Call, int, Window]] = deque()
        self._tokens = 0  # of the windows that wait
        self._idle = 0
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"stream-{i}", daemon=True) for i in range(streams)
        ]
        for thread in self._threads:
            thread.start()

    def __call__(self, windows: Sequence[Window]) -> list[Sums]:
        """The sum of token vectors of each window, in order; safe to call from many threads.

        Raises:
            Exception: whatever `forward` raised for a chunk that held one of them.
        """
        if not windows:
            return []
        call = _Call([None] * len(windows), len(windows))
        with self._changed:
            if self._closed:
                raise RuntimeError("the streams are closed")
            self._waiting.extend((call, i, window) for i, window in enumerate(windows))
            self._tokens += sum(map(len, windows))
            self._changed.notify_all()
        call.done.wait()
        if call.error is not None:
            raise call.error
        return [result for result in call.results if result is not None]

    def close(self) -> None:
        """End the threads once nothing waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        with suppress(OSError, AttributeError):  # not on every system
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _niceness() + _NICER_BY)
        self._enter()
        while True:
            with self._changed:
                self._idle += 1
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if not self._waiting:
                    return
                chunk = self._take()
                self._idle -= 1
            if chunk:
                self._compute(chunk)

    def _take(self) -> list[tuple[_Call, int, Window]]:
        fair_share = -(-self._tokens // self._idle)
        budget = min(self._chunk_tokens, fair_share)
        chunk: list[tuple[_Call, int, Window]] = []
        size = 0
        while self._waiting:
            length = len(self._waiting[0][2])
            if chunk and (size + length > self._chunk_tokens or size + length // 2 > budget):
                break
            entry = self._waiting.popleft()
            self._tokens -= len(entry[2])
            if entry[0].error is None:  # else its caller is gone
                chunk.append(entry)
                size += len(entry[2])
        return chunk

    def _compute(self, chunk: list[tuple[_Call, int, Window]]) -> None:
        chunk.sort(key=lambda entry: len(entry[2]))
        error: BaseException | None = None
        sums: Sequence[Sums] = ()
        try:
            sums = self._forward([window for _, _, window in chunk])
            if len(sums) != len(chunk):
                raise RuntimeError(f"{len(sums)} results for {len(chunk)} windows")
        except BaseException as raised:
            error = raised
        with self._changed:
            for place, (call, index, _) in enumerate(chunk):
                if error is not None:
                    call.error = error
                    call.done.set()
                    continue
                call.results[index] = sums[place]
                call.missing -= 1
                if call.missing == 0:
                    call.done.set()


def usable_cores() -> int:
    """How many cores this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def _niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

"""The threads that embed: order, sharing, failures; with a plain sum in place of a model."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from regime_w.streams import StreamPool, Window


class Summing:
    """Sums of tokens; records its chunks. `gate` holds it back; a token 666 makes it raise."""

    def __init__(self) -> None:
        self.chunks: list[list[Window]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Semaphore(0)

    def __call__(self, windows: Sequence[Window]) -> list[Any]:
        self.chunks.append(list(windows))
        self.started.release()
        assert self.gate.wait(30)
        if any(666 in window for window in windows):
            raise ValueError("poison")
        return [np.array([float(sum(window))]) for window in windows]


def test_results_come_in_the_order_of_the_windows_whatever_the_chunks() -> None:
    pool = StreamPool(Summing(), streams=3, chunk_tokens=7)
    rng = np.random.default_rng(0)
    calls = [
        [[int(t) for t in rng.integers(1, 99, size=n)] for n in rng.integers(1, 9, size=20)]
        for _ in range(40)
    ]
    with ThreadPoolExecutor(8) as callers:
        for call, sums in zip(calls, callers.map(pool, calls), strict=True):
            assert [float(total[0]) for total in sums] == [float(sum(window)) for window in call]
    assert pool([]) == []
    pool.close()


def test_a_chunk_keeps_its_budget_and_is_sorted_by_length() -> None:
    forward = Summing()
    pool = StreamPool(forward, streams=1, chunk_tokens=10)
    pool([[1] * n for n in (4, 1, 3, 2, 6, 25, 1)])
    pool.close()
    assert [[len(window) for window in chunk] for chunk in forward.chunks] == [[1, 2, 3, 4], [6], [25], [1]]


def test_one_small_call_is_spread_over_idle_streams() -> None:
    forward = Summing()
    forward.gate.clear()
    pool = StreamPool(forward, streams=2, chunk_tokens=1000)
    with ThreadPoolExecutor(1) as caller:
        answer = caller.submit(pool, [[1] * 5] * 8)
        assert all(forward.started.acquire(timeout=10) for _ in range(2))  # both work at the same time
        forward.gate.set()
        assert len(answer.result(10)) == 8
    pool.close()
    assert sum(map(len, forward.chunks)) == 8
    assert min(map(len, forward.chunks)) >= 2


def test_windows_of_several_callers_share_a_chunk() -> None:
    forward = Summing()
    forward.gate.clear()
    pool = StreamPool(forward, streams=1, chunk_tokens=1000)
    with ThreadPoolExecutor(3) as callers:
        first = callers.submit(pool, [[1]])
        assert forward.started.acquire(timeout=10)
        others = [callers.submit(pool, [[i] * 3]) for i in (2, 3)]
        while pool._tokens < 6:
            threading.Event().wait(0.001)
        forward.gate.set()
        assert float(first.result(10)[0][0]) == 1.0
        assert sorted(float(other.result(10)[0][0]) for other in others) == [6.0, 9.0]
    pool.close()
    assert [len(chunk) for chunk in forward.chunks] == [1, 2]


def test_a_failure_reaches_its_callers_and_the_streams_live_on() -> None:
    pool = StreamPool(Summing(), streams=1, chunk_tokens=3)
    with pytest.raises(ValueError, match="poison"):
        pool([[1, 1, 1], [666], [1, 1, 1]])
    assert float(pool([[1, 2]])[0][0]) == 3.0
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool([[1]])


def test_each_stream_is_prepared_before_it_computes() -> None:
    names: list[str] = []
    pool = StreamPool(Summing(), 2, 10, lambda: names.append(threading.current_thread().name))
    pool([[1]])
    pool.close()
    assert sorted(names) == ["stream-0", "stream-1"]

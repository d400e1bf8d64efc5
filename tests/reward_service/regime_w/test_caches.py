"""Memories: bounds, what is kept, and callers that ask for the same thing at the same time."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regime_w.caches import CachedEmbedder, Memory, digest_of
from regime_w.embedding import Vectors


def test_the_least_recently_used_value_goes_first() -> None:
    memory: Memory[str] = Memory(entries=2, most=100)
    memory.put(b"a", "A")
    memory.put(b"b", "B")
    assert memory.get(b"a") == "A"
    memory.put(b"c", "C")
    assert [memory.get(key) for key in (b"a", b"b", b"c")] == ["A", None, "C"]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 30))))
def test_weight_and_count_stay_within_bounds(puts: list[tuple[int, int]]) -> None:
    memory: Memory[int] = Memory(entries=4, most=50, weigh=lambda value: value)
    for key, value in puts:
        memory.put(bytes([key]), value)
        kept = [found for k in range(10) if (found := memory._values.get(bytes([k])))]
        assert len(kept) <= 4
        assert memory.weight == sum(value for value, _ in kept) <= 50


def test_a_value_heavier_than_the_bound_is_not_kept() -> None:
    memory: Memory[str] = Memory(entries=9, most=3, weigh=len)
    memory.put(b"k", "long text")
    assert memory.get(b"k") is None
    assert memory.weight == 0


def test_parts_do_not_run_into_each_other() -> None:
    assert len({digest_of("ab", "c"), digest_of("a", "bc"), digest_of("abc"), digest_of("abc", "")}) == 4


class Slow:
    identity = "slow"

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.gate = threading.Event()
        self.started = threading.Event()
        self.fails = False

    def embed(self, texts: Sequence[str]) -> Vectors:
        self.asked += texts
        self.started.set()
        assert self.gate.wait(30)
        if self.fails and "own" in texts:
            raise RuntimeError("no")
        return np.array([[len(text), 1.0] for text in texts], dtype=np.float32)


@pytest.mark.parametrize("fails", [False, True])
def test_a_text_asked_for_twice_at_once_is_computed_once_unless_that_fails(fails: bool) -> None:
    inner = Slow()
    inner.fails = fails
    cache = CachedEmbedder(inner, entries=9)
    with ThreadPoolExecutor(2) as callers:
        first = callers.submit(cache.embed, ["same", "own"])
        assert inner.started.wait(10)
        second = callers.submit(cache.embed, ["same", "other"])
        while len(inner.asked) < 3:
            threading.Event().wait(0.001)
        inner.gate.set()
        assert second.result(10).tolist() == [[4, 1], [5, 1]]
        if fails:
            with pytest.raises(RuntimeError):
                first.result(10)
        else:
            assert first.result(10).tolist() == [[4, 1], [3, 1]]
    assert inner.asked.count("same") == (2 if fails else 1)
    assert not cache._flights

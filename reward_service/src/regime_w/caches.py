"""Bounded memories of what was computed, addressed by content: the least recently used entry goes first.

Nothing here can change a result: a key is a digest of everything that its value depends on, and a value that
is no result (a failure, a vector that is not finite) is not kept.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

import numpy as np

from regime_w.embedding import Embedder, Vectors

ValueT = TypeVar("ValueT")


def digest_of(*parts: str) -> bytes:
    """A 20-byte name of `parts`; two lists of parts that differ have different names."""
    digest = hashlib.blake2b(digest_size=20)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.digest()


class Memory(Generic[ValueT]):
    """At most `entries` values of total `weight` at most `most`; safe to use from several threads."""

    def __init__(self, entries: int, most: int, weigh: Callable[[ValueT], int] = lambda _: 1) -> None:
        self._entries = entries
        self._most = most
        self._weigh = weigh
        self._values: OrderedDict[bytes, tuple[ValueT, int]] = OrderedDict()
        self._lock = threading.Lock()
        self.weight = 0

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: bytes) -> ValueT | None:
        """The value kept under `key`, if any; it counts as used."""
        with self._lock:
            found = self._values.get(key)
            if found is None:
                return None
            self._values.move_to_end(key)
            return found[0]

    def put(self, key: bytes, value: ValueT) -> None:
        """Keep `value` under `key`, and drop the oldest ones as far as the bounds ask for it."""
        weight = self._weigh(value)
        with self._lock:
            self._put(key, value, weight)

    def keep(self, key: bytes, value: ValueT) -> ValueT:
        """As `put`, unless something is kept under `key` already; returns what counts from now on."""
        weight = self._weigh(value)
        with self._lock:
            found = self._values.get(key)
            if found is not None:
                self._values.move_to_end(key)
                return found[0]
            self._put(key, value, weight)
            return value

    def _put(self, key: bytes, value: ValueT, weight: int) -> None:
        if key in self._values:
            self.weight -= self._values.pop(key)[1]
        self._values[key] = (value, weight)
        self.weight += weight
        while self._values and (len(self._values) > self._entries or self.weight > self._most):
            self.weight -= self._values.popitem(last=False)[1][1]


class CachedEmbedder:
    """An embedder that computes each distinct text once, also for callers that ask for it at the same time,
    and remembers the most recently used ones."""

    def __init__(self, inner: Embedder, entries: int) -> None:
        self.identity = inner.identity
        self._inner = inner
        self._vectors: Memory[Vectors] = Memory(entries, entries)
        self._flights: dict[bytes, Future[Vectors]] = {}
        self._lock = threading.Lock()

    def embed(self, texts: Sequence[str]) -> Vectors:
        """As the inner embedder; safe to call from several threads."""
        if not texts:
            return self._inner.embed(texts)
        keys = [digest_of(text) for text in texts]
        found: dict[bytes, Vectors] = {}
        ours: dict[bytes, str] = {}
        theirs: dict[bytes, Future[Vectors]] = {}
        for key, text in zip(keys, texts, strict=True):
            if key in found or key in ours or key in theirs:
                continue
            vector = self._vectors.get(key)
            if vector is not None:
                found[key] = vector
                continue
            with self._lock:
                if key in self._flights:
                    theirs[key] = self._flights[key]
                else:
                    ours[key] = text
                    self._flights[key] = Future()
        found.update(self._compute(ours))
        for key, flight in theirs.items():
            try:
                found[key] = flight.result()
            except Exception:  # theirs failed, perhaps for the company it was in: ask for ours alone
                text = texts[keys.index(key)]
                found[key] = self._inner.embed([text])[0]
        return np.stack([found[key] for key in keys])

    def _compute(self, texts: dict[bytes, str]) -> dict[bytes, Vectors]:
        if not texts:
            return {}
        try:
            vectors = self._inner.embed(list(texts.values()))
        except BaseException as error:
            for key in texts:
                self._land(key).set_exception(error)
            raise
        found = {key: vector.copy() for key, vector in zip(texts, vectors, strict=True)}
        for key, vector in found.items():
            if np.isfinite(vector).all():  # a failure may be retried, so it is not remembered
                self._vectors.put(key, vector)
            self._land(key).set_result(vector)
        return found

    def _land(self, key: bytes) -> Future[Vectors]:
        with self._lock:
            return self._flights.pop(key)

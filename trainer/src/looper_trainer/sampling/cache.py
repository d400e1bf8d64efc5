"""A KV cache that grows in place.

The stock dynamic cache concatenates at every token, which copies all earlier keys and values each time; for
a small model on a CPU that is a fifth of the time of a step and most of its memory traffic. Here a layer
writes into a buffer with spare room and hands out a view of what is filled.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_ROOM = 64  # tokens of spare room at each allocation


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """A layer's keys and values (B, H, T, D), as views into buffers that hold up to `_ROOM` more tokens."""

    keys: Tensor
    values: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append (B, H, t, D) states; all keys and values, earlier ones first."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = _append(self.keys, key_states)
        self.values = _append(self.values, value_states)
        return self.keys, self.values


def _append(filled: Tensor, new: Tensor) -> Tensor:
    """`filled` and `new` along T; in place where `filled` is a view with room behind it."""
    batch, heads, added, _ = new.shape
    length = filled.shape[-2] if filled.numel() else 0
    whole = filled._base if length else None
    if whole is None or whole.dim() != 4 or whole.shape[-2] < length + added or whole.shape[0] != batch:
        whole = new.new_empty(batch, heads, length + added + _ROOM, new.shape[-1])
        if length:
            whole[:, :, :length] = filled
    whole[:, :, length : length + added] = new
    return whole[:, :, : length + added]


def make_cache(config: Any) -> DynamicCache:
    """An empty cache for a model of `config`; layers with a window of their own keep their stock form."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache

"""The growing cache against concatenation, under any sequence of appends and selections."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicLayer

from looper_trainer.sampling.cache import RoomyLayer, make_cache

operations = st.lists(
    st.integers(1, 90).map(lambda n: ("append", n)) | st.integers(0, 10**6).map(lambda n: ("select", n)),
    min_size=1,
    max_size=12,
)


@given(steps=operations)
def test_it_holds_what_concatenation_holds(steps: list[tuple[str, int]]) -> None:
    generator = torch.Generator().manual_seed(0)
    ours, stock = RoomyLayer(), DynamicLayer()
    batch = 3
    with torch.no_grad():
        for kind, number in steps:
            if kind == "append":
                keys, values = torch.randn(2, batch, 2, number, 4, generator=generator)
                for got, expected in zip(ours.update(keys, values), stock.update(keys, values), strict=True):
                    assert torch.equal(got, expected)
            elif ours.get_seq_length():
                lines = torch.tensor([number % batch, number // 7 % batch, 0])
                ours.batch_select_indices(lines)
                stock.batch_select_indices(lines)
                assert torch.equal(ours.keys, stock.keys)
            assert ours.get_seq_length() == stock.get_seq_length()


def test_appending_one_token_moves_nothing_while_there_is_room() -> None:
    layer = RoomyLayer()
    with torch.no_grad():
        keys, _ = layer.update(torch.ones(2, 1, 5, 4), torch.ones(2, 1, 5, 4))
        for _ in range(64):
            keys_now, _ = layer.update(torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 1, 4))
            assert keys_now.data_ptr() == keys.data_ptr()
        keys_now, _ = layer.update(torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 1, 4))
    assert keys_now.data_ptr() != keys.data_ptr()
    assert keys_now.sum() == 2 * 5 * 4


def test_layers_with_a_window_keep_their_own_kind() -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    full = make_cache(LlamaConfig(**sizes))
    assert [type(layer) for layer in full.layers] == [RoomyLayer, RoomyLayer]
    windowed = MistralConfig(**sizes, sliding_window=4)
    stock = [type(layer) for layer in DynamicCache(config=windowed).layers]
    assert [type(layer) for layer in make_cache(windowed).layers] == stock
    assert RoomyLayer not in stock


def test_without_a_view_to_grow_into_it_copies_and_stays_right() -> None:
    layer = RoomyLayer()
    with torch.inference_mode():  # views keep no base there
        layer.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4))
        layer.keys = layer.keys.clone()
        keys, _ = layer.update(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4))
    assert keys[0, 0, :, 0].tolist() == [1.0, 1.0, 0.0]
    assert keys.shape == (1, 1, 3, 4)

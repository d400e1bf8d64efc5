"""A BERT encoder over windows of different lengths laid end to end, without padding.

Linear layers see all tokens of a chunk as one matrix (T, d); attention sees one window at a time. What a
linear layer computes in is its own affair (`PlainLinear` here, `int8.Int8Linear`); the residual stream, layer
norms and sums are float32. A row of a matrix product does not depend on the rows beside it, so a window has
the same bits alone and in any chunk; the tests hold the installed torch to that.

Departs from `transformers.BertModel` only in what it leaves out: dropout, masks, token types other than 0,
the pooler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn import functional as F

from regime_w.streams import Sums, Window


class Linear(Protocol):
    """x (T, k) -> x W^T + b (T, n), float32 or bfloat16; each row by itself."""

    def __call__(self, x_TK: torch.Tensor, /) -> torch.Tensor: ...


class PlainLinear:
    """A linear layer in `dtype`.

    A library orders its sums by the number of rows (MKL in float32; oneDNN in bfloat16 on cores with AMX), so
    ROWS are multiplied at a time, the last ones with zeros below them.
    """

    ROWS = 256

    def __init__(self, weight_NK: torch.Tensor, bias_N: torch.Tensor, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._weight = weight_NK.to(dtype)
        self._bias = bias_N.to(dtype)

    def __call__(self, x_TK: torch.Tensor) -> torch.Tensor:
        x_TK = x_TK.to(self._dtype)
        rows = len(x_TK)
        y_TN = x_TK.new_empty(-(-rows // self.ROWS) * self.ROWS, len(self._bias))
        for begin in range(0, rows, self.ROWS):
            block_RK = x_TK[begin : begin + self.ROWS]
            if len(block_RK) < self.ROWS:
                block_RK = F.pad(block_RK, (0, 0, 0, self.ROWS - len(block_RK)))
            torch.addmm(self._bias, block_RK, self._weight.T, out=y_TN[begin : begin + self.ROWS])
        return y_TN[:rows]


MakeLinear = Callable[[str, torch.Tensor, torch.Tensor], Linear]  # name, weight (n, k), bias (n,)


class _Layer(NamedTuple):
    qkv: Linear
    attended: Linear
    attended_norm: tuple[torch.Tensor, torch.Tensor]
    up: Linear
    down: Linear
    down_norm: tuple[torch.Tensor, torch.Tensor]


class PackedBert:
    """Token-id windows in, the sum of each window's token vectors out.

    Args:
        config: the model's `config.json`.
        weights: its state dict, float32, with `BertModel` names.
        make_linear: makes each linear layer; its name is unique in the model.

    Raises:
        KeyError: a weight is missing, so this is no BERT encoder.
    """

    def __init__(
        self, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor], make_linear: MakeLinear
    ) -> None:
        self._heads = int(config["num_attention_heads"])
        self._eps = float(config["layer_norm_eps"])

        def linear(layer: str, *parts: str) -> Linear:
            names = [f"{layer}.{part}" for part in parts]
            weight = torch.cat([weights[f"{name}.weight"] for name in names])
            bias = torch.cat([weights[f"{name}.bias"] for name in names])
            return make_linear(names[0], weight, bias)

        def norm(name: str) -> tuple[torch.Tensor, torch.Tensor]:
            return weights[f"{name}.weight"], weights[f"{name}.bias"]

        self._words = weights["embeddings.word_embeddings.weight"]
        types = weights["embeddings.token_type_embeddings.weight"]
        self._positions = weights["embeddings.position_embeddings.weight"]
        self._type = types[0]
        self._norm = norm("embeddings.LayerNorm")
        self._layers = [
            _Layer(
                linear(layer, *(f"attention.self.{part}" for part in ("query", "key", "value"))),
                linear(layer, "attention.output.dense"),
                norm(f"{layer}.attention.output.LayerNorm"),
                linear(layer, "intermediate.dense"),
                linear(layer, "output.dense"),
                norm(f"{layer}.output.LayerNorm"),
            )
            for layer in (f"encoder.layer.{i}" for i in range(int(config["num_hidden_layers"])))
        ]

    @torch.inference_mode()
    def __call__(self, windows: Sequence[Window]) -> list[Sums]:
        """The sum of token vectors, (d,) float64, of each window, in order."""
        if not windows:
            return []
        lengths = [len(window) for window in windows]
        parts = torch.split(self._encode(windows, lengths), lengths)
        return [part.double().sum(dim=0).numpy() for part in parts]

    def _embed(self, chunk: Sequence[Window], lengths: list[int]) -> torch.Tensor:
        """The vectors (T, d) that the first layer sees."""
        ids_T = torch.tensor([token for window in chunk for token in window])
        positions_T = torch.cat([torch.arange(n) for n in lengths])
        # The library adds in this order.
        return self._layer_norm((self._words[ids_T] + self._type) + self._positions[positions_T], self._norm)

    def _encode(self, chunk: Sequence[Window], lengths: list[int]) -> torch.Tensor:
        hidden_TD = self._embed(chunk, lengths)
        for layer in self._layers:
            context_TD = self._attend(layer.qkv(hidden_TD), lengths)
            hidden_TD = self._layer_norm(layer.attended(context_TD) + hidden_TD, layer.attended_norm)
            inner_TI = F.gelu(layer.up(hidden_TD))
            hidden_TD = self._layer_norm(layer.down(inner_TI) + hidden_TD, layer.down_norm)
        return hidden_TD

    def _attend(self, qkv_T3D: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        contexts = []
        for part in torch.split(qkv_T3D, lengths):
            heads_31HTd = part.view(len(part), 3, 1, self._heads, -1).permute(1, 2, 3, 0, 4)
            query, key, value = heads_31HTd.unbind(0)
            context_1HTd = F.scaled_dot_product_attention(query, key, value)
            contexts.append(context_1HTd[0].transpose(0, 1).reshape(len(part), -1))
        return torch.cat(contexts)

    def _layer_norm(self, x_TD: torch.Tensor, norm: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.layer_norm(x_TD, x_TD.shape[-1:], *norm, eps=self._eps)

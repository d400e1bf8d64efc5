"""A BERT encoder over windows of different lengths laid end to end, without padding.

Linear layers see all tokens of a chunk as one matrix (T, d); attention sees one window at a time. Matrix
products are bfloat16, the residual stream, layer norms and sums are float32. A row of a matrix product
does not depend on the rows beside it, so a window has the same bits alone and in any chunk; the tests hold
the installed torch to that. Measured on this project's texts: cosines within 1.5e-3 of float32.

Departs from `transformers.BertModel` only in what it leaves out: dropout, masks, token types other than 0,
the pooler.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

CHUNK_TOKENS = 2048  # larger chunks fall out of the cache of a CPU core


class PackedBert:
    """Token-id windows in, the sum of each window's token vectors out.

    Args:
        config: the model's `config.json`.
        weights: its state dict, float32, with `BertModel` names.

    Raises:
        KeyError: a weight is missing, so this is no BERT encoder.
    """

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor], device: str) -> None:
        self._heads = int(config["num_attention_heads"])
        self._eps = float(config["layer_norm_eps"])
        self._device = device

        def get(name: str) -> torch.Tensor:
            return weights[name].to(device)

        def linear(*names: str) -> tuple[torch.Tensor, torch.Tensor]:
            weight = torch.cat([get(f"{name}.weight") for name in names])
            bias = torch.cat([get(f"{name}.bias") for name in names])
            return weight.bfloat16(), bias.bfloat16()

        def norm(name: str) -> tuple[torch.Tensor, torch.Tensor]:
            return get(f"{name}.weight"), get(f"{name}.bias")

        self._words = get("embeddings.word_embeddings.weight")
        types = get("embeddings.token_type_embeddings.weight")
        self._positions = get("embeddings.position_embeddings.weight")
        self._type = types[0]
        self._norm = norm("embeddings.LayerNorm")
        self._layers = [
            (
                linear(*(f"{layer}.attention.self.{part}" for part in ("query", "key", "value"))),
                linear(f"{layer}.attention.output.dense"),
                norm(f"{layer}.attention.output.LayerNorm"),
                linear(f"{layer}.intermediate.dense"),
                linear(f"{layer}.output.dense"),
                norm(f"{layer}.output.LayerNorm"),
            )
            for layer in (f"encoder.layer.{i}" for i in range(int(config["num_hidden_layers"])))
        ]

    @torch.inference_mode()
    def __call__(self, windows: Sequence[Sequence[int]]) -> list[npt.NDArray[np.float64]]:
        """The sum of token vectors, (d,) float64, of each window, in order."""
        sums: list[npt.NDArray[np.float64]] = []
        for chunk in _chunks(windows):
            lengths = [len(window) for window in chunk]
            hidden_TD = self._encode(chunk, lengths)
            sums += [part.double().sum(dim=0).cpu().numpy() for part in torch.split(hidden_TD, lengths)]
        return sums

    def _encode(self, chunk: Sequence[Sequence[int]], lengths: list[int]) -> torch.Tensor:
        ids_T = torch.tensor([token for window in chunk for token in window], device=self._device)
        positions_T = torch.cat([torch.arange(n, device=self._device) for n in lengths])
        # The library adds in this order.
        hidden_TD = self._layer_norm(
            (self._words[ids_T] + self._type) + self._positions[positions_T], self._norm
        )
        for qkv, attended, attended_norm, up, down, down_norm in self._layers:
            context_TD = self._attend(F.linear(hidden_TD.bfloat16(), *qkv), lengths)
            hidden_TD = self._layer_norm(F.linear(context_TD, *attended) + hidden_TD, attended_norm)
            inner_TI = F.gelu(F.linear(hidden_TD.bfloat16(), *up))
            hidden_TD = self._layer_norm(F.linear(inner_TI, *down) + hidden_TD, down_norm)
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


def _chunks(windows: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    chunk: list[Sequence[int]] = []
    size = 0
    for window in windows:
        if chunk and size + len(window) > CHUNK_TOKENS:
            yield chunk
            chunk, size = [], 0
        chunk.append(window)
        size += len(window)
    if chunk:
        yield chunk

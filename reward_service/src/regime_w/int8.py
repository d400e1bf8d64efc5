"""Linear layers in integers on a CPU: of 8 bits, the fast mode, or of 16, made of products of 8.

y = x W^T: every row of x (a token) and every row of W (an output channel) is scaled to integers in
[-127, 127]; their products are summed exactly, in 32-bit integers, so a row's bits cannot depend on the rows
beside it. Before that, input channels that are usually large are divided by s and their weights multiplied by
it (SmoothQuant, arXiv:2211.10438 eq. 4, alpha = 1/2), which halves the error. The s are powers of two, so
that small differences of arithmetic between machines do not change them.

What is usually large is seen on texts that are made here: no user's text and no file decides it.

What lies between two products is done by `row_passes`, a block of rows at a time, so that it stays in the
second-level cache; attention in float32, some heads at a time for the same reason.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from regime_w import row_passes
from regime_w.packed import Linear, MakeLinear, PackedBert, PlainLinear
from regime_w.streams import Window

CALIBRATION_TEXTS = 64
_LEAST = 1e-4  # of a channel's largest value; below it nothing is gained by scaling
_ROWS = 256  # of a block
_SCORES = 2**18  # of attention at a time, 1 MiB
_ZERO_POINT = 128  # oneDNN's fast products take unsigned inputs


class Integers(NamedTuple):
    """How rows become integers, see `row_passes`; of which type they are."""

    most: np.float32
    shift: np.float32
    dtype: torch.dtype


class Int8Linear:
    """The weights of a linear layer in 8-bit integers, and what its input is to be multiplied with.

    Args:
        weight_NK, bias_N: as in torch.nn.Linear, float32.
        smooth_K: the s of each input channel.
    """

    integers = Integers(np.float32(127), np.float32(_ZERO_POINT + 0.5), torch.uint8)

    def __init__(self, weight_NK: torch.Tensor, bias_N: torch.Tensor, smooth_K: torch.Tensor) -> None:
        weight_NK = weight_NK * smooth_K
        scale_N = weight_NK.abs().amax(dim=1).clamp_min(1e-12) / 127
        self._product = _Product((weight_NK / scale_N[:, None]).round().to(torch.int8), scale_N)
        self.bias_N = bias_N.numpy()
        self.smooth_K = (1 / smooth_K).numpy()

    def __call__(self, integers_TK: torch.Tensor) -> torch.Tensor:
        """The products (T, N), float32; without the scales of the rows and without the bias."""
        return self._product(integers_TK)


class Int16Linear(Int8Linear):
    """The same in 16 bits, as three products of 8 bits.

    With x = 256 h + l and W = 256 H + L: x W = 65536 h H + 256 (l H + h L), and l L is left out. The bytes of
    a uint16 lie in memory as l, h, so the second term is one product with twice the inputs.
    """

    # Half of 256 more than the middle: so the upper byte is the nearest multiple of 256.
    integers = Integers(np.float32(32_512), np.float32(2**15 + _ZERO_POINT + 0.5), torch.uint16)

    def __init__(self, weight_NK: torch.Tensor, bias_N: torch.Tensor, smooth_K: torch.Tensor) -> None:
        weight_NK = weight_NK * smooth_K
        scale_N = weight_NK.abs().amax(dim=1).clamp_min(1e-12) / 32_512
        whole_NK = (weight_NK / scale_N[:, None]).round().to(torch.int32)
        high_NK = (whole_NK + 128) >> 8
        low_NK = whole_NK - 256 * high_NK
        scale_N = 65_536 * scale_N  # of the rows' scale, too, 256 is left to be multiplied with
        self._product = _Product(high_NK.to(torch.int8), scale_N)
        both = torch.stack([high_NK, low_NK], dim=2).flatten(1)
        self._correction = _Product(both.to(torch.int8), scale_N)
        self.bias_N = bias_N.numpy()
        self.smooth_K = (1 / smooth_K).numpy()

    def __call__(self, integers_TK: torch.Tensor) -> torch.Tensor:
        """As `Int8Linear`."""
        high_TK = torch.empty(integers_TK.shape, dtype=torch.uint8)
        row_passes.high_bytes(integers_TK.numpy(), high_TK.numpy())
        y_TN = self._product(high_TK)
        row_passes.add_256th(y_TN.numpy(), self._correction(integers_TK.view(torch.uint8)).numpy())
        return y_TN


class _Product:
    """Sums of products of 8-bit integers, exact in 32 bits, times a channel's scale."""

    def __init__(self, weight_NK: torch.Tensor, scale_N: torch.Tensor) -> None:
        self._packed = torch.ops.onednn.qlinear_prepack(weight_NK, None)
        self._scale_N = scale_N
        self._zeros_N = torch.zeros(len(scale_N), dtype=torch.int64)

    def __call__(self, integers_TK: torch.Tensor) -> torch.Tensor:
        y_TN: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            integers_TK, 1.0, _ZERO_POINT, self._packed, self._scale_N, self._zeros_N, None,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return y_TN


class IntegerBert(PackedBert):
    """`PackedBert` whose layers are all of the class `kind`."""

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: Mapping[str, torch.Tensor],
        make_linear: MakeLinear,
        kind: type[Int8Linear],
    ) -> None:
        super().__init__(config, weights, make_linear)
        self._most, self._shift, self._dtype = kind.integers

    def _encode(self, chunk: Sequence[Window], lengths: list[int]) -> torch.Tensor:
        hidden_TD = self._embed(chunk, lengths)
        hidden = hidden_TD.numpy()
        tokens = len(hidden)
        integers_TD, scale_T = torch.empty(hidden.shape, dtype=self._dtype), np.empty(tokens, np.float32)
        layers: list[Any] = self._layers
        row_passes.quantise(
            hidden, layers[0].qkv.smooth_K, self._most, self._shift, integers_TD.numpy(), scale_T
        )
        for layer, following in itertools.pairwise((*layers, layers[-1])):
            qkv_T3D = layer.qkv(integers_TD)
            row_passes.restore(qkv_T3D.numpy(), scale_T, layer.qkv.bias_N)
            self._attend_to_integers(qkv_T3D, lengths, layer.attended.smooth_K, integers_TD, scale_T)
            for begin in range(0, tokens, _ROWS):
                block = slice(begin, begin + _ROWS)
                self._block(layer, following.qkv.smooth_K, hidden[block], integers_TD[block], scale_T[block])
        return hidden_TD

    def _block(self, layer: Any, smooth_D: Any, hidden: Any, integers: torch.Tensor, scale: Any) -> None:
        """From the attended values, in `integers` and `scale`, to the layer's output in `hidden`.

        `integers` and `scale` are left with the input of the following layer, whose s are in `smooth_D`.
        """
        row_passes.restore_add_norm_quantise(
            layer.attended(integers).numpy(), scale, layer.attended.bias_N, hidden,
            *(part.numpy() for part in layer.attended_norm), np.float32(self._eps),
            layer.up.smooth_K, self._most, self._shift, integers.numpy(), scale,
        )  # fmt: skip
        inner = layer.up(integers)
        inner_integers, inner_scale = torch.empty(inner.shape, dtype=self._dtype), np.empty_like(scale)
        row_passes.restore_gelu_quantise(
            inner.numpy(), scale, layer.up.bias_N,
            layer.down.smooth_K, self._most, self._shift, inner_integers.numpy(), inner_scale,
        )  # fmt: skip
        row_passes.restore_add_norm_quantise(
            layer.down(inner_integers).numpy(), inner_scale, layer.down.bias_N, hidden,
            *(part.numpy() for part in layer.down_norm), np.float32(self._eps),
            smooth_D, self._most, self._shift, integers.numpy(), scale,
        )  # fmt: skip

    def _attend_to_integers(
        self, qkv_T3D: torch.Tensor, lengths: list[int], smooth_D: Any, integers: torch.Tensor, scale: Any
    ) -> None:
        """The attended values, times `smooth_D`, into `integers` and `scale`."""
        begin = 0
        for part in torch.split(qkv_T3D, lengths):
            tokens = len(part)
            query, key, value = part.view(tokens, 3, self._heads, -1).permute(1, 2, 0, 3).unbind(0)
            factor = np.float32(math.log2(math.e) / math.sqrt(query.shape[-1]))
            context_HTd = torch.empty(query.shape)
            at_once = max(1, _SCORES // tokens**2)
            for first in range(0, self._heads, at_once):
                heads = slice(first, first + at_once)
                scores_HTT = torch.bmm(query[heads], key[heads].transpose(1, 2))
                row_passes.softmax(scores_HTT.numpy().reshape(-1, tokens), factor)
                torch.bmm(scores_HTT, value[heads], out=context_HTd[heads])
            end = begin + tokens
            row_passes.quantise_heads(
                context_HTd.numpy(), smooth_D, self._most, self._shift,
                integers[begin:end].numpy(), scale[begin:end],
            )  # fmt: skip
            begin = end


def integer_bert(
    config: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    calibration: Sequence[Window],
    kind: type[Int8Linear],
) -> IntegerBert:
    """The encoder with linear layers of the class `kind`.

    Args:
        config, weights: as for `PackedBert`.
        calibration: windows that show the usual sizes of activations.

    Raises:
        KeyError: this is no BERT encoder.
    """
    watched: dict[str, _Watched] = {}

    def watch(name: str, weight_NK: torch.Tensor, bias_N: torch.Tensor) -> Linear:
        watched[name] = _Watched(weight_NK, bias_N)
        return watched[name]

    PackedBert(config, weights, watch)(calibration)

    def make(name: str, weight_NK: torch.Tensor, bias_N: torch.Tensor) -> Linear:
        usual_K = watched[name].largest_K.clamp_min(_LEAST)
        ratio_K = usual_K / weight_NK.abs().amax(dim=0).clamp_min(_LEAST)
        return kind(weight_NK, bias_N, torch.exp2(torch.log2(ratio_K.sqrt()).round()))

    return IntegerBert(config, weights, make, kind)


class _Watched(PlainLinear):
    """A float32 layer that notes the largest value of each input channel."""

    def __init__(self, weight_NK: torch.Tensor, bias_N: torch.Tensor) -> None:
        super().__init__(weight_NK, bias_N, torch.float32)
        self.largest_K = torch.zeros(weight_NK.shape[1])

    def __call__(self, x_TK: torch.Tensor) -> torch.Tensor:
        self.largest_K = torch.maximum(self.largest_K, x_TK.abs().amax(dim=0))
        return super().__call__(x_TK)


def calibration_texts() -> list[str]:
    """Short worked solutions with many numbers, always the same ones."""
    return list(itertools.islice(_solutions(), CALIBRATION_TEXTS))


def _solutions() -> Iterator[str]:
    rng = random.Random(20)
    names = ["Ana", "Ben", "The baker", "Mrs. Ortiz", "A farmer", "The school", "Liam", "Each worker"]
    things = [
        "apples",
        "tickets",
        "pages",
        "dollars",
        "miles",
        "boxes",
        "hours",
        "marbles",
        "liters of water",
    ]
    templates = [
        "{n} has {a} {t}, and gets {b} more, so there are {a} + {b} = <<{a}+{b}={s}>>{s} {t} now.",
        "That makes {a} * {b} = {p} {t} in total.",
        "If half of the {p} {t} are sold for ${a} each, {n} earns {p} / 2 * {a} dollars.",
        "First we find how many {t} are left: {s} - {a} = {b}.",
        "Because {n} works {a} hours a day for {b} days, the {t} add up to {p}.",
        "So 20% of {p} is {p} * 0.2, and the rest belongs to {n}.",
        "Let x be the number of {t}; then x + {a} = {s}, hence x = {b}.",
        "But this reading would give {s} {t}, which conflicts with the {p} that the problem states.",
    ]
    while True:
        sentences = []
        for _ in range(rng.randrange(1, 9)):
            a, b = rng.randrange(2, 99), rng.randrange(2, 40)
            values = {"a": a, "b": b, "s": a + b, "p": a * b}
            template = rng.choice(templates)
            sentences.append(template.format(n=rng.choice(names), t=rng.choice(things), **values))
        yield " ".join(sentences)

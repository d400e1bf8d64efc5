"""The fast mode of a CPU: linear layers in 8-bit integers.

y = x W^T: every row of x (a token) and every row of W (an output channel) is scaled to integers in
[-127, 127]; their products are summed exactly, in 32-bit integers, so a row's bits cannot depend on the rows
beside it. Before that, input channels that are usually large are divided by s and their weights multiplied by
it (SmoothQuant, arXiv:2211.10438 eq. 4, alpha = 1/2), which halves the error. The s are powers of two, so
that small differences of arithmetic between machines do not change them.

What is usually large is seen on texts that are made here: no user's text and no file decides it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from regime_w.packed import Linear, PackedBert, PlainLinear
from regime_w.streams import Window

CALIBRATION_TEXTS = 64
_LEAST = 1e-4  # of a channel's largest value; below it nothing is gained by scaling
_ZERO_POINT = 128  # oneDNN's fast products take unsigned inputs


class Int8Linear:
    """A linear layer in 8-bit integers; float32 in and out.

    Args:
        weight_NK, bias_N: as in torch.nn.Linear, float32.
        smooth_K: the s of each input channel.
    """

    def __init__(self, weight_NK: torch.Tensor, bias_N: torch.Tensor, smooth_K: torch.Tensor) -> None:
        weight_NK = weight_NK * smooth_K
        self._scale_N = weight_NK.abs().amax(dim=1).clamp_min(1e-12) / 127
        quantised_NK = (weight_NK / self._scale_N[:, None]).round().to(torch.int8)
        self._packed = torch.ops.onednn.qlinear_prepack(quantised_NK, None)
        self._zeros_N = torch.zeros(len(bias_N), dtype=torch.int64)
        self._bias_N = bias_N
        self._inverse_smooth_K = 1 / smooth_K

    def __call__(self, x_TK: torch.Tensor) -> torch.Tensor:
        x_TK = x_TK * self._inverse_smooth_K
        largest_T1 = x_TK.abs().amax(dim=1, keepdim=True).clamp_min_(1e-12)
        # Truncation of what is shifted to be positive rounds to the nearest integer.
        integers_TK = x_TK.mul_(127 / largest_T1).add_(_ZERO_POINT + 0.5).to(torch.uint8)
        y_TN: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            integers_TK, 1.0, _ZERO_POINT, self._packed, self._scale_N, self._zeros_N, None,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return y_TN.mul_(largest_T1 / 127).add_(self._bias_N)


def int8_bert(
    config: Mapping[str, Any], weights: Mapping[str, torch.Tensor], calibration: Sequence[Window]
) -> PackedBert:
    """The encoder with 8-bit linear layers.

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

    plain = PackedBert(config, weights, watch)
    for window in calibration:
        plain([window])

    def make(name: str, weight_NK: torch.Tensor, bias_N: torch.Tensor) -> Linear:
        usual_K = watched[name].largest_K.clamp_min(_LEAST)
        ratio_K = usual_K / weight_NK.abs().amax(dim=0).clamp_min(_LEAST)
        return Int8Linear(weight_NK, bias_N, torch.exp2(torch.log2(ratio_K.sqrt()).round()))

    return PackedBert(config, weights, make)


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

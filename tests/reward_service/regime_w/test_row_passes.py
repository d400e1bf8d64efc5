"""The compiled passes against torch in float64, and what integers promise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("numba")

from regime_w import row_passes
from regime_w.int8 import Int8Linear, Int16Linear, Integers

KINDS = [Int8Linear, Int16Linear]
ROWS, WIDTH = 7, 48


def floats(seed: int, *shape: int, size: float = 1.0) -> Any:
    return (np.random.default_rng(seed).standard_normal(shape) * size).astype(np.float32)


def empty_integers(kind: Integers, *shape: int) -> tuple[torch.Tensor, Any]:
    return torch.empty(shape, dtype=kind.dtype), np.empty(shape[0], np.float32)


def values(integers: torch.Tensor, scale_T: Any, kind: Integers) -> Any:
    """What integers and their scales stand for."""
    return (integers.numpy().astype(np.float64) - np.floor(kind.shift)) * scale_T[:, None].astype(np.float64)


def assert_nearest(found: Any, scale_T: Any, exact: Any, kind: Integers, slack: float = 1e-6) -> None:
    """`found` is `exact` to half a step, and the largest of a row has the largest integer."""
    assert (np.abs(found - exact) <= 0.5 * scale_T[:, None] * 1.001 + slack).all()
    largest = np.abs(exact).max(axis=1)
    np.testing.assert_allclose(scale_T * kind.most, largest, atol=slack, rtol=1e-5)


@pytest.mark.parametrize("linear", KINDS)
def test_a_row_becomes_the_nearest_integers_of_its_own_scale(linear: type[Int8Linear]) -> None:
    kind = linear.integers
    x, smooth = floats(0, ROWS, WIDTH, size=3.0), np.exp2(floats(1, WIDTH).round())
    x[3] *= 1e4
    x[5] = 0.0
    out, scale = empty_integers(kind, ROWS, WIDTH)
    row_passes.quantise(x, smooth, kind.most, kind.shift, out.numpy(), scale)
    exact = x.astype(np.float64) * smooth
    keep = [0, 1, 2, 3, 4, 6]
    assert_nearest(values(out, scale, kind)[keep], scale[keep], exact[keep], kind)
    assert not values(out, scale, kind)[5].any()


def test_heads_are_laid_side_by_side() -> None:
    kind = Int8Linear.integers
    x, smooth = floats(2, 3, ROWS, 16), np.exp2(floats(3, 48).round())
    by_heads, plain = empty_integers(kind, ROWS, 48), empty_integers(kind, ROWS, 48)
    row_passes.quantise_heads(x, smooth, kind.most, kind.shift, by_heads[0].numpy(), by_heads[1])
    flat = np.ascontiguousarray(x.transpose(1, 0, 2).reshape(ROWS, 48))
    row_passes.quantise(flat, smooth, kind.most, kind.shift, plain[0].numpy(), plain[1])
    assert torch.equal(by_heads[0].to(torch.int32), plain[0].to(torch.int32))
    np.testing.assert_array_equal(by_heads[1], plain[1])


@pytest.mark.parametrize("linear", KINDS)
def test_gelu_is_that_of_the_error_function(linear: type[Int8Linear]) -> None:
    kind = linear.integers
    y, bias = floats(4, ROWS, WIDTH, size=4.0), floats(5, WIDTH)
    scale, smooth = np.abs(floats(6, ROWS)) + 0.1, np.exp2(floats(7, WIDTH).round())
    out, out_scale = empty_integers(kind, ROWS, WIDTH)
    exact = F.gelu(torch.tensor(y.astype(np.float64) * scale[:, None] + bias)).numpy() * smooth
    row_passes.restore_gelu_quantise(
        y, scale, bias, smooth, kind.most, kind.shift, out.numpy(), out_scale
    )  # fmt: skip
    # erf is off by 4e-6, and 1 - erf(4 / sqrt 2) is 6e-5: times a value of 10 and a smooth of 8, at most.
    assert_nearest(values(out, out_scale, kind), out_scale, exact, kind, slack=6e-4)


@pytest.mark.parametrize("linear", KINDS)
def test_the_sum_is_normalised_in_place_and_becomes_integers(linear: type[Int8Linear]) -> None:
    kind = linear.integers
    y, bias, hidden = floats(8, ROWS, WIDTH), floats(9, WIDTH), floats(10, ROWS, WIDTH)
    scale, gain, shift = np.abs(floats(11, ROWS)), floats(12, WIDTH), floats(13, WIDTH)
    smooth = np.exp2(floats(14, WIDTH).round())
    out, _ = empty_integers(kind, ROWS, WIDTH)
    before = torch.tensor(y.astype(np.float64) * scale[:, None] + bias + hidden)
    exact = F.layer_norm(before, (WIDTH,), torch.tensor(gain).double(), torch.tensor(shift).double(), 1e-12)
    row_passes.restore_add_norm_quantise(
        y, scale, bias, hidden, gain, shift, np.float32(1e-12),
        smooth, kind.most, kind.shift, out.numpy(), scale,
    )  # fmt: skip
    np.testing.assert_allclose(hidden, exact.numpy(), atol=2e-6)
    assert_nearest(values(out, scale, kind), scale, exact.numpy() * smooth, kind, slack=2e-5)


@pytest.mark.parametrize("size", [0.0, 1.0, 30.0, 1e4])
def test_softmax_is_that_of_torch(size: float) -> None:
    scores = floats(15, 40, 33, size=size) - np.float32(size)  # rows of negative numbers alone, too
    exact = torch.softmax(torch.tensor(scores).double() * 0.7, dim=-1).numpy()
    row_passes.softmax(scores, np.float32(0.7 * np.log2(np.e)))
    np.testing.assert_allclose(scores, exact, atol=1e-6 if size <= 30 else 1e-3)
    np.testing.assert_allclose(scores.sum(axis=1), 1.0, atol=1e-6)


def test_a_row_has_the_same_bits_whatever_rows_are_beside_it() -> None:
    kind = Int16Linear.integers
    y, bias, smooth = floats(16, 64, WIDTH), floats(17, WIDTH), np.ones(WIDTH, np.float32)
    scale = np.abs(floats(18, 64))

    def run(rows: slice) -> tuple[Any, Any]:
        out, out_scale = empty_integers(kind, len(y[rows]), WIDTH)
        row_passes.restore_gelu_quantise(
            y[rows].copy(), scale[rows], bias, smooth, kind.most, kind.shift, out.numpy(), out_scale
        )
        return out.numpy(), out_scale

    whole = run(slice(0, 64))
    for begin, end in ((0, 1), (5, 9), (63, 64)):
        part = run(slice(begin, end))
        np.testing.assert_array_equal(part[0], whole[0][begin:end])
        np.testing.assert_array_equal(part[1], whole[1][begin:end])


@pytest.mark.parametrize(("linear", "error"), [(Int8Linear, 2e-2), (Int16Linear, 1e-4)])
def test_a_product_of_integers_is_the_product_to_its_precision(
    linear: type[Int8Linear], error: float
) -> None:
    kind = linear.integers
    smooth = np.exp2(floats(22, 96).round())  # of inputs that differ as much in size
    x, weight, bias = floats(19, 300, 96) * smooth, floats(20, 64, 96) / smooth, floats(21, 64)
    layer = linear(torch.tensor(weight), torch.tensor(bias), torch.tensor(smooth))
    integers, scale = empty_integers(kind, 300, 96)
    row_passes.quantise(x, layer.smooth_K, kind.most, kind.shift, integers.numpy(), scale)
    y = layer(integers).numpy()
    row_passes.restore(y, scale, layer.bias_N)
    exact = x.astype(np.float64) @ weight.T.astype(np.float64) + bias
    assert np.abs(y - exact).max() <= error * np.abs(exact).max()
    alone = layer(integers[:1]).numpy()
    row_passes.restore(alone, scale[:1], layer.bias_N)
    np.testing.assert_array_equal(alone, y[:1])


def test_the_smallest_and_largest_halves_of_sixteen_bits_are_split_without_a_carry() -> None:
    kind = Int16Linear.integers
    wanted = np.array([[-32_512, -32_511, -257, -128, -1, 0, 1, 127, 128, 255, 32_511, 32_512]])
    stored = (wanted + int(np.floor(kind.shift))).astype(np.uint16)
    high = np.empty(stored.shape, np.uint8)
    row_passes.high_bytes(stored, high)
    low = stored.view(np.uint8)[:, ::2]
    np.testing.assert_array_equal((high.astype(int) - 128) * 256 + low.astype(int) - 128, wanted)

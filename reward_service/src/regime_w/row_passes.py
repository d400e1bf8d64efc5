"""What happens to a row between two integer products, in one pass over memory each; compiled by numba.

In torch these steps are a dozen operators, each of which reads and writes the whole chunk: they took longer
than the products. Here a row stays in the first-level cache from the product that made it to the integers of
the next one. A row is computed by itself, in one order, so it has the same bits in every chunk.

T tokens, K inputs, N outputs, H heads of d. "Integers" are unsigned ones and a row's scale: the row's largest
value becomes `most`; all are shifted by `shift`, whose half makes truncation find the nearest integer. What
is largest is found on the bits of floats (ordered as integers are), because compilers vectorise that.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np


def _compiled(function: Any) -> Any:
    """`function`, compiled when it is first called; kept for the next start where there is room for it."""
    options = {"nogil": True, "fastmath": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder can be written to
        return numba.njit(**options)(function)


# erf(x / sqrt 2) / x in powers of x^2, for |x| <= 4: Chebyshev interpolation, erf is off by 4e-6 at most.
_TOP = np.float32(4.0)
_C0, _C1, _C2 = np.float32(0.797883632), np.float32(-0.132968699), np.float32(0.0199210288)
_C3, _C4, _C5 = np.float32(-0.00235247953), np.float32(0.000221105782), np.float32(-1.63454419e-05)
_C6, _C7, _C8 = np.float32(9.08531472e-07), np.float32(-3.50916605e-08), np.float32(8.25978381e-10)
_C9 = np.float32(-8.81426521e-12)
# 2^x in powers of x, for 0 <= x <= 1: Chebyshev interpolation, off by 2e-7 of itself at most.
_E0, _E1, _E2 = np.float32(0.999999898), np.float32(0.69315449), np.float32(0.240141818)
_E3, _E4, _E5 = np.float32(0.0558603371), np.float32(0.00894959042), np.float32(0.00189375406)
_HALF, _ONE = np.float32(0.5), np.float32(1.0)
_MAGNITUDE = np.int32(0x7FFFFFFF)  # all bits of a float32 but its sign
_LEAST = np.int32(0x2B8CBCCC)  # the bits of 1e-12
_LEAST_POWER = np.float32(-120.0)


@_compiled
def _integers(row_K: Any, bits_K: Any, one: Any, one_bits: Any, most: Any, shift: Any, out_K: Any) -> Any:
    """`row_K` (whose bits are `bits_K`) as integers in `out_K`; their scale."""
    largest = _LEAST
    for k in range(len(row_K)):
        magnitude = bits_K[k] & _MAGNITUDE
        largest = magnitude if magnitude > largest else largest
    one_bits[0] = largest
    factor = most / one[0]
    for k in range(len(row_K)):
        out_K[k] = np.int32(row_K[k] * factor + shift)
    return one[0] / most


@_compiled
def quantise(x_TK: Any, smooth_K: Any, most: Any, shift: Any, out_TK: Any, scale_T: Any) -> None:
    """x times `smooth` as integers."""
    row_K = np.empty(x_TK.shape[1], np.float32)
    one = np.empty(1, np.float32)
    for t in range(x_TK.shape[0]):
        x_K = x_TK[t]
        for k in range(len(row_K)):
            row_K[k] = x_K[k] * smooth_K[k]
        scale_T[t] = _integers(row_K, row_K.view(np.int32), one, one.view(np.int32), most, shift, out_TK[t])


@_compiled
def quantise_heads(x_HTd: Any, smooth_K: Any, most: Any, shift: Any, out_TK: Any, scale_T: Any) -> None:
    """The heads of a token side by side, times `smooth`, as integers."""
    heads, tokens, width = x_HTd.shape
    row_K = np.empty(heads * width, np.float32)
    one = np.empty(1, np.float32)
    for t in range(tokens):
        for h in range(heads):
            x_d = x_HTd[h, t]
            for k in range(width):
                row_K[h * width + k] = x_d[k] * smooth_K[h * width + k]
        scale_T[t] = _integers(row_K, row_K.view(np.int32), one, one.view(np.int32), most, shift, out_TK[t])


@_compiled
def restore(y_TN: Any, scale_T: Any, bias_N: Any) -> None:
    """y = y scale + bias, in place."""
    for t in range(y_TN.shape[0]):
        scale, y_N = scale_T[t], y_TN[t]
        for n in range(len(y_N)):
            y_N[n] = y_N[n] * scale + bias_N[n]


@_compiled
def restore_gelu_quantise(
    y_TN: Any, scale_T: Any, bias_N: Any, smooth_N: Any, most: Any, shift: Any, out_TN: Any, out_scale_T: Any
) -> None:
    """gelu(y scale + bias) times `smooth` as integers."""
    row_N = np.empty(y_TN.shape[1], np.float32)
    one = np.empty(1, np.float32)
    for t in range(y_TN.shape[0]):
        scale, y_N = scale_T[t], y_TN[t]
        for n in range(len(row_N)):
            v = y_N[n] * scale + bias_N[n]
            x = v if v > -_TOP else -_TOP
            x = x if x < _TOP else _TOP
            u = x * x
            p = ((((_C9 * u + _C8) * u + _C7) * u + _C6) * u + _C5) * u + _C4
            p = (((p * u + _C3) * u + _C2) * u + _C1) * u + _C0
            row_N[n] = _HALF * v * (_ONE + p * x) * smooth_N[n]
        out_scale_T[t] = _integers(
            row_N, row_N.view(np.int32), one, one.view(np.int32), most, shift, out_TN[t]
        )


@_compiled
def restore_add_norm_quantise(
    y_TN: Any, scale_T: Any, bias_N: Any, hidden_TN: Any, gain_N: Any, shift_N: Any, eps: Any,
    smooth_N: Any, most: Any, shift: Any, out_TN: Any, out_scale_T: Any,
) -> None:  # fmt: skip
    """hidden = layer_norm(y scale + bias + hidden), in place; and times `smooth` as integers."""
    width = y_TN.shape[1]
    count = np.float32(width)
    row_N = np.empty(width, np.float32)
    one = np.empty(1, np.float32)
    for t in range(y_TN.shape[0]):
        scale, y_N, hidden_N = scale_T[t], y_TN[t], hidden_TN[t]
        total = np.float32(0.0)
        for n in range(width):
            v = y_N[n] * scale + bias_N[n] + hidden_N[n]
            row_N[n] = v
            total += v
        mean = total / count
        squares = np.float32(0.0)
        for n in range(width):
            v = row_N[n] - mean
            squares += v * v
        factor = _ONE / np.sqrt(squares / count + eps)
        for n in range(width):
            hidden_N[n] = (row_N[n] - mean) * factor * gain_N[n] + shift_N[n]
        for n in range(width):
            row_N[n] = hidden_N[n] * smooth_N[n]
        out_scale_T[t] = _integers(
            row_N, row_N.view(np.int32), one, one.view(np.int32), most, shift, out_TN[t]
        )


@_compiled
def softmax(scores_RT: Any, factor: Any) -> None:
    """Each row of 2^(factor scores), divided by its sum, in place. `factor` is positive."""
    rows, width = scores_RT.shape
    row_T = np.empty(width, np.float32)
    bits_T = row_T.view(np.int32)
    one = np.empty(1, np.float32)
    one_bits = one.view(np.int32)
    for r in range(rows):
        scores_T = scores_RT[r]
        score_bits_T = scores_T.view(np.int32)
        largest = np.int32(-0x80000000)
        for t in range(width):
            bits = score_bits_T[t]
            bits ^= (bits >> np.int32(31)) & _MAGNITUDE  # now ordered as the floats are
            largest = bits if bits > largest else largest
        one_bits[0] = largest ^ ((largest >> np.int32(31)) & _MAGNITUDE)
        top = one[0]
        for t in range(width):
            power = (scores_T[t] - top) * factor
            power = power if power > _LEAST_POWER else _LEAST_POWER
            whole = np.floor(power)
            x = power - whole
            row_T[t] = ((((_E5 * x + _E4) * x + _E3) * x + _E2) * x + _E1) * x + _E0
            bits_T[t] += np.int32(whole) << np.int32(23)
        total = np.float32(0.0)
        for t in range(width):
            total += row_T[t]
        share = _ONE / total
        for t in range(width):
            scores_T[t] = row_T[t] * share


@_compiled
def high_bytes(integers_TK: Any, out_TK: Any) -> None:
    """The upper byte of every uint16."""
    for t in range(integers_TK.shape[0]):
        integers_K, out_K = integers_TK[t], out_TK[t]
        for k in range(len(out_K)):
            out_K[k] = integers_K[k] >> np.uint16(8)


@_compiled
def add_256th(y_TN: Any, more_TN: Any) -> None:
    """y = y + more / 256, in place."""
    for t in range(y_TN.shape[0]):
        y_N, more_N = y_TN[t], more_TN[t]
        for n in range(len(y_N)):
            y_N[n] += more_N[n] * np.float32(1 / 256)

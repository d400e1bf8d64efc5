"""Exact numbers for the grader: digits to rationals and back, without floats.

Python refuses to convert very long digit strings (a limit that a process may lower to 640 digits), so both
directions work in pieces. Everything longer than `MAX_ANSWER_CHARS`, which is also what the wire allows for
an answer, is no answer: that bounds the cost of `1e999999999` and of a megabyte of digits.
"""

from __future__ import annotations

import re
from fractions import Fraction

MAX_ANSWER_CHARS = 10_000

_PIECE = 600  # digits; below the smallest limit a process can set
_PIECE_BASE = 10**_PIECE
_GROUPED = re.compile(r"[0-9]+(?:,[0-9]{3})+|[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}")  # 57,500 and 1,00,000


def integer(digits: str) -> int:
    """The integer written by the ASCII `digits`, however long."""
    value = 0
    for start in range(0, len(digits), _PIECE):
        piece = digits[start : start + _PIECE]
        value = value * 10 ** len(piece) + int(piece)
    return value


def digits_of(value: int) -> str:
    """`value` in decimal, however long."""
    pieces: list[str] = []
    rest = abs(value)
    while rest >= _PIECE_BASE:
        rest, low = divmod(rest, _PIECE_BASE)
        pieces.append(f"{low:0{_PIECE}d}")
    pieces.append(str(rest))
    return ("-" if value < 0 else "") + "".join(reversed(pieces))


def decimal(literal: str) -> Fraction | None:
    """An unsigned decimal such as `57,500`, `.5`, `1.50` or `2e-3`; None when malformed or too long."""
    mantissa, _, exponent = literal.replace("E", "e").partition("e")
    whole, _, fraction = mantissa.partition(".")
    if "," in whole:
        if not _GROUPED.fullmatch(whole):
            return None
        whole = whole.replace(",", "")
    if not (whole + fraction).isdecimal() or len(whole) + len(fraction) > MAX_ANSWER_CHARS:
        return None
    value = Fraction(integer(whole + fraction), 10 ** len(fraction))
    return scaled(value, exponent) if exponent else value


def scaled(value: Fraction, exponent: str) -> Fraction | None:
    """`value` times ten to the signed digits `exponent`; None when absurdly large or small."""
    power = power_of(Fraction(10), exponent)
    return None if power is None else value * power


def power_of(base: Fraction, exponent: str) -> Fraction | None:
    """`base` to the signed digits `exponent`; None when undefined or too long to write."""
    digits = exponent.lstrip("+-").lstrip("0")
    if len(digits) > 5:
        return None
    power = integer(digits) if digits else 0
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if power * size > 4 * MAX_ANSWER_CHARS:  # a decimal digit is 3.3 bits
        return None
    if exponent.startswith("-"):
        return None if base == 0 else Fraction(1) / base**power
    return base**power


def canonical(value: Fraction) -> str | None:
    """The one way to write `value`: `-3`, or in lowest terms `7/2`. None when too long."""
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > 4 * MAX_ANSWER_CHARS:
        return None
    text = digits_of(value.numerator)
    if value.denominator != 1:
        text += "/" + digits_of(value.denominator)
    return text if len(text) <= MAX_ANSWER_CHARS else None

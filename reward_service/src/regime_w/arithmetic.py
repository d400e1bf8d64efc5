"""Exact values of arithmetic expressions that strangers wrote: bounded, so that none is expensive."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

MAX_DIGITS = 30  # of one number
MAX_EXPONENT = 12
MAX_BITS = 512  # of a numerator or denominator while evaluating


def evaluate(side: Sequence[str]) -> Fraction | None:
    """The exact value of `side` (numbers, + - * / ^ % and parentheses), or None if it has none.

    `^` binds to the right and before a sign, as in mathematics; division by zero, a power that is no small
    integer, and numbers beyond MAX_BITS have no value.
    """
    parser = _Parser(side)
    try:
        value = parser.sum()
    except (_NoValueError, ZeroDivisionError):
        return None
    return value if parser.position == len(side) else None


class _NoValueError(Exception):
    pass


class _Parser:
    """Recursive descent over at most MAX_SIDE_TOKENS tokens."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens = tokens
        self.position = 0

    def peek(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self) -> str:
        self.position += 1
        return self.tokens[self.position - 1]

    def sum(self) -> Fraction:
        value = self.product()
        while self.peek() in ("+", "-"):
            value = _bounded(value + self.product() if self.take() == "+" else value - self.product())
        return value

    def product(self) -> Fraction:
        value = self.signed()
        while self.peek() in ("*", "/"):
            value = _bounded(value * self.signed() if self.take() == "*" else value / self.signed())
        return value

    def signed(self) -> Fraction:
        if self.peek() == "-":
            self.take()
            return -self.signed()
        return self.power()

    def power(self) -> Fraction:
        base = self.atom()
        if self.peek() != "^":
            return base
        self.take()
        exponent = self.signed()
        if exponent.denominator != 1 or abs(exponent) > MAX_EXPONENT:
            raise _NoValueError
        return _bounded(base ** int(exponent))

    def atom(self) -> Fraction:
        token = self.peek()
        if token == "(":
            self.take()
            value = self.sum()
            if self.peek() != ")":
                raise _NoValueError
            self.take()
        elif token and (token[0].isdigit() or token[0] == "."):
            if len(token) > MAX_DIGITS:
                raise _NoValueError
            value = Fraction(self.take().replace(",", ""))
        else:
            raise _NoValueError
        while self.peek() == "%":
            self.take()
            value /= 100
        return value


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise _NoValueError
    return value

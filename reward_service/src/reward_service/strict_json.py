"""JSON for a service that trusts no client: one value for one text, or no value at all.

The standard library's decoder is lenient: it takes the last of duplicate keys, reads NaN, Infinity and 1e999,
keeps lone surrogates, guesses UTF-16. Each of these lets two readers of one body see two things, or fails
later and louder. Here all of them are the same `MalformedJson`, which says nothing of the text.
"""

from __future__ import annotations

import json
import math
from typing import Any

MAX_DEPTH = 16  # the deepest contract message has 5 levels
MAX_INT_DIGITS = 19  # |n| < 10**19; bounds of the contract are far lower


class MalformedJson(ValueError):
    """Not one strict JSON object in UTF-8."""


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object that `body` holds.

    Raises:
        MalformedJson: `body` is not UTF-8 without BOM, not JSON, not an object, or holds a duplicate key, a
            number that is not finite or too long, a NUL, a lone surrogate, or more than MAX_DEPTH levels.
    """
    try:
        text = body.decode("utf-8")  # a BOM stays in the text and is no JSON
        value = _DECODER.decode(text)
    except (ValueError, RecursionError):
        raise MalformedJson from None
    if not isinstance(value, dict):
        raise MalformedJson
    # The decoder takes no raw NUL and UTF-8 has no lone surrogates: only an escape makes them. And nothing
    # lies deeper than there are brackets.
    if "\\u" in text or text.count("{") + text.count("[") >= MAX_DEPTH:
        _check_strings_and_depth(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise MalformedJson
    return value


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > MAX_INT_DIGITS:
        raise MalformedJson
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise MalformedJson
    return value


def _no_constant(name: str) -> Any:
    raise MalformedJson


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_float=_finite, parse_constant=_no_constant
)


def _check_strings_and_depth(value: dict[str, Any]) -> None:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        deeper: list[Any] = []
        for item in level:
            if isinstance(item, str):
                _check_string(item)
            elif isinstance(item, dict):
                deeper.extend(item)
                deeper.extend(item.values())
            elif isinstance(item, list):
                deeper.extend(item)
        if not deeper:
            return
        level = deeper
    raise MalformedJson


def _check_string(text: str) -> None:
    if "\0" in text:
        raise MalformedJson
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise MalformedJson from None

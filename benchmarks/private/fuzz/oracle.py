"""What two other JSON parsers say of a body, as a check of the strict one.

`verdict` holds `parse_object` to this: whatever it takes, the standard library and pydantic's parser (Rust)
take too, with the same value; what the standard library takes and it refuses has a reason that can be named.
The standard library's decoder in Python runs along, because its branches guide a coverage-guided fuzzer,
which sees nothing of the one in C.
"""

from __future__ import annotations

import json.scanner
import math
from json.decoder import JSONArray, JSONDecoder, JSONObject, py_scanstring  # type: ignore[attr-defined]
from typing import Any

import pydantic_core

from reward_service.strict_json import MAX_DEPTH, MAX_INT_DIGITS, MalformedJson, parse_object


def verdict(body: bytes) -> str | None:
    """What is wrong with `parse_object(body)`, or None."""
    try:
        value = parse_object(body)
    except MalformedJson as error:
        if error.args or error.__cause__ is not None:
            return "the error says something"
        return None if _reason_to_refuse(body) else "refused without a reason"
    if _reason_to_refuse(body):
        return "taken in spite of a reason to refuse it"
    if not _same(value, _in_python(body.decode())):
        return "another value than the standard library's"
    if not _same(value, pydantic_core.from_json(body, allow_inf_nan=False)):
        return "another value than pydantic's"
    return None


def _reason_to_refuse(body: bytes) -> str | None:
    reasons: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in items}) < len(items):
            reasons.append("duplicate key")
        return dict(items)

    def integer(digits: str) -> int:
        if len(digits.replace("-", "")) > MAX_INT_DIGITS:
            reasons.append("long integer")
            return 0
        return int(digits)

    try:
        text = body.decode()
        if text.startswith("\ufeff"):
            return "BOM"
        value = json.loads(text, object_pairs_hook=pairs, parse_int=integer)
        _in_python(text)  # takes more: "\\ud65 " has an escape of three digits and a blank
    except (ValueError, RecursionError):
        return "no JSON"
    if not isinstance(value, dict):
        return "no object"
    return reasons[0] if reasons else _reason_in(value, 1)


def _in_python(text: str, **hooks: Any) -> Any:
    """`json.loads(text, **hooks)` without its parts in C."""
    decoder = JSONDecoder(**hooks)
    decoder.parse_object, decoder.parse_array, decoder.parse_string = JSONObject, JSONArray, py_scanstring
    decoder.scan_once = json.scanner.py_make_scanner(decoder)  # type: ignore[attr-defined]
    return decoder.decode(text)


def _reason_in(value: Any, depth: int) -> str | None:
    if depth > MAX_DEPTH:
        return "depth"
    if isinstance(value, str):
        if "\0" in value or any("\ud800" <= char <= "\udfff" for char in value):
            return "text"
    elif isinstance(value, float):
        return None if math.isfinite(value) else "not finite"
    elif isinstance(value, dict | list):
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        for item in inner:
            reason = _reason_in(item, depth + 1)
            if reason:
                return reason
    return None


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return one == other and math.copysign(1, one) == math.copysign(1, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)

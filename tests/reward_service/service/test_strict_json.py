from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_service.strict_json import MAX_DEPTH, MalformedJson, parse_object

MALFORMED = {
    "nothing": b"",
    "white space": b" \n",
    "a word": b"hello",
    "an array": b"[1]",
    "a string": b'"x"',
    "a number": b"7",
    "null": b"null",
    "cut off": b'{"a": 1',
    "trailing text": b'{"a": 1} x',
    "two objects": b'{"a": 1}{"a": 1}',
    "trailing comma": b'{"a": 1,}',
    "single quotes": b"{'a': 1}",
    "a comment": b'{"a": 1 /* x */}',
    "duplicate key": b'{"a": 1, "a": 1}',
    "duplicate key by escape": b'{"a": 1, "\\u0061": 2}',
    "duplicate key inside": b'{"a": [{"b": 1, "b": 2}]}',
    "NaN": b'{"a": NaN}',
    "Infinity": b'{"a": Infinity}',
    "minus Infinity": b'{"a": -Infinity}',
    "1e999": b'{"a": 1e999}',
    "-1e999": b'{"a": -1e999}',
    "huge integer": b'{"a": ' + b"9" * 20 + b"}",
    "5,000 digits": b'{"a": ' + b"1" * 5000 + b"}",
    "leading zero": b'{"a": 01}',
    "raw NUL": b'{"a": "x\x00y"}',
    "escaped NUL": b'{"a": "x\\u0000y"}',
    "NUL in a key": b'{"x\\u0000": 1}',
    "NUL in an array": b'{"a": [["\\u0000"]]}',
    "raw newline in a string": b'{"a": "x\ny"}',
    "lone high surrogate": b'{"a": "\\ud800"}',
    "lone low surrogate": b'{"a": "x\\udc00"}',
    "surrogates in the wrong order": b'{"a": "\\udc00\\ud800"}',
    "lone surrogate in a key": b'{"\\ud800": 1}',
    "encoded surrogate": b'{"a": "\xed\xa0\x80"}',
    "BOM": b'\xef\xbb\xbf{"a": 1}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "UTF-16 without BOM": '{"a": 1}'.encode("utf-16-le"),
    "UTF-32": '{"a": 1}'.encode("utf-32"),
    "Latin-1": '{"a": "é"}'.encode("latin-1"),
    "overlong encoding": b'{"a": "\xc0\xaf"}',
    "too deep": b'{"a":' * (MAX_DEPTH + 1) + b"1" + b"}" * (MAX_DEPTH + 1),
    "too deep by one": b'{"a":' * MAX_DEPTH + b"1" + b"}" * MAX_DEPTH,
    "very deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "very deep arrays": b'{"a":' + b"[" * 500_000,
}


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_bodies_are_one_error_without_a_text(body: bytes) -> None:
    with pytest.raises(MalformedJson) as caught:
        parse_object(body)
    assert str(caught.value) == ""
    assert caught.value.__cause__ is None


def test_depth_is_allowed_up_to_its_bound() -> None:
    assert parse_object(b'{"a":' * (MAX_DEPTH - 1) + b"1" + b"}" * (MAX_DEPTH - 1))


def test_what_looks_like_an_escape_is_not_one() -> None:
    assert parse_object(rb'{"a": "C:\\u0000 \\ud800"}') == {"a": "C:\\u0000 \\ud800"}


def test_surrogate_pairs_are_one_character() -> None:
    assert parse_object(b'{"a": "\\ud83d\\ude00"}') == {"a": "\N{GRINNING FACE}"}


JSON_TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.floats(allow_nan=False, allow_infinity=False)
    | JSON_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(JSON_TEXT, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(JSON_TEXT, JSON_VALUES, max_size=5), st.booleans())
def test_what_json_dumps_writes_is_read_back(value: dict[str, Any], ascii_only: bool) -> None:
    try:
        parsed = parse_object(json.dumps(value, ensure_ascii=ascii_only).encode())
    except MalformedJson:
        assert _depth(value) > MAX_DEPTH - 1
    else:
        assert parsed == value


@given(st.binary(max_size=200))
def test_any_bytes_give_an_object_or_the_one_error(body: bytes) -> None:
    with contextlib.suppress(MalformedJson):
        assert isinstance(parse_object(body), dict)


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)

"""A text as it is seen in the end: by a browser, a terminal, an editor, or by the program itself.

`shown(text, path)` yields (line, kind, content); line 0 where the lines of the content are those of `text`.
"""

from __future__ import annotations

import ast
import html
import json
import re
import unicodedata
import urllib.parse
from collections.abc import Callable, Sequence
from functools import partial

from spelled import Found, Lines

_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2064\ufeff]")
_BACKSLASH = re.compile(r"\\(?:[nrt]|(?=[_\"'*.`-]))")
_PERCENT = re.compile(r"%(?:[2-6][0-9A-Fa-f]|7[0-9A-Ea-e])")
_ENTITY = re.compile(r"&(?:#\d+|#[xX][0-9a-fA-F]+|[a-zA-Z]+);")
_COLOUR = re.compile(r"(?:\x1b|\\x1b|\\033|\\e|\\u001b)\[[0-9;]*[A-Za-z]")
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_NUMBERED = re.compile(r"^(?:[\w./-]+[:-])?[ \t|>]*\d+(?:[ \t]*[:|-]|[ \t])", re.MULTILINE)
_QUOTED = re.compile(r"=([2-7][0-9A-F])")
_JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_WIDE = re.compile(r"\d{4,}")  # a width that would make a very long string


def plain(text: str) -> str:
    """`text` without invisible characters, wide and narrow forms as their plain ones."""
    return _INVISIBLE.sub("", unicodedata.normalize("NFKC", text))


def shown(text: str, path: str, done: frozenset[str] = frozenset()) -> Found:
    """(line, kind, content) of what `text` means where it is shown or run, but for the kinds in `done`."""
    yield from (found for found in (*_rows(text), *_whole(text)) if found[1] not in done)
    if path.endswith((".py", ".pyi")):
        yield from _python_strings(text)
    elif path.endswith((".json", ".jsonl", ".ipynb")):
        yield from _json_strings(text, Lines(text))


_ROW_KINDS: tuple[tuple[str, re.Pattern[str], Callable[[str], str]], ...] = (
    ("percent-encoding", _PERCENT, urllib.parse.unquote),
    ("HTML entities", _ENTITY, html.unescape),
    ("backslashes", _BACKSLASH, lambda row: _BACKSLASH.sub(lambda m: " " if m[0][1:] else "", row)),
)


def _rows(text: str) -> Found:
    """The rows that read otherwise in the end, each at its place, the others empty."""
    for kind, pattern, turned in _ROW_KINDS:
        if pattern.search(text):
            rows = []
            for row in text.split("\n"):
                seen = row
                while pattern.search(seen) and (next_seen := turned(seen)) != seen:
                    seen = next_seen
                rows.append(seen.replace("\n", " ") if seen != row else "")
            if any(rows):
                yield 0, kind, _readable("\n".join(rows))


def _whole(text: str) -> Found:
    """The text without what stands between its words: colours, tags, line numbers, a letter's soft breaks."""
    if _COLOUR.search(text):
        yield 0, "colours", _readable(_COLOUR.sub("", text))
    if len(_TAG.findall(text)) >= 2:
        for between in ("", " "):
            yield 0, "tags", _readable(html.unescape(_TAG.sub(partial(_gap, between), text)))
    if len(_NUMBERED.findall(text)) >= 5:
        rows = [_NUMBERED.sub("", row) if _NUMBERED.match(row) else "" for row in text.split("\n")]
        yield 0, "numbered lines", _readable("\n".join(rows))
    if _QUOTED.search(text) or "=\n" in text:
        yield 0, "quoted-printable", _readable(_mail(text))


def _gap(between: str, tag: re.Match[str]) -> str:
    """What a tag leaves: the rows that it goes over stay as many."""
    return between + "\n" * tag[0].count("\n")


def _mail(text: str) -> str:
    """Quoted-printable resolved; a line that was broken stands at its first row, empty ones behind it."""
    rows, joined, broken = [], "", 0
    for row in text.split("\n"):
        row = row.rstrip("\r")
        joined += _QUOTED.sub(lambda match: chr(int(match[1], 16)), row.removesuffix("="))
        if row.endswith("="):
            broken += 1
        else:
            rows += [joined, *[""] * broken]
            joined, broken = "", 0
    return "\n".join([*rows, joined])


def _python_strings(text: str) -> Found:
    """String constants as the program sees them: escapes resolved, adjacent and added parts joined."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant | ast.BinOp | ast.Call | ast.JoinedStr):
            continue
        value = constant_text(node)
        if value and (not isinstance(node, ast.Constant) or value not in text):
            yield node.lineno, "string", _readable(value)


def constant_text(node: ast.AST) -> str | None:
    """The text of a constant expression: literals, `+`, f-strings of literals, `"".join([...])`."""
    match node:
        case ast.Constant(value=str() as text):
            return text
        case ast.Constant(value=bytes() as raw):
            return raw.decode("utf-8", "replace")
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            parts = [constant_text(left), constant_text(right)]
        case ast.JoinedStr(values=values):
            parts = [constant_text(value) for value in values]
        case ast.FormattedValue(value=value):
            return constant_text(value)
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str() as glue), attr="join"),
            args=[ast.List() | ast.Tuple() as row],
        ):
            pieces = [constant_text(item) for item in row.elts]
            return None if None in pieces else glue.join(piece or "" for piece in pieces)
        case ast.BinOp(op=ast.Mod(), left=ast.Constant(value=str() as template), right=right):
            rows = right.elts if isinstance(right, ast.Tuple) else [right]
            return _filled(template, rows, lambda pieces: template % pieces)
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str() as template), attr="format"), args=rows
        ):
            return _filled(template, rows, lambda pieces: template.format(*pieces))
        case ast.Call(func=ast.Attribute(value=value, attr="replace"), args=[old, new]):
            pieces = [constant_text(item) for item in (value, old, new)]
            return None if None in pieces else str.replace(*(piece or "" for piece in pieces))
        case _:
            return None
    return None if None in parts else "".join(part or "" for part in parts)


def _filled(template: str, rows: Sequence[ast.expr], fill: Callable[[tuple[str, ...]], str]) -> str | None:
    """A template with constant texts put in; None where one is not constant or the template asks for more."""
    pieces = [constant_text(item) for item in rows]
    if None in pieces or _WIDE.search(template):
        return None
    try:
        return fill(tuple(piece or "" for piece in pieces))
    except (TypeError, ValueError, LookupError, AttributeError):
        return None


def _json_strings(text: str, line: Lines) -> Found:
    """Strings of JSON or JSON lines that are written with escapes, without them; and each list of strings (a
    notebook's cell) joined. A string without escapes stands in the text as it is."""
    for match in _JSON_STRING.finditer(text):
        if "\\" in match[0]:
            try:
                yield line(match.start()), "JSON string", _readable(json.loads(match[0], strict=False))
            except ValueError:
                continue
    rows = [(1, text)]
    try:
        json.loads(text)
    except ValueError:
        rows = list(enumerate(text.splitlines(), start=1))
    for number, row in rows:
        try:
            todo: list[object] = [json.loads(row)]
        except ValueError:
            continue
        while todo:
            item = todo.pop()
            if isinstance(item, dict):
                todo += item.values()
            elif isinstance(item, list):
                todo += [part for part in item if isinstance(part, dict | list)]
                if len(item) > 1 and all(isinstance(part, str) for part in item):
                    place = text.find(json.dumps(item[0], ensure_ascii=False)[:25])
                    yield (line(place) if place >= 0 else number), "JSON strings", _readable("".join(item))


def _readable(text: str) -> bytes:
    return text.replace("\0", " ").encode("utf-8", "replace")

"""Every text that a file carries, however wrapped: archives, byte code, notebooks, base64, hex, escapes.

`views(data, path)` yields the text itself first, then whatever can be unwrapped from it, to a fixed depth.
What cannot be read (an encrypted archive, unknown binary content) is yielded as `Opaque`: a gate must refuse
it, since nobody can say what is inside.
"""

from __future__ import annotations

import ast
import base64
import binascii
import bz2
import gzip
import html
import io
import json
import lzma
import marshal
import re
import tarfile
import types
import unicodedata
import urllib.parse
import zipfile
import zlib
from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

MAX_DEPTH = 6
MAX_BYTES = 2**26  # of one unwrapped content
SMALLEST_ZIP = 22  # bytes of an empty one: a mere signature in a source holds nothing

_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{24,}")
_BASE64_LINES = re.compile(r"(?:^[ \t\"'#]*[A-Za-z0-9+/_-]{16,}={0,2}[\"',\\n \t]*\n){2,}", re.MULTILINE)
_HEX = re.compile(r"(?:[0-9a-fA-F]{2}){12,}")
_JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_ESCAPES = re.compile(r"(?:\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}){4,}")
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2064\ufeff]")
_PRINTABLE_RUN = re.compile(rb"[\x20-\x7e\t\n]{4,}")


class View(NamedTuple):
    """One readable text; `line` is where its wrapping stands, or None where `text` is the file's own."""

    path: str
    line: int | None
    text: str


class Opaque(NamedTuple):
    """Content that cannot be read, and why."""

    path: str
    line: int | None
    why: str


def views(data: bytes, path: str, line: int | None = None, depth: int = 0) -> Iterator[View | Opaque]:
    """All texts in `data`, outermost first."""
    if len(data) > MAX_BYTES or depth > MAX_DEPTH:
        yield Opaque(path, line, f"is larger than {MAX_BYTES} bytes or wrapped more than {MAX_DEPTH} times")
        return
    inner = _unpacked(data, path)
    if inner is not None:
        for name, content in inner:
            if content is None:
                yield Opaque(name, line, "is damaged or encrypted")
            else:
                yield View(name, line or 1, name)
                yield from views(content, name, line, depth + 1)
        return
    if path.endswith(".pyc") or data[2:4] == b"\r\n":
        yield View(path, line or 1, _byte_code(data))
        return
    text = _decoded(data)
    if text is None:
        yield Opaque(path, line, "is binary and of no kind that can be read")
        return
    text = _INVISIBLE.sub("", unicodedata.normalize("NFKC", text))
    yield View(path, line, text)
    for number, what, content in _wrapped(text, path):
        yield from views(content, f"{path} ({what})", line or number, depth + 1)


def _unpacked(data: bytes, path: str) -> list[tuple[str, bytes | None]] | None:
    """Members of an archive or compressed file; None where `data` is neither."""
    try:
        if data[:4] in (b"PK\x03\x04", b"PK\x05\x06") and len(data) >= SMALLEST_ZIP:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                whole = [(f"{path}!comment", archive.comment)] if archive.comment else []
                return whole + [(f"{path}!{name}", archive.read(name)) for name in archive.namelist()]
        if data[:2] == b"\x1f\x8b":
            return [(f"{path}!", gzip.decompress(data))]
        if data[:3] == b"BZh":
            return [(f"{path}!", bz2.decompress(data))]
        if data[:6] == b"\xfd7zXZ\x00":
            return [(f"{path}!", lzma.decompress(data))]
        if data[:2] in (b"x\x01", b"x\x9c", b"x\xda"):
            return [(f"{path}!", zlib.decompress(data))]
        if data[257:262] == b"ustar":
            return _tar(data, path)
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        OSError,
        EOFError,
        RuntimeError,
        lzma.LZMAError,
        zlib.error,
        ValueError,
    ):
        return [(path, None)]
    return None


def _tar(data: bytes, path: str) -> list[tuple[str, bytes | None]]:
    found: list[tuple[str, bytes | None]] = []
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            name = f"{path}!{member.name}"
            if member.isfile():
                file = archive.extractfile(member)
                found.append((name, file.read() if file else None))
            elif not member.isdir():
                found.append((name, f"link to {member.linkname}".encode()))
    return found


def _decoded(data: bytes) -> str | None:
    """`data` as text: UTF-8, or UTF-16 where a mark or the zero bytes of ASCII say so; None for binary."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or (
        len(data) >= 8 and data[1::2].count(0) > 0.8 * len(data[1::2])
    ):
        encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-16-le"
    else:
        encoding = "utf-8"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        return None
    return None if "\x00" in text else text


def _byte_code(data: bytes) -> str:
    """Names, strings and numbers of a .pyc; where another Python wrote it, its printable parts."""
    lines = [run.decode("ascii") for run in _PRINTABLE_RUN.findall(data)]
    try:
        code = marshal.loads(data[16:])
    except (ValueError, EOFError, TypeError):
        return "\n".join(lines)
    todo: list[object] = [code]
    while todo:
        match todo.pop():
            case types.CodeType() as code:
                todo += [*code.co_consts, *code.co_names, *code.co_varnames, code.co_filename, code.co_name]
            case tuple() | frozenset() as several:
                todo += list(several)
            case str() as text:
                lines.append(text)
            case bytes() as raw:
                lines.append(raw.decode("utf-8", "replace"))
            case int() | float() as number:
                lines.append(repr(number))
            case _:
                pass
    return "\n".join(lines)


def _wrapped(text: str, path: str) -> Iterator[tuple[int, str, bytes]]:
    """(line, kind, content) of what is encoded inside `text`."""
    line = _Lines(text)
    for match in _BASE64.finditer(text):
        yield from _base64_candidates(match[0], line(match.start()))
    for match in _BASE64_LINES.finditer(text):
        joined = re.sub(r"[^A-Za-z0-9+/_-]", "", match[0].replace("\\n", ""))
        yield from _base64_candidates(joined, line(match.start()))
    for match in _HEX.finditer(text):
        content = bytes.fromhex(match[0])
        if _plausible(content):
            yield line(match.start()), "hex", content
    for match in _ESCAPES.finditer(text):
        raw = match[0].encode("ascii").decode("unicode_escape")
        yield line(match.start()), "escapes", raw.encode("utf-8", "replace")
    if re.search(r"(?:%[0-9A-Fa-f]{2}.{0,8}){3}", text):
        for number, row in enumerate(text.splitlines(), start=1):
            if row.count("%") >= 3 and (plain := urllib.parse.unquote(row)) != row:
                yield number, "percent-encoding", plain.encode()
    if "&#" in text:
        for number, row in enumerate(text.splitlines(), start=1):
            if "&#" in row and (plain := html.unescape(row)) != row:
                yield number, "HTML entities", plain.encode()
    if path.endswith((".py", ".pyi")):
        yield from _python_strings(text)
    elif path.endswith((".json", ".jsonl", ".ipynb")):
        yield from _json_strings(text, line)


def _base64_candidates(run: str, number: int) -> Iterator[tuple[int, str, bytes]]:
    standard = run.translate(str.maketrans("-_", "+/"))
    for start in range(4):  # a path or a prefix of the same letters may stand before the content
        part = standard[start:]
        try:
            content = base64.b64decode(
                part[: len(part) // 4 * 4] if len(part) % 4 == 1 else part + "=" * (-len(part) % 4)
            )
        except (binascii.Error, ValueError):
            continue
        if _plausible(content):
            yield number, "base64", content
            return


def _plausible(content: bytes) -> bool:
    """Whether decoding gave something: an archive, or text that is almost wholly ASCII."""
    if (
        content[:4] == b"PK\x03\x04"
        or content[:3] in (b"\x1f\x8b\x08", b"BZh")
        or content[:6] == b"\xfd7zXZ\x00"
    ):
        return True
    if content[:2] in (b"x\x9c", b"x\xda", b"x\x01"):
        try:
            zlib.decompress(content)
        except zlib.error:
            return False
        return True
    text = _decoded(content)
    return text is not None and sum(
        c.isascii() and (c.isprintable() or c in "\t\r\n") for c in text
    ) >= 0.95 * len(text)


def _python_strings(text: str) -> Iterator[tuple[int, str, bytes]]:
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
        case _:
            return None
    return None if None in parts else "".join(part or "" for part in parts)


def _json_strings(text: str, line: _Lines) -> Iterator[tuple[int, str, bytes]]:
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


class _Lines:
    """Line numbers by position in `text`, found without counting from its beginning each time."""

    def __init__(self, text: str) -> None:
        self._ends = [match.start() for match in re.finditer("\n", text)]

    def __call__(self, position: int) -> int:
        return bisect_left(self._ends, position) + 1

"""Bytes spelled inside a text: base64 and its kin, a patch's binary part, hex, integers, escapes.

`encoded(text)` yields (line, kind, content) of every run that decodes to an archive or to readable text.
"""

from __future__ import annotations

import base64
import binascii
import re
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterator

Found = Iterator[tuple[int, str, bytes]]

_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{24,}")
_BASE64_LINES = re.compile(r"(?:^[ \t\"'#]*[A-Za-z0-9+/_-]{16,}={0,2}[\"',\\n \t]*\n){2,}", re.MULTILINE)
_BASE32 = re.compile(r"[A-Z2-7]{24,}={0,6}")
_BASE85 = re.compile(r"[0-9A-Za-z!#-&(-+;-@^-`{-~-]{25,}")
_ASCII85 = re.compile(r"<~[!-uz\s]{8,}~>")
_PATCH = re.compile(r"^literal \d+\n((?:[A-Za-z][0-9A-Za-z!#-&(-+;-@^-`{-~-]+\n)+)", re.MULTILINE)
_UUENCODED = re.compile(r"(?:^M[ -`]{60}\n)+(?:^[!-L][ -`]+$)?", re.MULTILINE)
_HEX = re.compile(r"(?:[0-9a-fA-F]{2}){12,}")
_HEX_APART = re.compile(r"(?:(?:0x)?(?:[0-9a-fA-F]{2}){1,4}[\s,:]+){6,}(?:0x)?(?:[0-9a-fA-F]{2}){1,4}")
_INTEGERS = re.compile(r"(?:\d{1,3}[\s,]+){11,}\d{1,3}")
_ESCAPES = re.compile(r"(?:\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\[0-3][0-7]{2}){4,}")


def encoded(text: str) -> Found:
    """(line, kind, content) of the bytes that are spelled in `text`."""
    line = Lines(text)
    for match in _BASE64.finditer(text):
        yield from _base64_candidates(match[0], line(match.start()))
    for match in _BASE64_LINES.finditer(text):
        joined = re.sub(r"[^A-Za-z0-9+/_-]", "", match[0].replace("\\n", ""))
        yield from _base64_candidates(joined, line(match.start()))
    for kind, pattern, decode in _DECODERS:
        for match in pattern.finditer(text):
            try:
                content = decode(match)
            except ValueError:  # binascii.Error is one
                continue
            if _plausible(content):
                yield line(match.start()), kind, content
    for match in _ESCAPES.finditer(text):
        raw = match[0].encode("ascii").decode("unicode_escape")
        yield line(match.start()), "escapes", raw.encode("utf-8", "replace")


class Lines:
    """Line numbers by position in `text`, found without counting from its beginning each time."""

    def __init__(self, text: str) -> None:
        self._ends = [match.start() for match in re.finditer("\n", text)]

    def __call__(self, position: int) -> int:
        return bisect_left(self._ends, position) + 1


def decoded(data: bytes) -> str | None:
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


def _base64_candidates(run: str, number: int) -> Found:
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


def _patch(match: re.Match[str]) -> bytes:
    """The binary part of a git patch: the first letter of a row says how many bytes it holds."""
    rows = []
    for row in match[1].split():
        length = ord(row[0]) - (64 if row[0].isupper() else 70)
        rows.append(base64.b85decode(row[1:])[:length])
    return b"".join(rows)


def _integers(match: re.Match[str]) -> bytes:
    return bytes(int(number) for number in re.findall(r"\d+", match[0]))  # ValueError above 255


_DECODERS: tuple[tuple[str, re.Pattern[str], Callable[[re.Match[str]], bytes]], ...] = (
    ("base32", _BASE32, lambda match: base64.b32decode(match[0] + "=" * (-len(match[0]) % 8))),
    ("base85", _BASE85, lambda match: base64.b85decode(match[0])),
    ("ascii85", _ASCII85, lambda match: base64.a85decode(match[0], adobe=True)),
    ("binary patch", _PATCH, _patch),
    ("uuencoding", _UUENCODED, lambda match: b"".join(map(binascii.a2b_uu, match[0].splitlines()))),
    ("hex", _HEX, lambda match: bytes.fromhex(match[0])),
    ("hex", _HEX_APART, lambda match: bytes.fromhex(re.sub(r"0x|[\s,:]", "", match[0]))),
    ("integers", _INTEGERS, _integers),
)


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
    text = decoded(content)
    return text is not None and sum(
        c.isascii() and (c.isprintable() or c in "\t\r\n") for c in text
    ) >= 0.95 * len(text)

"""Every text that a file carries, however wrapped: archives, byte code, notebooks, base64, hex, escapes.

`views(data, path)` yields the text itself first, then whatever can be unwrapped from it, to a fixed depth.
What cannot be read (an encrypted archive, unknown binary content) is yielded as `Opaque`: a gate must refuse
it, since nobody can say what is inside.
"""

from __future__ import annotations

import bz2
import io
import lzma
import marshal
import re
import tarfile
import types
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from shown import plain, shown
from spelled import decoded, encoded

MAX_DEPTH = 6
MAX_BYTES = 2**26  # of one unwrapped content
SMALLEST_ZIP = 22  # bytes of an empty one: a mere signature in a source holds nothing

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


def views(
    data: bytes, path: str, line: int | None = None, depth: int = 0, done: frozenset[str] = frozenset()
) -> Iterator[View | Opaque]:
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
    text = decoded(data)
    if text is None:
        yield Opaque(path, line, "is binary and of no kind that can be read")
        return
    text = plain(text)
    yield View(path, line, text)
    for number, what, content in encoded(text):
        yield from views(content, f"{path} ({what})", line or number, depth + 1)
    for number, what, content in shown(text, path, done):
        kinds = done if number else done | {what}
        yield from views(content, f"{path} ({what})", line or number or None, depth + 1, kinds)


def _unpacked(data: bytes, path: str) -> list[tuple[str, bytes | None]] | None:
    """Members of an archive or compressed file and what it says of them; None where `data` is neither."""
    try:
        if data[:4] in (b"PK\x03\x04", b"PK\x05\x06") and len(data) >= SMALLEST_ZIP:
            return _zip(data, path)
        if data[:2] == b"\x1f\x8b":
            return [*_gzip_names(data, path), (f"{path}!", _all(lambda: zlib.decompressobj(31), data))]
        if data[:3] == b"BZh":
            return [(f"{path}!", _all(bz2.BZ2Decompressor, data))]
        if data[:6] == b"\xfd7zXZ\x00":
            return [(f"{path}!", _all(lzma.LZMADecompressor, data))]
        if data[:2] in (b"x\x01", b"x\x9c", b"x\xda"):
            return [(f"{path}!", _all(zlib.decompressobj, data))]
        if data[257:262] == b"ustar":
            return _tar(data, path)
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        OSError,
        EOFError,
        IndexError,
        RuntimeError,
        lzma.LZMAError,
        zlib.error,
        ValueError,
    ):
        return [(path, None)]
    return None


def _all(decompressor: Callable[[], Any], data: bytes) -> bytes:
    """Everything in `data`: one compressed stream after the other, nothing else behind them.

    Raises:
        EOFError: a stream is cut off. ValueError: more than MAX_BYTES.
    """
    parts, size = [], 0
    while data:
        one = decompressor()
        parts.append(one.decompress(data, MAX_BYTES + 1))
        size += len(parts[-1])
        if size > MAX_BYTES:
            raise ValueError("too large")
        if not one.eof:
            raise EOFError("cut off")
        data = one.unused_data
    return b"".join(parts)


def _gzip_names(data: bytes, path: str) -> Iterator[tuple[str, bytes]]:
    """The file's name and the comment in a gzip header (RFC 1952)."""
    flags, place = data[3], 10
    if flags & 4:
        place += 2 + int.from_bytes(data[place : place + 2], "little")
        yield f"{path}!header", data[12:place]
    for bit in (8, 16):
        if flags & bit:
            end = data.index(b"\0", place)
            yield f"{path}!header", data[place:end]
            place = end + 1


def _zip(data: bytes, path: str) -> list[tuple[str, bytes | None]]:
    """Every member, also of two with one name, and every comment; nothing may stand around them."""
    found: list[tuple[str, bytes | None]] = []
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if archive.comment:
            found.append((f"{path}!comment", archive.comment))
        place = 0
        for member in sorted(archive.infolist(), key=lambda one: one.header_offset):
            found.append((f"{path}!{member.filename}", archive.read(member)))
            found += [(f"{path}!{member.filename}!comment", member.comment)] if member.comment else []
            if member.header_offset != place:
                raise zipfile.BadZipFile("something stands between two members")
            name, extra = (int.from_bytes(data[place + at : place + at + 2], "little") for at in (26, 28))
            place += 30 + name + extra + member.compress_size
            if member.flag_bits & 8:  # sizes after the content, with or without a mark, of 4 or 8 bytes each
                place = min(p for p in (place + n for n in (12, 16, 20, 24)) if data[p : p + 2] == b"PK")
        if place != archive.start_dir or not data.endswith(archive.comment):
            raise zipfile.BadZipFile("something stands before the directory")
    end = data.rindex(b"PK\x05\x06")
    if len(data) != end + SMALLEST_ZIP + int.from_bytes(data[end + 20 : end + 22], "little"):
        raise zipfile.BadZipFile("something stands behind the directory")
    return found


def _tar(data: bytes, path: str) -> list[tuple[str, bytes | None]]:
    found: list[tuple[str, bytes | None]] = []
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            name = f"{path}!{member.name}"
            said = [member.uname, member.gname, *(f"{k}={v}" for k, v in member.pax_headers.items())]
            found.append((f"{name}!header", "\n".join(said).encode("utf-8", "replace")))
            if member.isfile():
                file = archive.extractfile(member)
                found.append((name, file.read() if file else None))
            elif not member.isdir():
                found.append((name, f"link to {member.linkname}".encode()))
            else:
                found.append((name, b""))
        if data[archive.offset :].strip(b"\0"):
            raise tarfile.ReadError("something stands behind the end")
    return found


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

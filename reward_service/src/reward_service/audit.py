"""The audit: one line for every score that left the service, hash-chained, on disk before its reply is sent.

`audit.jsonl` is only ever appended to. A line ends with `mac`, a keyed BLAKE2b hash of the line before its
`mac` and of the previous line's `mac`: without the folder's pepper nobody can edit, drop, insert or reorder
lines unseen.

Every commit writes the lines, then the head (see `audit_head`), each with fsync. What a crash leaves beyond
the head was never answered: whole lines are kept, a torn rest is dropped, and a `recovered` line says so.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from reward_service.audit_head import EMPTY, HEAD_FILE, Head, HeadFile, read_heads
from reward_service.errors import StartError
from reward_service.home import read_pepper, subkey

logger = logging.getLogger(__name__)

AUDIT_FILE = "audit.jsonl"
_LINE = re.compile(rb'(\{"seq":([0-9]{1,18}),.*),"mac":"([0-9a-f]{64})"\}\n')

Value = str | int | float | bool | None


class AuditUnavailable(Exception):
    """The audit cannot be written, so nothing may be answered."""


class AuditBroken(Exception):
    """The audit is not what was written; the message says where, without any content."""


class AuditFile:
    """The audit of a folder, open for appending: by one process at a time, from one thread at a time.

    Opening looks at the end only, so that it takes no longer as the audit grows; `verify` reads everything.

    Raises:
        StartError: another process has it open, it cannot be written, or its end is not what was written.
    """

    def __init__(self, home: Path) -> None:
        self._key = _key(home)
        self._broken = False
        self._failed = False
        self._head = EMPTY
        file = home / AUDIT_FILE
        try:
            self._lines = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StartError(f"{file}: {error.strerror}; the service writes its audit there") from None
        try:
            _lock(self._lines, home)
            if not (home / HEAD_FILE).exists() and os.fstat(self._lines).st_size:
                raise AuditBroken(f"its {HEAD_FILE} is missing")
            self._head_file = HeadFile(home, self._key)
            try:
                self._recover(home)
            except BaseException:
                self._head_file.close()
                raise
        except BaseException as error:
            os.close(self._lines)
            if isinstance(error, AuditBroken):
                raise StartError(
                    f"{file}: {error}; restore it and {HEAD_FILE} from a backup, or move both away to begin "
                    "a new chain"
                ) from None
            if isinstance(error, OSError | AuditUnavailable):
                raise StartError(f"{file}: cannot be written; is the disk full?") from None
            raise

    @property
    def healthy(self) -> bool:
        """False after a failed write, until one succeeds; and once nobody knows what is on disk, for good."""
        return not (self._broken or self._failed)

    def append(self, records: Sequence[Mapping[str, Value]]) -> None:
        """Write one line a record; they are on disk when this returns.

        Raises:
            AuditUnavailable: they are not, or not surely. A full disk is tried again at the next call; after
                a failed fsync nobody knows what is on disk, so every later call fails until a restart.
        """
        if self._broken:
            raise AuditUnavailable
        head, lines = self._head, bytearray()
        for record in records:
            line = _line(self._key, head, record)
            lines += line
            head = Head(head.seq + 1, head.end + len(line), _mac_of(line))
        try:
            _write_all(self._lines, bytes(lines))
        except OSError:
            logger.error("the audit cannot be written: is the disk full?")
            self._failed = True
            self._cut(self._head.end)
            raise AuditUnavailable from None
        try:
            os.fsync(self._lines)
            self._head_file.write(head)
        except OSError:
            logger.error("the audit is in an unknown state: restart the service")
            self._broken = True
            raise AuditUnavailable from None
        self._head = head
        self._failed = False

    def close(self) -> None:
        """Release the files."""
        self._broken = True
        self._head_file.close()
        os.close(self._lines)

    def _recover(self, home: Path) -> None:
        """Find the end of the chain, and mend what a crash left there."""
        stated, spoiled = _stated(home, self._key)
        size = os.fstat(self._lines).st_size
        if size < stated.end:
            raise AuditBroken(f"it is shorter than the {stated.seq} lines that were written")
        ending = f',"mac":"{stated.mac}"}}\n'.encode()
        if stated.seq and os.pread(self._lines, len(ending), stated.end - len(ending)) != ending:
            raise AuditBroken(f"line {stated.seq} was changed")
        self._head = stated
        with os.fdopen(os.dup(self._lines), "rb") as lines:
            lines.seek(stated.end)
            for line in lines:
                try:
                    self._head = _follow(self._key, self._head, line)
                except AuditBroken:
                    break
        if spoiled and self._head == stated:
            # A crash in the middle of writing a slot comes after the lines that the slot states.
            raise AuditBroken(f"a slot of {HEAD_FILE} was changed")
        torn = size - self._head.end
        if torn:
            os.ftruncate(self._lines, self._head.end)
        if torn or spoiled or self._head != stated:
            unstated = self._head.seq - stated.seq
            self._head_file.write(self._head)
            self.append([{"event": "recovered", "dropped_bytes": torn, "kept_lines": unstated}])
            logger.warning("the audit ended in the middle of a commit, which was never answered")

    def _cut(self, end: int) -> None:
        """Drop what a failed write left behind."""
        try:
            os.ftruncate(self._lines, end)
        except OSError:
            self._broken = True


def verify(home: Path, expected: tuple[int, str] | None = None) -> Head:
    """Read the whole audit and return its end; a service may append meanwhile.

    `expected` is the `seq` and `mac` of a line noted elsewhere, which must be part of the chain: only this
    shows that both files were put back to an earlier state.

    Raises:
        AuditBroken: it was edited, reordered or cut.
        StartError: there is no audit, or no pepper.
    """
    key = _key(home)
    found = expected is None
    head = EMPTY
    try:
        stated, spoiled = _stated(home, key)
        if spoiled:
            raise AuditBroken(
                f"a slot of {HEAD_FILE} is spoiled; starting the service mends it after a crash"
            )
        with (home / AUDIT_FILE).open("rb") as lines:
            for line in lines:
                if head.seq >= stated.seq and not line.endswith(b"\n"):
                    break  # being written, or torn by a crash: nothing was answered for it
                head = _follow(key, head, line)
                found = found or expected == (head.seq, head.mac)
                if head.seq == stated.seq and head != stated:
                    raise AuditBroken(f"line {head.seq} is not the one that {HEAD_FILE} states")
    except FileNotFoundError as error:
        raise StartError(f"{error.filename}: no such file; a service that has served has one") from None
    if head.seq < stated.seq:
        raise AuditBroken(f"it ends at line {head.seq}, but {stated.seq} were written")
    if not found:
        raise AuditBroken("the expected line is not part of the chain")
    return head


def read_records(home: Path) -> Iterator[dict[str, Value]]:
    """The records in order, without their `mac`, unverified; a torn or spoiled line ends the reading.

    Raises:
        StartError: there is no audit.
    """
    try:
        with (home / AUDIT_FILE).open("rb") as lines:
            for line in lines:
                match = _LINE.fullmatch(line)
                if match is None:
                    return
                yield json.loads(match[1] + b"}")
    except FileNotFoundError as error:
        raise StartError(f"{error.filename}: no such file; a service that has served has one") from None


def _key(home: Path) -> bytes:
    return subkey(read_pepper(home), b"audit")


def _lock(descriptor: int, home: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise StartError(
            f"{home}: another service uses this folder; stop it, or give each service a folder of its own"
        ) from None


def _stated(home: Path, key: bytes) -> tuple[Head, bool]:
    """The newest head on file, and whether one of the two slots is spoiled."""
    heads = [head for head in read_heads(home / HEAD_FILE, key) if head is not None]
    if not heads:
        raise AuditBroken(f"{HEAD_FILE} was changed")
    return max(heads), len(heads) < 2


def _line(key: bytes, head: Head, record: Mapping[str, Value]) -> bytes:
    stamped = {"seq": head.seq + 1, "time": datetime.now(UTC).isoformat(timespec="milliseconds"), **record}
    body = json.dumps(stamped, separators=(",", ":"), allow_nan=False).encode()[:-1]
    return body + f',"mac":"{_mac(key, head.mac, body)}"}}\n'.encode()


def _mac_of(line: bytes) -> str:
    return line[-67:-3].decode()


def _follow(key: bytes, head: Head, line: bytes) -> Head:
    """The head after `line`.

    Raises:
        AuditBroken: it does not continue `head`.
    """
    match = _LINE.fullmatch(line)
    if match is None or int(match[2]) != head.seq + 1:
        raise AuditBroken(f"line {head.seq + 1} is missing or malformed")
    mac = match[3].decode()
    if not hmac.compare_digest(mac, _mac(key, head.mac, match[1])):
        raise AuditBroken(f"line {head.seq + 1} was changed")
    return Head(head.seq + 1, head.end + len(line), mac)


def _mac(key: bytes, previous: str, body: bytes) -> str:
    return hashlib.blake2b(bytes.fromhex(previous) + body, key=key, digest_size=32).hexdigest()


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]

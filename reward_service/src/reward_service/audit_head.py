"""Where the audit's chain ended at its last commit: a chain alone does not show that its end was cut off.

The file has two sealed slots that are written in turn, so that a crash in the middle of a write spoils one at
most.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from pathlib import Path
from typing import NamedTuple

from reward_service.home import write_atomically

HEAD_FILE = "audit.head"
_SLOT_BYTES = 256
_SLOT = re.compile(rb"([0-9]{1,18}) ([0-9]{1,18}) ([0-9a-f]{64}) ([0-9a-f]{64})\n *")


class Head(NamedTuple):
    """End of a chain: how many lines, how many bytes, the `mac` of the last line."""

    seq: int
    end: int
    mac: str


EMPTY = Head(0, 0, "0" * 64)


class HeadFile:
    """The file of a folder, made where it is missing.

    Raises:
        OSError: it cannot be read or written.
    """

    def __init__(self, home: Path, key: bytes) -> None:
        self._key = key
        file = home / HEAD_FILE
        if not file.exists():
            write_atomically(file, 2 * _slot(key, EMPTY))
            folder = os.open(home, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        self._slots = os.open(file, os.O_RDWR | os.O_CLOEXEC)
        first, second = read_heads(file, key)
        self._next = 0 if first is None or (second is not None and first.seq < second.seq) else 1

    def write(self, head: Head) -> None:
        """Put `head` on disk, over the older slot.

        Raises:
            OSError: it may or may not be there.
        """
        slot = _slot(self._key, head).encode()
        if os.pwrite(self._slots, slot, _SLOT_BYTES * self._next) != len(slot):
            raise OSError
        os.fdatasync(self._slots)  # the size never changes
        self._next = 1 - self._next

    def close(self) -> None:
        """Release the file."""
        os.close(self._slots)


def read_heads(file: Path, key: bytes) -> list[Head | None]:
    """What the two slots state; None for one that a crash or a hand spoiled."""
    data = file.read_bytes()
    heads: list[Head | None] = []
    for place in range(2):
        match = _SLOT.fullmatch(data[place * _SLOT_BYTES : (place + 1) * _SLOT_BYTES])
        head = Head(int(match[1]), int(match[2]), match[3].decode()) if match else None
        sealed = match and head and hmac.compare_digest(_seal(key, head), match[4].decode())
        heads.append(head if sealed else None)
    return heads


def _slot(key: bytes, head: Head) -> str:
    return f"{head.seq} {head.end} {head.mac} {_seal(key, head)}\n".ljust(_SLOT_BYTES)


def _seal(key: bytes, head: Head) -> str:
    text = f"{head.seq} {head.end} {head.mac}"
    return hashlib.blake2b(text.encode(), key=key, person=b"audit head", digest_size=32).hexdigest()

"""The folder that keeps the service's state, and the writing of the small files in it."""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reward_service.errors import StartError, denied

PEPPER_BYTES = 32
SHARED = ("pepper", "keys.json", "settings.toml")  # by the replicas of one service


def prepare_home(home: Path) -> None:
    """Make `home` (mode 0700) and its pepper (0600) where they are missing.

    Raises:
        StartError: the folder cannot be made or written, or has keys but no pepper.
    """
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(home):
            if not (home / "pepper").exists():
                if (home / "keys.json").exists():  # a new pepper would silently void every key
                    raise StartError(
                        f"{home / 'pepper'}: missing; restore it from a backup or remove keys.json"
                    )
                write_atomically(home / "pepper", secrets.token_hex(PEPPER_BYTES) + "\n")
    except OSError as error:
        raise StartError(f"{home}: {error.strerror}; choose a folder that you may write") from None


def prepare_replica(home: Path, shared: Path) -> None:
    """Make `home` (mode 0700) the folder of a replica: pepper, keys and settings are those of `shared`.

    They are relative links, so that a change in `shared` is a change in every replica, and so that both
    folders may be moved together. Audit and golden values are the replica's own.

    Raises:
        StartError: `home` has files of its own by these names, or cannot be made.
    """
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in SHARED:
            link, target = home / name, Path(os.path.relpath(shared, home)) / name
            if link.is_symlink() and link.readlink() == target:
                continue
            if link.is_symlink() or link.exists():
                raise StartError(f"{link}: is the folder's own; give the replica an empty folder")
            link.symlink_to(target)
    except OSError as error:
        raise StartError(f"{home}: {error.strerror}; choose a folder that you may write") from None


def read_pepper(home: Path) -> bytes:
    """The secret that keys every hash of this folder (32 bytes).

    Raises:
        StartError: it is missing, malformed, or readable by others.
    """
    file = home / "pepper"
    try:
        pepper = bytes.fromhex(file.read_text(encoding="ascii").strip())
        mode = file.stat().st_mode
    except FileNotFoundError:
        raise StartError(
            f"{file}: missing; run `reward-service keys create` first, or restore it from a backup"
        ) from None
    except PermissionError as error:
        raise denied(error) from None
    except (OSError, ValueError):
        raise StartError(f"{file}: cannot be read; restore it from a backup") from None
    if len(pepper) != PEPPER_BYTES:
        raise StartError(f"{file}: is not {PEPPER_BYTES} bytes in hex; restore it from a backup")
    if mode & 0o077:
        raise StartError(f"{file}: others may read it; run `chmod 600 {file}`")
    return pepper


def subkey(pepper: bytes, purpose: bytes) -> bytes:
    """A key of its own for `purpose` (at most 16 bytes), so that no hash serves two ends."""
    return hashlib.blake2b(key=pepper, person=purpose, digest_size=32).digest()


@contextmanager
def locked(home: Path) -> Iterator[None]:
    """Hold the folder's lock, so that two commands do not write over each other."""
    descriptor = os.open(home / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_atomically(file: Path, text: str) -> None:
    """Replace `file` (mode 0600) by `text` in one step that survives a crash."""
    descriptor, partial = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")  # mkstemp gives 0600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, file)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise

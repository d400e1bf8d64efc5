"""API keys: `rw_<keyid>_<256 bits>_<checksum>`, kept as keyed BLAKE2b hashes.

A key has 256 random bits, so a fast keyed hash is enough (a password would need a slow one). Every refusal
takes the same path: one hash, one look-up, one constant-time comparison, then the checks that only the
holder of a genuine key can reach.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import time
import zlib
from collections.abc import Collection
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from reward_service.errors import StartError, denied
from reward_service.home import locked, read_pepper, subkey, write_atomically

logger = logging.getLogger(__name__)

KEYS_FILE = "keys.json"
CREATE_COMMAND = "reward-service keys create --name NAME --scopes score:reward,score:components"
_ID_CHARS = 12
_PREFIX = "rw_"
_LONGEST_TOKEN = 256


class Scope(StrEnum):
    """What a key may do. `score:components` includes `score:reward`, of which it shows the parts."""

    SCORE_REWARD = "score:reward"
    SCORE_COMPONENTS = "score:components"
    ARMS_ROLLOUT = "arms:rollout"
    METRICS_READ = "metrics:read"


class KeyRecord(BaseModel):
    """What the file knows of a key. Times are seconds since the epoch; None is no bound.

    `budget` is how many items it may have scored in its life, `rate` how many a minute. `account` is whom
    they are charged to: the first of the keys that were rotated into this one (None: the key itself).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    id: Annotated[str, Field(pattern=rf"^[0-9a-f]{{{_ID_CHARS}}}$")]
    name: Annotated[str, Field(min_length=1, max_length=100)]
    hash: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1)]
    created: float
    not_before: float | None = None
    expires: float | None = None
    revoked: float | None = None
    account: Annotated[str, Field(pattern=rf"^[0-9a-f]{{{_ID_CHARS}}}$")] | None = None
    budget: Annotated[int, Field(ge=1, le=10**15)] | None = None
    rate: Annotated[int, Field(ge=1, le=10**9)] | None = None

    def active_at(self, now: float) -> bool:
        """Whether the key opens anything at `now`."""
        return (
            self.revoked is None
            and (self.not_before is None or self.not_before <= now)
            and (self.expires is None or now < self.expires)
        )


class KeyFile(BaseModel):
    """All keys, revoked ones included."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    keys: tuple[KeyRecord, ...] = ()


class Principal(NamedTuple):
    """Who asks: the id of a key, what it may do, and within which limits."""

    key_id: str
    scopes: frozenset[Scope]
    account: str
    budget: int | None = None
    rate: int | None = None

    def may(self, scope: Scope) -> bool:
        """Whether the key has `scope`, by itself or through a wider one."""
        return scope in self.scopes or (scope is Scope.SCORE_REWARD and Scope.SCORE_COMPONENTS in self.scopes)


class KeyRing:
    """The keys of a folder, read again whenever the file changes; a malformed file leaves the old set.

    Raises:
        StartError: pepper or key file cannot be read at the start.
    """

    def __init__(self, home: Path) -> None:
        self._file = home / KEYS_FILE
        self._path = str(self._file)  # looked at for every request
        self._hash_key = subkey(read_pepper(home), b"api-key")
        self._stamp = self._file_stamp()
        self._records = {record.id: record for record in read_keys(home).keys}

    def authenticate(self, token: str) -> Principal | None:
        """The holder of `token`, or None. The work done does not depend on why it is None."""
        self._reload_if_changed()
        digest = _hash(token[:_LONGEST_TOKEN], self._hash_key)
        record = self._records.get(token[len(_PREFIX) : len(_PREFIX) + _ID_CHARS], _NOBODY)
        if not hmac.compare_digest(digest, record.hash) or not record.active_at(time.time()):
            return None
        return Principal(
            key_id=record.id,
            scopes=frozenset(record.scopes),
            account=record.account or record.id,
            budget=record.budget,
            rate=record.rate,
        )

    def any_active(self) -> bool:
        """Whether some key opens something now."""
        return any(record.active_at(time.time()) for record in self._records.values())

    def _file_stamp(self) -> tuple[int, int, int] | None:
        try:
            stat = os.stat(self._path)
        except OSError:
            return None
        return (stat.st_mtime_ns, stat.st_ino, stat.st_size)

    def _reload_if_changed(self) -> None:
        stamp = self._file_stamp()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            records = {record.id: record for record in read_keys(self._file.parent).keys}
        except StartError:
            logger.error("keys.json cannot be read: the keys known before stay in force")
            return
        self._records = records


def read_keys(home: Path) -> KeyFile:
    """The key file of `home`.

    Raises:
        StartError: it is missing or malformed.
    """
    file = home / KEYS_FILE
    try:
        return KeyFile.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        raise StartError(f"{file}: no keys yet; run `{CREATE_COMMAND}`") from None
    except PermissionError as error:
        raise denied(error) from None
    except (OSError, ValidationError):
        raise StartError(f"{file}: is not a key file; restore it from a backup") from None


def create_key(
    home: Path,
    name: str,
    scopes: Collection[Scope],
    *,
    expires: float | None = None,
    not_before: float | None = None,
    budget: int | None = None,
    rate: int | None = None,
) -> str:
    """Add a key to the file of `home` and return it. It is shown once: the file keeps only its hash.

    Raises:
        StartError: the file or the pepper cannot be read, or a value is out of bounds.
    """
    key_id, token = _new_token()
    try:
        record = KeyRecord(
            id=key_id,
            name=name,
            hash=_hash(token, subkey(read_pepper(home), b"api-key")),
            scopes=tuple(sorted(set(scopes))),
            created=time.time(),
            not_before=not_before,
            expires=expires,
            budget=budget,
            rate=rate,
        )
    except ValidationError:
        raise StartError("a key needs a name of 1 to 100 characters and at least one scope") from None
    with locked(home):
        known = read_keys(home) if (home / KEYS_FILE).exists() else KeyFile()
        _write(home, KeyFile(keys=(*known.keys, record)))
    return token


def rotate_key(home: Path, key_id: str, grace_s: float) -> str:
    """Add a key that takes the place of `key_id` and return it; the old one ends after `grace_s` seconds.

    The new key has the old one's name, scopes, limits and end, and goes on with its account: what was used of
    the budget stays used, and a request repeated with the new key gets the reply that the old one got.

    Raises:
        StartError: there is no such key, or it is no longer active.
    """
    read_keys(home)  # says what to do where there is no folder to lock
    new_id, token = _new_token()
    with locked(home):
        known = read_keys(home)
        now = time.time()
        old = _record(known, key_id)
        if not old.active_at(now):
            raise StartError("the key is not active; create a new one")
        new = old.model_copy(
            update={
                "id": new_id,
                "hash": _hash(token, subkey(read_pepper(home), b"api-key")),
                "created": now,
                "not_before": None,
                "account": old.account or old.id,
            }
        )
        ends = now + grace_s if old.expires is None else min(old.expires, now + grace_s)
        kept = (
            record.model_copy(update={"expires": ends}) if record.id == key_id else record
            for record in known.keys
        )
        _write(home, KeyFile(keys=(*kept, new)))
    return token


def revoke_key(home: Path, key_id: str) -> None:
    """Close the key `key_id` for good; a running service sees it at its next request.

    Raises:
        StartError: there is no such key.
    """
    read_keys(home)  # says what to do where there is no folder to lock
    with locked(home):
        known = read_keys(home)
        _record(known, key_id)
        now = time.time()
        records = (
            record.model_copy(update={"revoked": record.revoked or now}) if record.id == key_id else record
            for record in known.keys
        )
        _write(home, KeyFile(keys=tuple(records)))


def _record(keys: KeyFile, key_id: str) -> KeyRecord:
    for record in keys.keys:
        if record.id == key_id:
            return record
    raise StartError("no such key; `reward-service keys list` shows the ids")


def _new_token() -> tuple[str, str]:
    key_id = secrets.token_hex(_ID_CHARS // 2)
    body = f"{_PREFIX}{key_id}_{secrets.token_hex(32)}"
    return key_id, f"{body}_{checksum(body)}"


def checksum(body: str) -> str:
    """CRC-32 of a key without its checksum, 8 hex digits: tells a mistyped key from an unknown one."""
    return f"{zlib.crc32(body.encode()):08x}"


def _write(home: Path, keys: KeyFile) -> None:
    if (home / KEYS_FILE).is_symlink():
        shared = (home / KEYS_FILE).resolve().parent
        raise StartError(
            f"{home}: a replica has the keys of {shared}; set REWARD_SERVICE_HOME to that folder"
        )
    write_atomically(home / KEYS_FILE, keys.model_dump_json(indent=1) + "\n")


def _hash(token: str, key: bytes) -> str:
    return hashlib.blake2b(token.encode("utf-8", "surrogatepass"), key=key, digest_size=32).hexdigest()


# Stands for every key that is not known: no token hashes to zeros, and it never opens anything.
_NOBODY = KeyRecord(
    id="0" * _ID_CHARS, name="nobody", hash="0" * 64, scopes=(Scope.METRICS_READ,), created=0.0, revoked=0.0
)

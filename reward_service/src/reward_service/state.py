"""What has to outlive a restart: replies by idempotency key, and what each account has used up.

Through SQLAlchemy, in SQLite (WAL) in the service's folder; replicas that share a PostgreSQL database share
their budgets and replies. Idempotency keys are stored as keyed hashes; bodies hold what their replies held:
ids and rewards, no texts.

No other process writes the database of a folder (the audit is locked), so what it holds is known without
asking: which keys have replies, what each account has used.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from reward_service.errors import StartError
from reward_service.settlement import (
    Claim,
    Kept,
    Outcome,
    Settlement,
    Statements,
    StoreKey,
    find,
    replies,
    tables,
    usage,
)

__all__ = ["STATE_FILE", "Claim", "Kept", "Outcome", "Settlement", "State", "StateUnavailable", "StoreKey"]

STATE_FILE = "state.sqlite"
_CREATION = 0x6C6F6F706572  # names the advisory lock; any number that no one else takes
_AFTER_PRUNING = 0.9  # of a bound that was passed, so that not every commit has to prune


class StateUnavailable(Exception):
    """The database does not answer, so budgets and earlier replies are unknown."""


class State:
    """The database at `url`, or in `home` where that is None.

    Of more than `entries` kept replies, or more than `max_bytes` of them, who holds the most loses its oldest
    first: nobody can have another's forgotten.

    Raises:
        StartError: it cannot be opened.
    """

    def __init__(self, home: Path, url: str | None, entries: int, max_bytes: int, ttl_s: float) -> None:
        self._entries = entries
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        where = "the database of state_url" if url else str(home / STATE_FILE)
        try:
            self._engine = _connect(home, url)
            self._say = Statements(self._engine.dialect.name, ttl_s)
            _create_tables(self._engine)
            self._rows, self._bytes = 0, 0
            self._alone = url is None
            self._keys: set[StoreKey] = set()
            self._used: dict[str, int] = {}
            self.prune()
            if self._alone:
                with self._transaction() as connection:
                    self._used = {row.account: row.used for row in connection.execute(sa.select(usage))}
        except (SQLAlchemyError, OSError, StateUnavailable, ImportError) as error:
            kind = str(error) if isinstance(error, StateUnavailable) else type(error).__name__
            hint = "restore it from a backup, or move it away: budgets then start anew"
            if url:
                hint = "is it running, is the URL right, is its driver (psycopg) installed?"
            elif isinstance(error, OSError) or kind == "OperationalError":  # what SQLite says of a full disk
                hint = "is there room on the disk, and may this user write there?"
            raise StartError(f"{where}: cannot be opened ({kind}); {hint}") from None

    def find(self, key: StoreKey) -> Kept | None:
        """The reply kept under `key`.

        Raises:
            StateUnavailable: nobody knows.
        """
        with self._transaction() as connection:
            return find(connection, self._say, key, time.time())

    def surely_lacks(self, key: StoreKey) -> bool:
        """Whether no reply is kept under `key`, as far as that is known without asking the database."""
        return self._alone and key not in self._keys

    def used_as_known(self, account: str) -> int | None:
        """What `used` would say, where that is known without asking the database."""
        return self._used.get(account, 0) if self._alone else None

    def used(self, account: str) -> int:
        """Items that `account` has been charged in its life.

        Raises:
            StateUnavailable: nobody knows.
        """
        with self._transaction() as connection:
            used = connection.scalar(sa.select(usage.c.used).where(usage.c.account == account))
        return int(used or 0)

    @contextmanager
    def settling(self) -> Iterator[Settlement]:
        """A transaction for claims; it is undone when the block raises, and complete when the block is left.

        Raises:
            StateUnavailable: nothing was charged or kept, or the database did not say so.
        """
        with self._transaction() as connection:
            settlement = Settlement(connection, self._say, time.time(), self._ttl_s)
            yield settlement
        self._rows += len(settlement.kept)
        self._bytes += sum(settlement.kept.values())
        if self._alone:
            self._keys.update(settlement.kept)
            for account, items in settlement.charged.items():
                self._used[account] = self._used.get(account, 0) + items

    def prune(self) -> None:
        """Drop expired replies, and while a bound is passed the oldest of who holds the most.

        Raises:
            StateUnavailable: not now.
        """
        with self._transaction() as connection:
            connection.execute(sa.delete(replies).where(replies.c.expires <= time.time()))
            newest_first = sa.select(replies.c.account, replies.c.id, replies.c.size).order_by(
                replies.c.id.desc()
            )
            held = connection.execute(newest_first).all()
            rows, size = Counter(row.account for row in held), Counter[str]()
            for row in held:
                size[row.account] += row.size
            most_rows = fair_share(rows.values(), int(_AFTER_PRUNING * self._entries))
            most_bytes = fair_share(size.values(), int(_AFTER_PRUNING * self._max_bytes))
            rows, size = Counter(), Counter()  # of what stays
            last_dropped: dict[str, int] = {}
            for row in held:
                if row.account in last_dropped:
                    continue
                if rows[row.account] + 1 > most_rows or size[row.account] + row.size > most_bytes:
                    last_dropped[row.account] = row.id
                    continue
                rows[row.account] += 1
                size[row.account] += row.size
            for account, last in sorted(last_dropped.items()):
                connection.execute(
                    sa.delete(replies).where(replies.c.account == account, replies.c.id <= last)
                )
            if self._alone:
                left = connection.execute(sa.select(replies.c.account, replies.c.key))
                self._keys = {StoreKey(*row) for row in left}
        self._rows, self._bytes = rows.total(), size.total()

    @property
    def too_full(self) -> bool:
        """Whether a bound is passed, as far as this process knows."""
        return self._rows > self._entries or self._bytes > self._max_bytes

    def close(self) -> None:
        """Release all connections."""
        self._engine.dispose()

    @contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except SQLAlchemyError as error:
            raise StateUnavailable(type(error).__name__) from None


def fair_share(held: Iterable[int], most: int) -> float:
    """The most that each may keep so that all together keep `most`, where who holds less keeps all of it."""
    smallest_first = sorted(held)
    for place, amount in enumerate(smallest_first):
        share = most // (len(smallest_first) - place)
        if amount > share:
            return share
        most -= amount
    return math.inf


def _create_tables(engine: sa.Engine) -> None:
    """Make the tables that are missing; of replicas that start at once on an empty database, one does."""
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":  # whose IF NOT EXISTS fails in the second of two at once
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_CREATION)))
        tables.create_all(connection)


def _connect(home: Path, url: str | None) -> sa.Engine:
    if url is not None:
        try:
            parsed = sa.make_url(url)
            if parsed.get_backend_name() not in ("postgresql", "sqlite"):
                raise StartError("state_url: give a postgresql+psycopg:// URL")
            return sa.create_engine(parsed, pool_pre_ping=True, hide_parameters=True)
        except (ArgumentError, NoSuchModuleError):
            raise StartError(
                "state_url: is not a database URL such as postgresql+psycopg://HOST/NAME"
            ) from None
    file = home / STATE_FILE
    os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    engine = sa.create_engine(sa.URL.create("sqlite", database=str(file)), hide_parameters=True)

    @sa.event.listens_for(engine, "connect")
    def configure(connection: Any, _: object) -> None:
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "busy_timeout = 5000"):
            connection.execute(f"PRAGMA {pragma}")

    return engine

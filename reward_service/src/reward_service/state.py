"""What has to outlive a restart: replies by idempotency key, and what each account has used up.

Through SQLAlchemy, in SQLite (WAL) in the service's folder; replicas that share a PostgreSQL database share
their budgets and replies. Idempotency keys are stored as keyed hashes; bodies hold what their replies held:
ids and rewards, no texts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from looper_schemas.problems import ProblemCode
from reward_service.errors import StartError

STATE_FILE = "state.sqlite"
_AFTER_PRUNING = 0.9  # of a bound that was passed, so that not every commit has to prune

_tables = sa.MetaData()
_replies = sa.Table(
    "replies",
    _tables,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("account", sa.String(64), nullable=False),
    sa.Column("key", sa.String(64), nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sa.Column("size", sa.Integer, nullable=False),
    sa.Column("expires", sa.Double, nullable=False, index=True),  # seconds since the epoch
    sa.UniqueConstraint("account", "key"),
)
_usage = sa.Table(
    "usage",
    _tables,
    sa.Column("account", sa.String(64), primary_key=True),
    sa.Column("used", sa.BigInteger, nullable=False),
)


class StateUnavailable(Exception):
    """The database does not answer, so budgets and earlier replies are unknown."""


class StoreKey(NamedTuple):
    """An idempotency key (hashed) belongs to the account that used it."""

    account: str
    key: str


class Kept(NamedTuple):
    """A reply that was given: the digest of its request, its bytes."""

    digest: str
    body: bytes


class Claim(NamedTuple):
    """A reply about to be given: what it costs whom, and the name to keep it under (None: it is not kept)."""

    account: str
    cost: int
    budget: int | None
    key: StoreKey | None
    digest: str
    body: bytes


class Outcome(NamedTuple):
    """What a claim came to: the bytes to send and what was charged, or why nothing may be sent."""

    body: bytes
    charged: int
    problem: ProblemCode | None = None


class State:
    """The database at `url`, or in `home` where that is None.

    Of kept replies the oldest go first when there are more than `entries`, or more than `max_bytes` of them.

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
            self._insert: Any = sqlite.insert if self._engine.dialect.name == "sqlite" else postgresql.insert
            _tables.create_all(self._engine)
            self._rows, self._bytes = 0, 0
            self.prune()
        except (SQLAlchemyError, OSError, StateUnavailable, ImportError) as error:
            hint = "restore it from a backup, or move it away: budgets then start anew"
            if url:
                hint = "is it running, is the URL right, is its driver (psycopg) installed?"
            raise StartError(f"{where}: cannot be opened ({type(error).__name__}); {hint}") from None

    def find(self, key: StoreKey) -> Kept | None:
        """The reply kept under `key`.

        Raises:
            StateUnavailable: nobody knows.
        """
        with self._transaction() as connection:
            return _find(connection, key, time.time())

    def used(self, account: str) -> int:
        """Items that `account` has been charged in its life.

        Raises:
            StateUnavailable: nobody knows.
        """
        with self._transaction() as connection:
            used = connection.scalar(sa.select(_usage.c.used).where(_usage.c.account == account))
        return int(used or 0)

    @contextmanager
    def settling(self) -> Iterator[Settlement]:
        """A transaction for claims; it is undone when the block raises, and complete when the block is left.

        Raises:
            StateUnavailable: nothing was charged or kept, or the database did not say so.
        """
        with self._transaction() as connection:
            settlement = Settlement(connection, self._insert, time.time(), self._ttl_s)
            yield settlement
        self._rows += settlement.rows
        self._bytes += settlement.bytes

    def prune(self) -> None:
        """Drop expired replies, and the oldest while a bound is passed.

        Raises:
            StateUnavailable: not now.
        """
        with self._transaction() as connection:
            connection.execute(sa.delete(_replies).where(_replies.c.expires <= time.time()))
            rows, size, last_dropped = 0, 0, None
            newest_first = sa.select(_replies.c.id, _replies.c.size).order_by(_replies.c.id.desc())
            for row in connection.execute(newest_first):
                if (
                    rows + 1 > _AFTER_PRUNING * self._entries
                    or size + row.size > _AFTER_PRUNING * self._max_bytes
                ):
                    last_dropped = row.id
                    break
                rows, size = rows + 1, size + row.size
            if last_dropped is not None:
                connection.execute(sa.delete(_replies).where(_replies.c.id <= last_dropped))
        self._rows, self._bytes = rows, size

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


class Settlement:
    """Claims within one transaction."""

    def __init__(self, connection: sa.Connection, insert: Any, now: float, ttl_s: float) -> None:
        self._connection = connection
        self._insert = insert
        self._now = now
        self._ttl_s = ttl_s
        self.rows = 0
        self.bytes = 0

    def settle(self, claim: Claim) -> Outcome:
        """Charge and keep `claim`, unless its key has a reply already or its budget does not allow it."""
        if claim.key is not None and not self._keep(claim, claim.key):
            kept = _find(self._connection, claim.key, self._now)
            if kept is None or kept.digest != claim.digest:
                return Outcome(b"", 0, ProblemCode.IDEMPOTENCY_MISMATCH)
            return Outcome(kept.body, 0)  # another one was first; a request is paid for once
        if not self._charge(claim):
            if claim.key is not None:
                self._connection.execute(sa.delete(_replies).where(_named(claim.key)))
            return Outcome(b"", 0, ProblemCode.BUDGET_EXHAUSTED)
        if claim.key is not None:
            self.rows += 1
            self.bytes += len(claim.body)
        return Outcome(claim.body, claim.cost)

    def _keep(self, claim: Claim, key: StoreKey) -> bool:
        """Whether `key` was free."""
        self._connection.execute(sa.delete(_replies).where(_named(key), _replies.c.expires <= self._now))
        added = self._connection.execute(
            self._insert(_replies)
            .values(
                account=key.account,
                key=key.key,
                digest=claim.digest,
                body=claim.body,
                size=len(claim.body),
                expires=self._now + self._ttl_s,
            )
            .on_conflict_do_nothing(index_elements=["account", "key"])
            .returning(_replies.c.id)
        )
        return added.first() is not None  # rowcount is -1 under some drivers

    def _charge(self, claim: Claim) -> bool:
        """Whether the budget allows `claim`; it is charged then."""
        if claim.cost == 0:
            return True
        if claim.budget is not None and claim.cost > claim.budget:
            return False
        total = _usage.c.used + claim.cost
        charged = self._connection.execute(
            self._insert(_usage)
            .values(account=claim.account, used=claim.cost)
            .on_conflict_do_update(
                index_elements=["account"],
                set_={"used": total},
                where=sa.true() if claim.budget is None else total <= claim.budget,
            )
            .returning(_usage.c.used)
        )
        return charged.first() is not None


def _named(key: StoreKey) -> sa.ColumnElement[bool]:
    return sa.and_(_replies.c.account == key.account, _replies.c.key == key.key)


def _find(connection: sa.Connection, key: StoreKey, now: float) -> Kept | None:
    row = connection.execute(
        sa.select(_replies.c.digest, _replies.c.body).where(_named(key), _replies.c.expires > now)
    ).one_or_none()
    return None if row is None else Kept(row.digest, bytes(row.body))


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

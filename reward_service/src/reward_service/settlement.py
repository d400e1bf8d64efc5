"""Claims within one transaction: the tables, and the few statements that settle any number of claims.

Claims that come together are settled together: one statement keeps all their replies, one charges all that an
account owes. Only where that does not go through (a budget ends in the middle) are they taken one by one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from looper_schemas.problems import ProblemCode

tables = sa.MetaData()
replies = sa.Table(
    "replies",
    tables,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("account", sa.String(64), nullable=False),
    sa.Column("key", sa.String(64), nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sa.Column("size", sa.Integer, nullable=False),
    sa.Column("expires", sa.Double, nullable=False, index=True),  # seconds since the epoch
    sa.UniqueConstraint("account", "key"),
)
usage = sa.Table(
    "usage",
    tables,
    sa.Column("account", sa.String(64), primary_key=True),
    sa.Column("used", sa.BigInteger, nullable=False),
)


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


class Statements:
    """What is said to the database, built once for its dialect."""

    def __init__(self, dialect: str, ttl_s: float) -> None:
        insert: Any = sqlite.insert if dialect == "sqlite" else postgresql.insert
        keep = insert(replies)
        new = keep.excluded
        # An expired reply gives way. A bound parameter for `now` would keep rows from sharing a statement.
        self.keep = keep.on_conflict_do_update(
            index_elements=["account", "key"],
            set_={"digest": new.digest, "body": new.body, "size": new.size, "expires": new.expires},
            where=replies.c.expires <= new.expires - sa.literal_column(repr(float(ttl_s))),
        ).returning(replies.c.account, replies.c.key)
        self.drop = sa.delete(replies).where(_named())
        self.find = sa.select(replies.c.digest, replies.c.body).where(
            _named(), replies.c.expires > sa.bindparam("now")
        )
        total = usage.c.used + sa.bindparam("cost")
        charge = insert(usage).values(account=sa.bindparam("whom"), used=sa.bindparam("cost"))

        def unless(where: Any) -> Any:
            return charge.on_conflict_do_update(
                index_elements=["account"], set_={"used": total}, where=where
            ).returning(usage.c.used)

        self.charge = unless(None)
        self.charge_within = unless(total <= sa.bindparam("budget"))


def _named() -> sa.ColumnElement[bool]:
    return sa.and_(replies.c.account == sa.bindparam("whom"), replies.c.key == sa.bindparam("name"))


class Settlement:
    """Claims within one transaction, and what it adds: replies kept and their bytes, items by account."""

    def __init__(self, connection: sa.Connection, statements: Statements, now: float, ttl_s: float) -> None:
        self._connection = connection
        self._say = statements
        self._now = now
        self._ttl_s = ttl_s
        self.kept: dict[StoreKey, int] = {}
        self.charged: defaultdict[str, int] = defaultdict(int)

    def settle(self, claim: Claim) -> Outcome:
        """As `settle_all` of one."""
        return self.settle_all([claim])[0]

    def settle_all(self, claims: Sequence[Claim]) -> list[Outcome]:
        """Charge and keep each of `claims`, unless its key has a reply already or its budget forbids it.

        The outcomes are those of settling one claim after the other, in their order.
        """
        keys = [claim.key for claim in claims if claim.key is not None]
        if len(set(keys)) < len(keys):
            return [outcome for claim in claims for outcome in self.settle_all([claim])]
        free = self._keep([claim for claim in claims if claim.key is not None])
        due = [claim for claim in claims if claim.key is None or claim.key in free]
        paid = self._charge(due)
        return [self._outcome(claim, free, paid) for claim in claims]

    def _outcome(self, claim: Claim, free: set[StoreKey], paid: set[int]) -> Outcome:
        if claim.key is not None and claim.key not in free:
            kept = find(self._connection, self._say, claim.key, self._now)
            if kept is None or kept.digest != claim.digest:
                return Outcome(b"", 0, ProblemCode.IDEMPOTENCY_MISMATCH)
            return Outcome(kept.body, 0)  # another one was first; a request is paid for once
        if id(claim) not in paid:
            if claim.key is not None:
                self._connection.execute(self._say.drop, _place(claim.key))
            return Outcome(b"", 0, ProblemCode.BUDGET_EXHAUSTED)
        if claim.key is not None:
            self.kept[claim.key] = len(claim.body)
        self.charged[claim.account] += claim.cost
        return Outcome(claim.body, claim.cost)

    def _keep(self, claims: Sequence[Claim]) -> set[StoreKey]:
        """Keep the replies of `claims`; the keys that were free.

        Sorted, as the accounts are: replicas that want the same rows at one time then wait, not deadlock.
        """
        rows: list[dict[str, Any]] = [
            {
                "account": claim.key.account,
                "key": claim.key.key,
                "digest": claim.digest,
                "body": claim.body,
                "size": len(claim.body),
                "expires": self._now + self._ttl_s,
            }
            for claim in sorted(claims, key=lambda claim: claim.key or ("",))
            if claim.key is not None
        ]
        if not rows:
            return set()
        return {StoreKey(*row) for row in self._connection.execute(self._say.keep, rows)}

    def _charge(self, claims: Sequence[Claim]) -> set[int]:
        """Charge `claims` as far as their budgets allow; the identities of those that were charged."""
        paid: set[int] = set()
        accounts: dict[str, list[Claim]] = defaultdict(list)
        for claim in claims:
            accounts[claim.account].append(claim)
        for account, theirs in sorted(accounts.items()):
            budgets = [claim.budget for claim in theirs if claim.budget is not None]
            if self._pay(account, sum(claim.cost for claim in theirs), min(budgets, default=None)):
                paid.update(id(claim) for claim in theirs)
            else:
                paid.update(id(claim) for claim in theirs if self._pay(account, claim.cost, claim.budget))
        return paid

    def _pay(self, account: str, cost: int, budget: int | None) -> bool:
        """Whether the budget allows `cost`; it is charged then."""
        if cost == 0:
            return True
        values: dict[str, Any] = {"whom": account, "cost": cost}
        if budget is None:
            return self._connection.execute(self._say.charge, values).first() is not None
        if cost > budget:
            return False
        within = {**values, "budget": budget}
        return self._connection.execute(self._say.charge_within, within).first() is not None


def find(connection: sa.Connection, say: Statements, key: StoreKey, now: float) -> Kept | None:
    """The reply kept under `key`."""
    row = connection.execute(say.find, {**_place(key), "now": now}).one_or_none()
    return None if row is None else Kept(row.digest, bytes(row.body))


def _place(key: StoreKey) -> dict[str, str]:
    return {"whom": key.account, "name": key.key}

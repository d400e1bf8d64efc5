"""What one key may use: items a minute, items in its life. An item is an arm, or a question without arms.

A request that came to nothing, and one that is answered from what was kept, take one item of the rate each.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from looper_schemas.problems import ProblemCode
from reward_service.auth import Principal
from reward_service.errors import ProblemError


@dataclass
class _Bucket:
    items: float
    at: float


class KeyLimits:
    """Keeps the limits of all accounts. All calls come from the event loop.

    Rates are kept in memory: a restart grants a fresh minute, and every replica counts for itself. Budgets
    are what `used` says, plus what is being scored; the database has the last word when a reply is settled.
    """

    def __init__(
        self, used: Callable[[str], Awaitable[int]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._used = used
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}
        self._reserved: Counter[str] = Counter()

    def reserve(self, principal: Principal, items: int) -> Reservation:
        """Room for `items` in the budget while an `async with` block runs; they count for the rate also when
        it fails.

        Raises:
            ProblemError: when the block is entered: budget_exhausted, or rate_limited with the time to wait.
        """
        return Reservation(self, principal, items)

    async def enter(self, principal: Principal, items: int) -> None:
        """Begin what `reserve` describes."""
        account = principal.account
        if principal.budget is not None:
            used = await self._used(account)
            if used + self._reserved[account] + items > principal.budget:
                raise ProblemError(ProblemCode.BUDGET_EXHAUSTED)
        if principal.rate is not None:
            self._take(account, principal.rate, items)
        self._reserved[account] += items

    def leave(self, principal: Principal, items: int) -> None:
        """End what `reserve` describes."""
        account = principal.account
        self._reserved[account] -= items
        if not self._reserved[account]:
            del self._reserved[account]

    def refuse_in_debt(self, principal: Principal) -> None:
        """Ask before a request costs anything.

        Raises:
            ProblemError: rate_limited: earlier ones left the rate in debt, so that it allows no item.
        """
        if principal.rate is not None:
            bucket = self._filled(principal.account, principal.rate)
            if bucket.items < 0:
                raise _rate_limited(1 - bucket.items, principal.rate)

    def count(self, principal: Principal) -> None:
        """Take an item for a request that came to nothing by its sender's doing; this may leave a debt."""
        if principal.rate is not None:
            self._filled(principal.account, principal.rate).items -= 1

    def repeat(self, principal: Principal) -> None:
        """Take an item for a reply that is sent again.

        Raises:
            ProblemError: rate_limited.
        """
        if principal.rate is not None:
            self._take(principal.account, principal.rate, 1)

    def _take(self, account: str, rate: int, items: int) -> None:
        """Take `items` from a bucket that holds one minute's worth. A larger request needs a full one, and
        leaves it in debt."""
        bucket = self._filled(account, rate)
        missing = min(items, rate) - bucket.items
        if missing > 0:
            raise _rate_limited(missing, rate)
        bucket.items -= items

    def _filled(self, account: str, rate: int) -> _Bucket:
        """The bucket of `account`, with what has come in until now."""
        now = self._clock()
        bucket = self._buckets.setdefault(account, _Bucket(rate, now))
        bucket.items = min(float(rate), bucket.items + (now - bucket.at) * rate / 60)
        bucket.at = now
        return bucket


def _rate_limited(missing: float, rate: int) -> ProblemError:
    return ProblemError(ProblemCode.RATE_LIMITED, retry_after_s=missing * 60 / rate)


class Reservation:
    """The block of `KeyLimits.reserve`."""

    __slots__ = ("_items", "_limits", "_principal")

    def __init__(self, limits: KeyLimits, principal: Principal, items: int) -> None:
        self._limits, self._principal, self._items = limits, principal, items

    async def __aenter__(self) -> None:
        await self._limits.enter(self._principal, self._items)

    async def __aexit__(self, *error: object) -> None:
        self._limits.leave(self._principal, self._items)

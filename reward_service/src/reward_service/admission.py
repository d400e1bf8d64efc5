"""What may wait inside the service, bounded in bytes and in arms; more is refused early, with Retry-After.

An account has half of either, so that none keeps another out. Who has nothing inside may have one request of
any size, which counts for the others as that half at most.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from looper_schemas.problems import ProblemCode
from reward_service.errors import ProblemError

_LONGEST_WAIT_S = 30.0


class Admission:
    """Counts what is inside. All calls come from the event loop, so plain integers suffice."""

    def __init__(self, max_bytes: int, max_arms: int, seconds_per_arm: Callable[[], float]) -> None:
        self._bytes = _Room(max_bytes)
        self._arms = _Room(max_arms)
        self._seconds_per_arm = seconds_per_arm

    @property
    def bytes(self) -> int:
        """Bytes of bodies inside."""
        return self._bytes.inside

    @property
    def arms(self) -> int:
        """Arms inside."""
        return self._arms.inside

    def body(self, account: str, size: int) -> Place:
        """Room for a body of `size` bytes while a `with` block runs.

        Raises:
            ProblemError: overloaded.
        """
        return self._place(self._bytes, account, size)

    def scoring(self, account: str, arms: int) -> Place:
        """Room for `arms` arms in the queue while a `with` block runs.

        Raises:
            ProblemError: overloaded.
        """
        return self._place(self._arms, account, arms)

    def full(self, account: str) -> bool:
        """Whether there is no room for a single arm of `account`."""
        return not self._arms.fits(account, 1)

    def overloaded(self) -> ProblemError:
        """What a request without room ends with; it says when to come again."""
        wait_s = min(_LONGEST_WAIT_S, max(1.0, 0.5 * self.arms * self._seconds_per_arm()))
        return ProblemError(ProblemCode.OVERLOADED, retry_after_s=wait_s)

    def _place(self, room: _Room, account: str, amount: int) -> Place:
        if not room.fits(account, amount):
            raise self.overloaded()
        return Place(room, account, amount)


class _Room:
    """What is inside of one kind, by account, beside the most that may be."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._share = most / 2  # of one account
        self._of: Counter[str] = Counter()
        self.inside = 0

    def fits(self, account: str, amount: int) -> bool:
        """Whether `amount` more of `account` may come in."""
        after = self._of[account] + amount
        if self._of[account] and after > self._share:
            return False
        others = sum(min(held, self._share) for name, held in self._of.items() if name != account)
        return others + min(after, self._share) <= self._most

    def add(self, account: str, amount: int) -> None:
        """Count `amount` more of `account`, or less where it is negative."""
        self.inside += amount
        self._of[account] += amount
        if not self._of[account]:
            del self._of[account]


class Place:
    """What a request takes up inside, from the start of a `with` block until its end, or until given back."""

    __slots__ = ("_account", "_amount", "_room")

    def __init__(self, room: _Room, account: str, amount: int) -> None:
        self._room, self._account, self._amount = room, account, amount

    def __enter__(self) -> Place:
        self._room.add(self._account, self._amount)
        return self

    def give_back(self) -> None:
        """End it now."""
        self._room.add(self._account, -self._amount)
        self._amount = 0

    def __exit__(self, *error: object) -> None:
        self.give_back()

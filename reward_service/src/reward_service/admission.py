"""What may wait inside the service, bounded in bytes and in arms; more is refused early, with Retry-After."""

from __future__ import annotations

from collections.abc import Callable

from looper_schemas.problems import ProblemCode
from reward_service.errors import ProblemError

_LONGEST_WAIT_S = 30.0


class Admission:
    """Counts what is inside. All calls come from the event loop, so plain integers suffice."""

    def __init__(self, max_bytes: int, max_arms: int, seconds_per_arm: Callable[[], float]) -> None:
        self._max_bytes = max_bytes
        self._max_arms = max_arms
        self._seconds_per_arm = seconds_per_arm
        self.bytes = 0
        self.arms = 0

    def body(self, size: int) -> Place:
        """Room for a body of `size` bytes while a `with` block runs. One request is always let in.

        Raises:
            ProblemError: overloaded.
        """
        if self.bytes and self.bytes + size > self._max_bytes:
            raise self.overloaded()
        return Place(self, size, 0)

    def scoring(self, arms: int) -> Place:
        """Room for `arms` arms in the queue while a `with` block runs. One request is always let in.

        Raises:
            ProblemError: overloaded.
        """
        if self.arms and self.arms + arms > self._max_arms:
            raise self.overloaded()
        return Place(self, 0, arms)

    @property
    def full(self) -> bool:
        """Whether there is no room for a single arm."""
        return self.arms >= self._max_arms

    def overloaded(self) -> ProblemError:
        """What a request without room ends with; it says when to come again."""
        wait_s = min(_LONGEST_WAIT_S, max(1.0, 0.5 * self.arms * self._seconds_per_arm()))
        return ProblemError(ProblemCode.OVERLOADED, retry_after_s=wait_s)


class Place:
    """What a request takes up inside, from the start of a `with` block until its end, or until given back."""

    __slots__ = ("_admission", "_arms", "_size")

    def __init__(self, admission: Admission, size: int, arms: int) -> None:
        self._admission, self._size, self._arms = admission, size, arms

    def __enter__(self) -> Place:
        self._admission.bytes += self._size
        self._admission.arms += self._arms
        return self

    def give_back(self) -> None:
        """End it now."""
        self._admission.bytes -= self._size
        self._admission.arms -= self._arms
        self._size = self._arms = 0

    def __exit__(self, *error: object) -> None:
        self.give_back()

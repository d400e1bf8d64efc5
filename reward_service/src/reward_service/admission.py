"""What may wait inside the service, bounded in bytes and in arms; more is refused early, with Retry-After."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

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

    @contextmanager
    def body(self, size: int) -> Iterator[None]:
        """Room for a body of `size` bytes while the block runs. One request is always let in.

        Raises:
            ProblemError: overloaded.
        """
        if self.bytes and self.bytes + size > self._max_bytes:
            raise self.overloaded()
        self.bytes += size
        try:
            yield
        finally:
            self.bytes -= size

    @contextmanager
    def scoring(self, arms: int) -> Iterator[None]:
        """Room for `arms` arms in the queue while the block runs. One request is always let in.

        Raises:
            ProblemError: overloaded.
        """
        if self.arms and self.arms + arms > self._max_arms:
            raise self.overloaded()
        self.arms += arms
        try:
            yield
        finally:
            self.arms -= arms

    @property
    def full(self) -> bool:
        """Whether there is no room for a single arm."""
        return self.arms >= self._max_arms

    def overloaded(self) -> ProblemError:
        """What a request without room ends with; it says when to come again."""
        wait_s = min(_LONGEST_WAIT_S, max(1.0, 0.5 * self.arms * self._seconds_per_arm()))
        return ProblemError(ProblemCode.OVERLOADED, retry_after_s=wait_s)

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_service.auth import Principal
from reward_service.errors import ProblemError
from reward_service.limits import KeyLimits

pytestmark = pytest.mark.anyio


class World:
    """A clock and a database that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0
        self.used = 0
        self.limits = KeyLimits(self._used, lambda: self.now)

    async def _used(self, account: str) -> int:
        return self.used

    async def take(self, items: int, *, rate: int | None = None, budget: int | None = None) -> float | None:
        """None when `items` were let in, else the seconds to wait (0 where waiting does not help)."""
        try:
            async with self.limits.reserve(Principal("key", frozenset(), "acc", budget, rate), items):
                return None
        except ProblemError as error:
            return error.retry_after_s or 0.0


async def test_a_minute_holds_its_items_and_says_how_long_to_wait() -> None:
    world = World()
    assert [await world.take(20, rate=60) for _ in range(3)] == [None] * 3
    assert await world.take(10, rate=60) == pytest.approx(10.0)  # one item a second
    world.now = 9.0
    assert await world.take(10, rate=60) == pytest.approx(1.0)
    world.now = 10.0
    assert await world.take(10, rate=60) is None
    world.now = 10_000.0  # a long rest saves no more than a minute
    assert await world.take(60, rate=60) is None
    assert await world.take(1, rate=60) == pytest.approx(1.0)


async def test_a_request_larger_than_a_minute_passes_and_is_paid_off() -> None:
    world = World()
    assert await world.take(150, rate=60) is None
    assert await world.take(1, rate=60) == pytest.approx(91.0)
    world.now = 91.0
    assert await world.take(1, rate=60) is None


@given(
    rate=st.integers(1, 100),
    asked=st.lists(st.tuples(st.floats(0.0, 30.0), st.integers(1, 50)), max_size=60),
)
async def test_no_history_of_requests_gets_more_than_its_rate(
    rate: int, asked: list[tuple[float, int]]
) -> None:
    world, admitted = World(), 0
    for pause, items in asked:
        world.now += pause
        if await world.take(items, rate=rate) is None:
            admitted += items
    # One minute's worth at the start, the rate since, and one request that may overdraw.
    assert admitted <= rate * (1 + world.now / 60) + max([items for _, items in asked], default=0) + 1e-6


async def test_the_clock_of_the_wall_plays_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    await world.take(60, rate=60)
    monkeypatch.setattr("time.time", lambda: 1e12)
    assert await world.take(1, rate=60) == pytest.approx(1.0)


async def test_what_is_being_scored_counts_for_the_budget() -> None:
    world = World()
    world.used = 5
    principal = Principal("key", frozenset(), "acc", 10, None)
    async with world.limits.reserve(principal, 3):
        assert await world.take(3, budget=10) == 0.0
        assert await world.take(2, budget=10) is None
    assert await world.take(5, budget=10) is None
    assert await world.take(6, budget=10) == 0.0


async def test_an_exhausted_budget_takes_nothing_from_the_rate() -> None:
    world = World()
    for _ in range(5):
        assert await world.take(60, rate=60, budget=10) == 0.0
    assert await world.take(60, rate=60) is None


async def test_accounts_have_their_own_limits() -> None:
    world = World()
    await world.take(60, rate=60)
    async with world.limits.reserve(Principal("k", frozenset(), "other", None, 60), 60):
        pass


async def test_what_came_to_nothing_may_leave_a_debt_in_which_nothing_is_let_in() -> None:
    world = World()
    someone = Principal("key", frozenset(), "acc", None, 60)
    for _ in range(60):
        world.limits.count(someone)
        world.limits.refuse_in_debt(someone)  # an empty bucket is no debt
    world.limits.count(someone)
    with pytest.raises(ProblemError, match="rate_limited") as caught:
        world.limits.refuse_in_debt(someone)
    assert caught.value.retry_after_s == pytest.approx(2.0)  # from -1 to the 1 that any request costs
    world.now = 1.5
    world.limits.refuse_in_debt(someone)
    assert await world.take(1, rate=60) == pytest.approx(0.5)
    without = Principal("key", frozenset(), "other", None, None)
    world.limits.count(without)
    world.limits.refuse_in_debt(without)


async def test_a_repeat_takes_one_item_of_the_rate_and_none_of_the_budget() -> None:
    world = World()
    someone = Principal("key", frozenset(), "acc", 2, 2)
    world.used = 2
    world.limits.repeat(someone)
    world.limits.repeat(someone)
    with pytest.raises(ProblemError, match="rate_limited") as caught:
        world.limits.repeat(someone)
    assert caught.value.retry_after_s == pytest.approx(30.0)

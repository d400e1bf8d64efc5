from __future__ import annotations

from collections import Counter
from contextlib import ExitStack, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_service.admission import Admission
from reward_service.errors import ProblemError


def admission(seconds_per_arm: float = 0.1) -> Admission:
    return Admission(max_bytes=100, max_arms=10, seconds_per_arm=lambda: seconds_per_arm)


def test_room_is_given_back_also_after_an_error() -> None:
    inside = admission()

    def fail() -> None:
        with inside.body("a", 60), inside.scoring("a", 6):
            assert (inside.bytes, inside.arms) == (60, 6)
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        fail()
    assert (inside.bytes, inside.arms) == (0, 0)


def test_bounds_are_exact() -> None:
    inside = admission()
    for enter, unit in ((inside.body, 10), (inside.scoring, 1)):
        with (
            enter("a", 5 * unit),
            enter("b", 4 * unit),
            enter("c", unit),
            pytest.raises(ProblemError, match="overloaded"),
            enter("d", 1),
        ):
            pass


def test_an_account_has_half_and_keeps_nobody_out() -> None:
    inside = admission()
    with inside.body("greedy", 30), inside.body("greedy", 20), inside.scoring("greedy", 5):
        for full in (lambda: inside.body("greedy", 1), lambda: inside.scoring("greedy", 1)):
            with pytest.raises(ProblemError, match="overloaded"):
                full()
        assert inside.full("greedy")
        assert not inside.full("other")
        with inside.body("other", 50), inside.scoring("other", 5):
            assert (inside.bytes, inside.arms) == (100, 10)


def test_it_is_full_when_not_one_arm_more_would_be_let_in() -> None:
    inside = admission()
    assert not inside.full("a")
    with inside.scoring("a", 4):
        assert not inside.full("a")
        with inside.scoring("a", 1):
            assert inside.full("a")
            assert not inside.full("b")
            with inside.scoring("b", 5):
                assert inside.full("c")
    assert not inside.full("a")


def test_one_request_is_always_let_in_and_a_large_one_keeps_no_other_account_out() -> None:
    inside = admission()
    with inside.body("greedy", 1000), inside.scoring("greedy", 1000):
        assert inside.arms == 1000
        assert inside.full("greedy")
        with inside.body("other", 50), inside.scoring("other", 5):
            assert inside.arms == 1005
        with inside.body("other", 1000), inside.scoring("other", 1000):
            assert inside.full("third")


def let_in(inside: Admission, asked: list[tuple[str, int]], places: ExitStack) -> Counter[str]:
    """Arms that are inside by account, after all of `asked` have come and none has left."""
    held: Counter[str] = Counter()
    for account, arms in asked:
        with suppress(ProblemError):
            places.enter_context(inside.scoring(account, arms))
            held[account] += arms
    return held


@given(asked=st.lists(st.integers(0, 30), max_size=40), others=st.lists(st.integers(1, 5), max_size=5))
def test_nothing_that_one_account_asks_for_keeps_out_what_fits_another_ones_half(
    asked: list[int], others: list[int]
) -> None:
    inside = admission()
    with ExitStack() as places:
        let_in(inside, [("greedy", arms) for arms in asked], places)
        within = [arms for n, arms in enumerate(others) if sum(others[: n + 1]) <= 5]
        assert let_in(inside, [("other", arms) for arms in within], places).total() == sum(within)


@given(asked=st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 30)), max_size=40))
def test_all_accounts_together_stay_bounded(asked: list[tuple[str, int]]) -> None:
    inside = admission()
    with ExitStack() as places:
        held = let_in(inside, asked, places)
        assert inside.arms == held.total()
        assert held.total() <= 10 + 2 * (30 - 5)  # the bound, and two requests of 30 that count as 5
        assert sum(min(5, arms) for arms in held.values()) <= 10
    assert inside.arms == 0


@pytest.mark.parametrize(("seconds_per_arm", "expected"), [(0.0001, 1.0), (0.5, 2.5), (100.0, 30.0)])
def test_retry_after_is_half_of_the_work_that_waits_within_bounds(
    seconds_per_arm: float, expected: float
) -> None:
    inside = admission(seconds_per_arm)
    with inside.scoring("a", 10), pytest.raises(ProblemError) as caught, inside.scoring("a", 1):
        pass
    assert caught.value.retry_after_s == pytest.approx(expected)


def test_a_place_that_was_given_back_is_not_given_back_twice() -> None:
    inside = admission()
    with inside.body("a", 5), inside.scoring("a", 6) as place:
        place.give_back()
        assert (inside.bytes, inside.arms) == (5, 0)
        with inside.scoring("a", 10):
            assert inside.full("a")
    assert (inside.bytes, inside.arms) == (0, 0)

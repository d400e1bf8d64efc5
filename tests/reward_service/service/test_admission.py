from __future__ import annotations

import pytest

from reward_service.admission import Admission
from reward_service.errors import ProblemError


def admission(seconds_per_arm: float = 0.1) -> Admission:
    return Admission(max_bytes=100, max_arms=10, seconds_per_arm=lambda: seconds_per_arm)


def test_room_is_given_back_also_after_an_error() -> None:
    inside = admission()

    def fail() -> None:
        with inside.body(60), inside.scoring(6):
            assert (inside.bytes, inside.arms) == (60, 6)
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        fail()
    assert (inside.bytes, inside.arms) == (0, 0)


def test_bounds_are_exact() -> None:
    inside = admission()
    with inside.body(60), inside.body(40), pytest.raises(ProblemError, match="overloaded"), inside.body(1):
        pass
    with (
        inside.scoring(6),
        inside.scoring(4),
        pytest.raises(ProblemError, match="overloaded"),
        inside.scoring(1),
    ):
        pass


def test_it_is_full_when_not_one_arm_more_would_be_let_in() -> None:
    inside = admission()
    assert not inside.full
    with inside.scoring(9):
        assert not inside.full
        with inside.scoring(1):
            assert inside.full
    assert not inside.full


def test_one_request_is_always_let_in() -> None:
    inside = admission()
    with inside.body(1000), inside.scoring(1000):
        assert inside.arms == 1000


@pytest.mark.parametrize(("seconds_per_arm", "expected"), [(0.0001, 1.0), (0.5, 2.5), (100.0, 30.0)])
def test_retry_after_is_half_of_the_work_that_waits_within_bounds(
    seconds_per_arm: float, expected: float
) -> None:
    inside = admission(seconds_per_arm)
    with inside.scoring(10), pytest.raises(ProblemError) as caught, inside.scoring(1):
        pass
    assert caught.value.retry_after_s == pytest.approx(expected)


def test_a_place_that_was_given_back_is_not_given_back_twice() -> None:
    inside = admission()
    with inside.body(5), inside.scoring(6) as place:
        place.give_back()
        assert (inside.bytes, inside.arms) == (5, 0)
        with inside.scoring(10):
            assert inside.full
    assert (inside.bytes, inside.arms) == (0, 0)

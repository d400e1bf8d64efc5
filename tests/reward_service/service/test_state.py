from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from looper_schemas.problems import ProblemCode
from reward_service.errors import StartError
from reward_service.state import Claim, Kept, Outcome, State, StateUnavailable, StoreKey, fair_share

POSTGRES_VARIABLE = "LOOPER_TEST_POSTGRES"  # URL of a PostgreSQL database that the tests may empty

# Tests that empty the one database stand in one group, so that no two of them run at once.
pytestmark = pytest.mark.xdist_group("postgres")

Open = Callable[..., State]


def opened(home: Path, **bounds: Any) -> State:
    return State(home, **{"url": None, "entries": 100, "max_bytes": 10_000, "ttl_s": 60.0, **bounds})


@pytest.fixture(params=["sqlite", "postgresql"])
def open_state(request: pytest.FixtureRequest, home: Path) -> Open:
    """Open the database of this test: in the folder, or the one that the environment names, emptied."""
    url = None
    if request.param == "postgresql":
        url = os.environ.get(POSTGRES_VARIABLE)
        if url is None:
            pytest.skip(f"{POSTGRES_VARIABLE} is not set")
        engine = sa.create_engine(url)
        with engine.begin() as connection:
            connection.execute(sa.text("DROP TABLE IF EXISTS replies, usage"))
        engine.dispose()
    return lambda **bounds: opened(home, url=url, **bounds)


@pytest.fixture
def state(open_state: Open) -> Iterator[State]:
    with closing(open_state()) as state:
        yield state


def claim(
    name: str | None = None,
    *,
    cost: int = 1,
    budget: int | None = None,
    digest: str = "d",
    body: bytes = b"body",
    account: str = "acc",
) -> Claim:
    return Claim(account, cost, budget, StoreKey(account, name) if name else None, digest, body)


def settle(state: State, *claims: Claim) -> list[Outcome]:
    with state.settling() as settlement:
        outcomes = [settlement.settle(one) for one in claims]
    if state.too_full:
        state.prune()
    return outcomes


def test_replies_and_charges_outlive_a_restart(open_state: Open) -> None:
    with closing(open_state()) as state:
        assert settle(state, claim("a", cost=3), claim(cost=4)) == [Outcome(b"body", 3), Outcome(b"body", 4)]
    with closing(open_state()) as state:
        assert state.find(StoreKey("acc", "a")) == Kept("d", b"body")
        assert state.find(StoreKey("other", "a")) is None
        assert (state.used("acc"), state.used("other")) == (7, 0)


def test_a_repeated_claim_is_charged_once_and_gets_the_first_bytes(state: State) -> None:
    settle(state, claim("a", cost=3))
    assert settle(state, claim("a", cost=3, body=b"later")) == [Outcome(b"body", 0)]
    (other,) = settle(state, claim("a", cost=3, digest="other", body=b"secret"))
    assert other == Outcome(b"", 0, ProblemCode.IDEMPOTENCY_MISMATCH)
    assert state.used("acc") == 3


@pytest.mark.parametrize("open_state", ["postgresql"], indirect=True)
def test_replicas_that_start_together_on_an_empty_database_all_start(open_state: Open) -> None:
    together, several = threading.Barrier(6), []

    def start() -> None:
        together.wait(timeout=30)
        several.append(open_state())

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for state in several:
        state.close()
    assert len(several) == len(threads)


def test_two_replicas_that_race_charge_once(open_state: Open) -> None:
    with closing(open_state()) as one, closing(open_state()) as two:
        assert two.find(StoreKey("acc", "a")) is None
        settle(one, claim("a", cost=3, body=b"one"))
        assert settle(two, claim("a", cost=3, body=b"two")) == [Outcome(b"one", 0)]
        assert one.used("acc") == two.used("acc") == 3


def test_replicas_at_one_time_never_overdraw_and_pay_a_name_once(open_state: Open) -> None:
    failures: list[Exception] = []

    def work() -> None:
        try:
            with closing(open_state()) as state:
                for n in range(20):
                    settle(state, claim(f"{n}", cost=3, budget=50))
        except Exception as error:
            failures.append(error)

    open_state().close()  # the tables are there
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    with closing(open_state()) as state:
        assert state.used("acc") == 48  # sixteen names at three items; a seventeenth would be 51
        assert sum(state.find(StoreKey("acc", f"{n}")) is not None for n in range(20)) == 16


def test_a_budget_is_kept_to_the_item(state: State) -> None:
    outcomes = settle(state, *(claim(f"{n}", cost=4, budget=10) for n in range(3)))
    assert [outcome.charged for outcome in outcomes] == [4, 4, 0]
    assert outcomes[2] == Outcome(b"", 0, ProblemCode.BUDGET_EXHAUSTED)
    assert state.find(StoreKey("acc", "2")) is None, "what was withheld is not kept"
    assert settle(state, claim("3", cost=2, budget=10))[0].charged == 2
    assert settle(state, claim("4", cost=1, budget=10))[0].problem is ProblemCode.BUDGET_EXHAUSTED
    assert settle(state, claim("5", cost=0, budget=10))[0].problem is None
    assert settle(state, claim("6", cost=11, budget=10, account="new"))[0].charged == 0
    assert (state.used("acc"), state.used("new")) == (10, 0)


def test_a_transaction_that_fails_leaves_nothing(state: State) -> None:
    def broken() -> None:
        with state.settling() as settlement:
            settlement.settle(claim("a", cost=5))
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        broken()
    assert state.used("acc") == 0
    assert state.find(StoreKey("acc", "a")) is None


def test_replies_expire_by_the_clock_of_the_wall(open_state: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    with closing(open_state(ttl_s=86_400.0)) as state:
        settle(state, claim("a", cost=2))
        monkeypatch.setattr(time, "time", lambda: now + 3600)  # a step of an hour loses nothing
        assert state.find(StoreKey("acc", "a")) is not None
        monkeypatch.setattr(time, "time", lambda: now + 86_500)
        assert state.find(StoreKey("acc", "a")) is None
        # The name is free again, so another body is no mismatch, and it is paid for.
        assert settle(state, claim("a", cost=2, digest="other")) == [Outcome(b"body", 2)]
        assert state.used("acc") == 4


@pytest.mark.parametrize(("entries", "max_bytes"), [(20, 10_000), (1000, 200)])
def test_replies_are_bounded_and_the_oldest_go_first(open_state: Open, entries: int, max_bytes: int) -> None:
    with closing(open_state(entries=entries, max_bytes=max_bytes)) as state:
        for n in range(50):
            settle(state, claim(f"{n}", body=b"x" * 10))
        found = [n for n in range(50) if state.find(StoreKey("acc", f"{n}"))]
        assert 18 <= len(found) <= 20
        assert found == list(range(50 - len(found), 50))
        assert state.used("acc") == 50, "what was charged is never forgotten"


@pytest.mark.parametrize(("entries", "max_bytes"), [(20, 10_000), (1000, 200)])
def test_who_holds_the_most_loses_its_own_replies_first(
    open_state: Open, entries: int, max_bytes: int
) -> None:
    with closing(open_state(entries=entries, max_bytes=max_bytes)) as state:
        for n in range(3):
            settle(state, claim(f"{n}", account="victim", body=b"x" * 10))
        for n in range(100):
            settle(state, claim(f"{n}", account="greedy", body=b"x" * 10))
        assert all(state.find(StoreKey("victim", f"{n}")) for n in range(3))
        found = [n for n in range(100) if state.find(StoreKey("greedy", f"{n}"))]
        assert found == list(range(100 - len(found), 100))
        assert 15 <= len(found) <= 17
    with closing(open_state(entries=entries // 2, max_bytes=max_bytes // 2)) as state:  # pruned at the start
        assert all(state.find(StoreKey("victim", f"{n}")) for n in range(3))
        # By hand: nine tenths of half the bound are 9 replies, or 90 bytes; three are the victim's.
        assert sum(state.find(StoreKey("greedy", f"{n}")) is not None for n in range(100)) == 6


@given(held=st.lists(st.integers(0, 50), max_size=8), most=st.integers(0, 200))
def test_a_fair_share_is_what_taking_from_the_largest_one_by_one_leaves(held: list[int], most: int) -> None:
    left = list(held)
    while sum(left) > most:
        left[left.index(max(left))] -= 1
    share = fair_share(held, most)
    cut = [min(one, share) for one in held]
    assert sum(cut) <= most
    # The shares are whole numbers: one reply of some accounts at most is between the two.
    assert all(0 <= slow - fast <= 1 for slow, fast in zip(left, cut, strict=True))
    if sum(held) <= most:
        assert cut == held


def test_the_file_is_private_and_in_wal_mode(home: Path) -> None:
    with closing(opened(home)) as state:
        settle(state, claim("a"))
    for file in home.glob("state.sqlite*"):
        assert file.stat().st_mode & 0o077 == 0, file.name
    with closing(sqlite3.connect(home / "state.sqlite")) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_file_that_is_no_database_stops_the_start(home: Path) -> None:
    (home / "state.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(StartError) as caught:
        opened(home)
    assert "\n" not in str(caught.value)
    assert "state.sqlite" in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://user:hunter2@127.0.0.1:1/none",
        "mysql://user:hunter2@127.0.0.1/none",
        "nonsense hunter2",
    ],
)
def test_a_database_that_cannot_be_reached_stops_the_start_and_its_password_stays_secret(
    home: Path, url: str
) -> None:
    with pytest.raises(StartError) as caught:
        opened(home, url=url)
    assert "state_url" in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert not (home / "state.sqlite").exists()


def test_a_locked_database_is_unavailable_and_then_works_again(home: Path) -> None:
    with closing(opened(home)) as state:
        with closing(sqlite3.connect(home / "state.sqlite", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(StateUnavailable):
                settle(state, claim("a", cost=1))
            assert state.used("acc") == 0
        assert settle(state, claim("a", cost=1)) == [Outcome(b"body", 1)]


def test_a_database_without_room_is_not_to_be_moved_away(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(home).close()
    (home / "state.sqlite").write_bytes(b"x" * 5000)
    with pytest.raises(StartError, match="restore it from a backup"):
        opened(home)
    (home / "state.sqlite").unlink()
    monkeypatch.setattr("reward_service.state._create_tables", full)
    with pytest.raises(StartError, match="room on the disk") as caught:
        opened(home)
    assert "move it away" not in str(caught.value)


def full(engine: sa.Engine) -> None:
    """As an INSERT ends on a full disk."""
    with engine.begin() as connection:
        connection.execute(sa.text("PRAGMA max_page_count = 1"))
        for n in range(9):
            connection.execute(sa.text(f"CREATE TABLE t{n} (x)"))

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from reward_service.group_commit import GroupCommit

pytestmark = pytest.mark.anyio


async def test_what_arrives_during_a_write_is_written_together_in_order() -> None:
    gate, groups = threading.Event(), []

    def write(items: Sequence[int]) -> list[int]:
        groups.append(list(items))
        assert gate.wait(10)
        return [10 * item for item in items]

    ledger = GroupCommit(write)
    ledger.start()
    first = asyncio.create_task(ledger.commit(0))
    while not groups:
        await asyncio.sleep(0.001)
    rest = [asyncio.create_task(ledger.commit(item)) for item in range(1, 50)]
    await asyncio.sleep(0.01)
    assert not first.done()
    gate.set()
    assert await asyncio.gather(first, *rest) == [10 * item for item in range(50)]
    assert groups == [[0], list(range(1, 50))]
    ledger.stop()


async def test_a_failure_reaches_everyone_of_its_group_and_nobody_else() -> None:
    def write(items: Sequence[int]) -> list[int]:
        if 1 in items:
            raise OSError("no")
        return list(items)

    ledger = GroupCommit(write)
    ledger.start()
    with pytest.raises(OSError, match="no"):
        await ledger.commit(1)
    assert await ledger.commit(2) == 2
    ledger.stop()


async def test_a_missing_outcome_is_a_failure() -> None:
    ledger: GroupCommit[int, int] = GroupCommit(lambda items: [])
    ledger.start()
    with pytest.raises(RuntimeError, match="one outcome"):
        await ledger.commit(1)
    ledger.stop()


async def test_a_cancelled_wait_disturbs_nobody_and_stop_writes_what_waits() -> None:
    gate, written = threading.Event(), []

    def write(items: Sequence[int]) -> Sequence[int]:
        assert gate.wait(10)
        written.extend(items)
        return items

    ledger = GroupCommit(write)
    ledger.start()
    waits = [asyncio.create_task(ledger.commit(item)) for item in range(4)]
    await asyncio.sleep(0.01)
    waits[2].cancel()
    gate.set()
    await asyncio.to_thread(ledger.stop)
    assert written == [0, 1, 2, 3]
    assert await asyncio.gather(waits[0], waits[1], waits[3]) == [0, 1, 3]

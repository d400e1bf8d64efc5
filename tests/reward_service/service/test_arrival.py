from __future__ import annotations

import asyncio
from typing import Any

import pytest

from reward_service.arrival import ARRIVING, receive_deadline

pytestmark = pytest.mark.anyio


def scope(**state: Any) -> dict[str, Any]:
    return {"type": "http", "state": state}


@pytest.mark.parametrize("state", [{}, {ARRIVING: lambda: True}], ids=["nobody knows", "more is to come"])
async def test_a_body_that_may_still_come_has_a_deadline(state: dict[str, Any]) -> None:
    with pytest.raises(TimeoutError):
        async with receive_deadline(scope(**state), 0.01):
            await asyncio.Event().wait()


async def test_a_body_that_is_there_is_read_without_one() -> None:
    async with receive_deadline(scope(**{ARRIVING: lambda: False}), 0.01):
        await asyncio.sleep(0.05)

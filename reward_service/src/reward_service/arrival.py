"""The deadline for receiving a body, set only where there is something to wait for.

Most bodies are there, whole, before the application is called. The protocol knows; a timer for them would
cost more than reading them.
"""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any

from starlette.types import Scope

ARRIVING = "body_is_arriving"  # in a request's state: tells whether some of its body is still to come
_AT_ONCE = nullcontext()


def receive_deadline(scope: Scope, seconds: float) -> AbstractAsyncContextManager[Any]:
    """A block in which the body of a request is received, for `seconds` at most.

    Raises:
        TimeoutError: when the block is left: the time was up.
    """
    arriving = scope["state"].get(ARRIVING)
    return _AT_ONCE if arriving is not None and not arriving() else asyncio.timeout(seconds)

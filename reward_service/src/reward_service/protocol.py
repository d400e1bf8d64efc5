"""HTTP/1.1 as uvicorn speaks it by h11, with the edges closed that no application sees.

A head that does not arrive within the receive deadline, a connection above the limit, bytes that are no HTTP:
each ends with a constant problem (uvicorn would wait for ever, accept, answer in plain text). A connection
whose request body is still under way when its reply is complete is closed, because nobody will read the rest.
Head and body of a reply leave in one piece: uvicorn's two would each cost a call of the kernel here, and wake
the client twice.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from looper_schemas.problems import ProblemCode
from reward_service.arrival import ARRIVING
from reward_service.errors import ProblemError, ProblemResponse
from reward_service.settings import Settings

_RETRY_S = 1.0


class JoinedWrites:
    """A transport that holds a reply's head back until its next piece, and sends both at once."""

    def __init__(self, transport: asyncio.Transport, connection: h11.Connection) -> None:
        self._transport = transport
        self._connection = connection
        self._head = b""
        self.is_closing = transport.is_closing  # asked for several times a request

    def write(self, data: bytes) -> None:
        """Send `data`, after the head that was held back; or hold it back, where it is one."""
        if not self._head and self._connection.our_state is h11.SEND_BODY:
            self._head = data
            return
        data, self._head = self._head + data, b""
        if data:
            self._transport.write(data)

    def close(self) -> None:
        """Send what was held back, then close."""
        self.write(b"")
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class GuardedProtocol(H11Protocol):
    """One connection. `limits` is set by `protocol_for`."""

    limits: ClassVar[Settings]
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, ARRIVING: self._body_is_arriving}  # every request gets a copy
        self.transport = JoinedWrites(transport, self.conn)  # type: ignore[assignment]
        if len(self.connections) > self.limits.max_connections:
            self._refuse(ProblemCode.OVERLOADED, _RETRY_S)
        else:
            self._expect_head()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._head_has_arrived()
        elif self._head_timer is None:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_has_arrived()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn while it handles the parser's error, which knows whether size was the matter."""
        error = sys.exc_info()[1]
        too_large = isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431
        self._refuse(ProblemCode.HEADERS_TOO_LARGE if too_large else ProblemCode.MALFORMED_REQUEST)

    def _body_is_arriving(self) -> bool:
        return bool(self.cycle.more_body)

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(self.limits.receive_deadline_s, self._head_is_late)

    def _head_has_arrived(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self._refuse(ProblemCode.REQUEST_TIMEOUT)

    def _refuse(self, code: ProblemCode, retry_after_s: float | None = None) -> None:
        """Answer `code`, unless a reply is under way, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            reply = ProblemResponse(ProblemError(code, retry_after_s=retry_after_s), secrets.token_hex(16))
            headers = [*reply.raw_headers, (b"connection", b"close")]
            status = reply.status_code
            for event in (
                h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status]),
                h11.Data(data=bytes(reply.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def protocol_for(settings: Settings) -> type[GuardedProtocol]:
    """The protocol class that keeps the limits of `settings`."""
    return type("LimitedProtocol", (GuardedProtocol,), {"limits": settings})

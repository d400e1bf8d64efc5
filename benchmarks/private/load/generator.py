"""A cheap load generator: keep-alive HTTP/1.1 over asyncio protocols, nothing parsed but lengths."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Callable

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class Tally:
    """Statuses, and the latencies (seconds) of 200 replies, of one phase."""

    def __init__(self) -> None:
        self.statuses: Counter[int | str] = Counter()
        self.latencies: list[float] = []

    def percentile(self, share: float) -> float:
        """That of the latencies, by nearest rank."""
        ranked = sorted(self.latencies)
        return ranked[min(len(ranked) - 1, int(share * len(ranked)))]


class Connection(asyncio.Protocol):
    """One connection that sends requests one after another; `done` is called after every reply or loss."""

    def __init__(self, tally: Tally, done: Callable[[Connection], None]) -> None:
        self._tally = tally
        self._done = done
        self._buffer = b""
        self._sent_at = 0.0
        self.transport: asyncio.Transport | None = None
        self.waiting = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def send(self, request: bytes) -> None:
        """Send `request` now."""
        assert self.transport is not None
        self.waiting = True
        self._sent_at = time.perf_counter()
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, separator, body = self._buffer.partition(b"\r\n\r\n")
        if not separator:
            return
        length = _LENGTH.search(head)
        if length is not None and len(body) < int(length[1]):
            return
        self._buffer = b""
        status = int(head[9:12])
        self._tally.statuses[status] += 1
        if status == 200:
            self._tally.latencies.append(time.perf_counter() - self._sent_at)
        self.waiting = False
        self._done(self)

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        if self.waiting:
            self._tally.statuses["lost"] += 1
            self.waiting = False
        self._done(self)


async def closed_loop(port: int, connections: int, seconds: float, request: Callable[[], bytes]) -> Tally:
    """Every connection sends its next request when the last one is answered."""
    loop = asyncio.get_running_loop()
    tally, ends = Tally(), loop.time() + seconds

    def done(connection: Connection) -> None:
        if connection.transport is not None and loop.time() < ends:
            connection.send(request())

    open_ = [
        (await loop.create_connection(lambda: Connection(tally, done), "127.0.0.1", port))[1]
        for _ in range(connections)
    ]
    for connection in open_:
        connection.send(request())
    await asyncio.sleep(seconds)
    await _close(open_)
    return tally


async def open_loop(
    port: int, connections: int, rate: float, seconds: float, request: Callable[[], bytes]
) -> Tally:
    """`rate` requests a second in all, spread over the connections, whatever becomes of them.

    A connection that the server closed is opened again before its next request; one that still waits for a
    reply when its turn comes skips the turn.
    """
    loop = asyncio.get_running_loop()
    tally = Tally()
    open_ = [
        (await loop.create_connection(lambda: Connection(tally, _nothing), "127.0.0.1", port))[1]
        for _ in range(connections)
    ]
    started, turn, dialling = loop.time(), 0, set[asyncio.Task[None]]()

    async def redial(place: int) -> None:
        try:
            _, open_[place] = await loop.create_connection(
                lambda: Connection(tally, _nothing), "127.0.0.1", port
            )
            open_[place].send(request())
        except OSError:
            tally.statuses["refused"] += 1

    busy = set[int]()
    while loop.time() - started < seconds:
        due = int((loop.time() - started) * rate)
        while turn < due:
            place = turn % connections
            turn += 1
            connection = open_[place]
            if connection.waiting or place in busy:
                tally.statuses["skipped"] += 1
            elif connection.transport is None or connection.transport.is_closing():
                busy.add(place)
                task = loop.create_task(redial(place))
                dialling.add(task)
                task.add_done_callback(
                    lambda task, place=place: (dialling.discard(task), busy.discard(place))
                )
            else:
                connection.send(request())
        await asyncio.sleep(0.002)
    await asyncio.sleep(0.5)
    await _close(open_)
    return tally


def _nothing(_: Connection) -> None:
    pass


async def _close(connections: list[Connection]) -> None:
    for connection in connections:
        connection.waiting = False
        if connection.transport is not None:
            connection.transport.abort()
    await asyncio.sleep(0.1)

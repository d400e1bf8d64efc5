"""The edges of HTTP, over real sockets: the app of the fake engine under uvicorn in a thread."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h11
import pytest
import uvicorn

from reward_service import auth
from reward_service.app import create_app
from reward_service.auth import Scope
from reward_service.protocol import JoinedWrites
from reward_service.serve import server_config
from reward_service.settings import Settings

Start = Callable[..., Any]


class Endpoint:
    """Where a server listens, a key for it, and raw bytes in and out."""

    def __init__(self, port: int, key: str) -> None:
        self.port, self.key = port, key

    @contextlib.contextmanager
    def connection(self) -> Iterator[socket.socket]:
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as opened:
            yield opened

    def exchange(self, data: bytes) -> bytes:
        """Everything the server says to `data` until it closes the connection."""
        with self.connection() as opened:
            opened.sendall(data)
            return read_to_end(opened)


def read_to_end(opened: socket.socket) -> bytes:
    parts = []
    while part := opened.recv(65536):
        parts.append(part)
    return b"".join(parts)


def read_live(opened: socket.socket) -> None:
    """Read one reply of /livez and leave the connection open."""
    reply = b""
    while not reply.endswith(b'{"live":true}'):
        part = opened.recv(65536)
        assert part, reply
        reply += part


def problem(reply: bytes) -> tuple[int, str, set[str]]:
    """Status, code and header names of a reply that must be a constant problem."""
    head, _, body = reply.partition(b"\r\n\r\n")
    status, *headers = head.decode().split("\r\n")
    content = json.loads(body)
    assert set(content) == {"type", "title", "status", "request_id", "retryable"}
    names = {line.partition(":")[0].lower() for line in headers}
    return int(status.split()[1]), content["type"].removeprefix("urn:looper:problem:"), names


@pytest.fixture
def start(home: Path, engine: Any) -> Iterator[Start]:
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def started(**values: Any) -> Endpoint:
        key = auth.create_key(home, "main", [Scope.SCORE_REWARD])
        settings = Settings(home=home, **values)
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(server_config(create_app(settings, engine), settings))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        running.append((server, thread))
        ends = time.monotonic() + 10
        while not server.started and time.monotonic() < ends:
            time.sleep(0.01)
        return Endpoint(listener.getsockname()[1], key)

    yield started
    for server, thread in running:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def test_replies_do_not_say_what_serves_them(start: Start) -> None:
    reply = start().exchange(b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").lower()
    assert reply.startswith(b"http/1.1 200")
    for word in (b"server:", b"date:", b"uvicorn", b"starlette", b"fastapi", b"python"):
        assert word not in reply


@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET /livez HTTP/1.1\r\n\r\n",  # no Host
        b"GET /livez HTTP/1.1\r\nHost: x\r\nBad Name: 1\r\n\r\n",
        b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: canary\r\n\r\n",
        b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"GET /livez HTTP/x\r\nHost: x\r\n\r\n",
    ],
)
def test_what_is_no_http_gets_a_constant_problem(start: Start, data: bytes) -> None:
    reply = start().exchange(data)
    status, code, names = problem(reply)
    assert (status, code) == (400, "malformed_request")
    assert names == {"content-type", "content-length", "connection"}
    assert b"canary" not in reply


def test_a_bad_chunk_after_a_good_head_ends_the_connection(start: Start) -> None:
    head = b"POST /v1/score HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    reply = start().exchange(head + b"zz\r\ncanary")
    assert problem(reply)[0] in (400, 401)
    assert b"canary" not in reply


@pytest.mark.parametrize("name", [b"X-Big", b"Authorization", b"Cookie"])
def test_headers_have_a_bound(start: Start, name: bytes) -> None:
    endpoint = start(max_header_bytes=4096)
    head = b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    assert endpoint.exchange(head + name + b": " + b"a" * 3900 + b"\r\n\r\n").startswith(b"HTTP/1.1 200")
    for size in (4100, 9000):
        reply = endpoint.exchange(head + name + b": " + b"a" * size + b"\r\n\r\n")
        assert problem(reply)[:2] == (431, "headers_too_large")
    many = b"".join(b"X-%d: 1\r\n" % i for i in range(2000))
    assert problem(endpoint.exchange(head + many + b"\r\n"))[0] == 431
    # A head that fills the network's buffers is cut off: the refusal may be lost, the connection must end.
    began = time.monotonic()
    with contextlib.suppress(ConnectionError):
        assert b" 431 " in endpoint.exchange(head + name + b": " + b"a" * 20_000_000 + b"\r\n\r\n")
    assert time.monotonic() - began < 10


def test_a_head_that_does_not_arrive_in_time_ends_with_408(start: Start) -> None:
    endpoint = start(receive_deadline_s=0.3)
    for beginning in (b"", b"GET /livez HT", b"GET /livez HTTP/1.1\r\nHost: x\r\nX-"):
        began = time.monotonic()
        reply = endpoint.exchange(beginning)
        assert problem(reply)[:2] == (408, "request_timeout")
        assert 0.25 < time.monotonic() - began < 10


def test_a_head_in_drops_has_the_same_deadline(start: Start) -> None:
    endpoint = start(receive_deadline_s=0.3)
    with endpoint.connection() as opened:
        began = time.monotonic()
        opened.settimeout(0.05)
        reply = b""
        for byte in b"GET /livez HTTP/1.1\r\nHost: " + b"x" * 200:
            try:
                opened.sendall(bytes([byte]))
                reply += opened.recv(65536)
            except TimeoutError:
                continue
            except OSError:
                break
            if reply:
                break
        assert reply.startswith(b"HTTP/1.1 408")
        assert time.monotonic() - began < 10


def test_a_second_request_on_a_connection_has_a_deadline_too(start: Start) -> None:
    endpoint = start(receive_deadline_s=0.3)
    with endpoint.connection() as opened:
        opened.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        read_live(opened)
        time.sleep(0.5)  # idle between requests is no offence
        opened.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        read_live(opened)
        opened.sendall(b"GET /li")
        assert problem(read_to_end(opened))[:2] == (408, "request_timeout")


def test_an_unread_body_does_not_keep_a_connection(start: Start) -> None:
    endpoint = start()
    began = time.monotonic()
    reply = endpoint.exchange(b"GET /livez HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\nx")
    assert reply.startswith(b"HTTP/1.1 200")
    assert time.monotonic() - began < 4, "closed at once, not by the keep-alive timer"


def post_head(key: str, length: int) -> bytes:
    return (
        f"POST /v1/score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


def test_a_trickled_body_of_a_key_holder_ends_at_the_receive_deadline(start: Start) -> None:
    endpoint = start(receive_deadline_s=0.3)
    began = time.monotonic()
    reply = endpoint.exchange(post_head(endpoint.key, 1000) + b"{")
    assert problem(reply)[0] == 408
    assert 0.25 < time.monotonic() - began < 10


@pytest.mark.parametrize("sent", [0, 70_000], ids=["no body", "a part of the body"])
def test_without_a_key_nobody_is_waited_for(start: Start, sent: int) -> None:
    endpoint = start(receive_deadline_s=20)
    with endpoint.connection() as opened:
        began = time.monotonic()
        opened.sendall(post_head("wrong", 1_000_000) + b"x" * sent)
        reply = opened.recv(65536)
        answered = time.monotonic() - began
        with contextlib.suppress(ConnectionResetError):
            reply += read_to_end(opened)
        closed = time.monotonic() - began
    status, code, names = problem(reply)
    assert (status, code) == (401, "unauthenticated")
    assert "connection" in names
    assert answered < 0.5
    assert closed < 3


def test_without_a_key_a_trickled_body_does_not_keep_the_connection(start: Start) -> None:
    endpoint = start(receive_deadline_s=20)
    with endpoint.connection() as opened:
        began = time.monotonic()
        opened.sendall(post_head("wrong", 1_000_000))
        with contextlib.suppress(OSError):
            while time.monotonic() - began < 10:
                opened.sendall(b"x")
                time.sleep(0.05)
        assert time.monotonic() - began < 3


def test_a_client_with_a_wrong_key_reads_its_401_after_all_of_a_large_body(start: Start) -> None:
    endpoint = start()
    for _ in range(10):  # closed while a body is under way, a connection is reset in some of the tries
        with endpoint.connection() as opened:
            opened.sendall(post_head("wrong", 1_000_000))
            for _ in range(20):
                opened.sendall(b"x" * 50_000)
                time.sleep(0.005)
            reply = opened.recv(65536)
        assert problem(reply)[:2] == (401, "unauthenticated")


def test_a_body_that_is_there_leaves_the_connection_open_also_without_a_key(start: Start) -> None:
    endpoint = start()
    with endpoint.connection() as opened:
        for _ in range(2):
            opened.sendall(post_head("wrong", 1000) + b"x" * 1000)
            status, _, names = problem(opened.recv(65536))
            assert status == 401
            assert "connection" not in names


def test_connections_have_a_bound_and_livez_comes_back(start: Start) -> None:
    endpoint = start(max_connections=3)
    livez = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
    with endpoint.connection() as a, endpoint.connection() as b, endpoint.connection() as c:
        for opened in (a, b, c):
            opened.sendall(livez)
            read_live(opened)
        with endpoint.connection() as refused:
            reply = read_to_end(refused)
        assert problem(reply)[:2] == (503, "overloaded")
        assert b"retry-after: 1" in reply.lower()
    ends = time.monotonic() + 5
    last = livez.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    while not endpoint.exchange(last).startswith(b"HTTP/1.1 200"):
        assert time.monotonic() < ends
        time.sleep(0.02)


def test_pipelined_requests_are_answered_in_order(start: Start) -> None:
    endpoint = start()
    one = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
    two = b"GET /v1/info HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    reply = endpoint.exchange(one + one + two)
    assert [int(part[:3]) for part in reply.split(b"HTTP/1.1 ")[1:]] == [200, 200, 401]


class Written:
    """A transport that remembers what is done to it."""

    def __init__(self) -> None:
        self.done: list[bytes | str] = []

    def write(self, data: bytes) -> None:
        self.done.append(data)

    def close(self) -> None:
        self.done.append("closed")

    def is_closing(self) -> bool:
        return "closed" in self.done


def asked(head: bytes) -> h11.Connection:
    """A server's side of HTTP after a request with this head."""
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(head)
    assert isinstance(connection.next_event(), h11.Request)
    return connection


def test_head_and_body_of_a_reply_leave_in_one_piece() -> None:
    connection, transport = asked(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"), Written()
    joined = JoinedWrites(transport, connection)  # type: ignore[arg-type]
    for event in (
        h11.Response(status_code=200, headers=[("content-length", "4")]),
        h11.Data(data=b"body"),
        h11.EndOfMessage(),
    ):
        joined.write(connection.send(event) or b"")
    assert transport.done == [b"HTTP/1.1 200 \r\ncontent-length: 4\r\n\r\nbody"]


def test_an_empty_body_and_chunks_leave_whole_and_in_order() -> None:
    for headers, parts, expected in (
        ([("content-length", "0")], [b""], b"content-length: 0\r\n\r\n"),
        ([], [b"ab", b"c"], b"transfer-encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n"),
    ):
        connection, transport = asked(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"), Written()
        joined = JoinedWrites(transport, connection)  # type: ignore[arg-type]
        events = [h11.Response(status_code=200, headers=headers), *(h11.Data(data=part) for part in parts)]
        for event in (*events, h11.EndOfMessage()):
            joined.write(connection.send(event) or b"")
        said = b"".join(part for part in transport.done if isinstance(part, bytes))
        assert said.lower() == b"http/1.1 200 \r\n" + expected


def test_leave_to_go_on_is_given_at_once_and_closing_sends_what_was_held() -> None:
    connection = asked(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nExpect: 100-continue\r\n\r\n")
    transport = Written()
    joined = JoinedWrites(transport, connection)  # type: ignore[arg-type]
    joined.write(connection.send(h11.InformationalResponse(status_code=100, headers=[])) or b"")
    assert transport.done == [b"HTTP/1.1 100 \r\n\r\n"]
    joined.write(connection.send(h11.Response(status_code=200, headers=[("content-length", "4")])) or b"")
    assert len(transport.done) == 1
    assert not joined.is_closing()
    joined.close()
    assert transport.done[1:] == [b"HTTP/1.1 200 \r\ncontent-length: 4\r\n\r\n", "closed"]
    assert joined.is_closing()

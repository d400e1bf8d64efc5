"""The gateway's configuration, run by a real HAProxy in front of a small server.

Needs `haproxy` (on PATH, or the command in LOOPER_HAPROXY) and `openssl`; skips where there is none.
"""

from __future__ import annotations

import http.client
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest

from looper_schemas.problems import PROBLEM_CONTENT_TYPE, Problem, ProblemCode
from reward_service.compose import Profile, prepare_project

from .gateway import COMMAND, ROOT, Gateway, gateway

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("postgres"),
    pytest.mark.skipif(not COMMAND[0] or not shutil.which("openssl"), reason="needs haproxy and openssl"),
]


AUTHORIZED = {"Authorization": "Bearer good"}
UNKNOWN = b'{"the problem": "as the service wrote it"}'


class Behind(BaseHTTPRequestHandler):
    """Answers 200 and notes what arrived.

    To a wrong key it answers 401 before the body, as the service does; to X-Answer with that status, and the
    Retry-After of X-Wait.
    """

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.headers.get("Authorization") == "Bearer wrong":
            self.answer(401, UNKNOWN, ("WWW-Authenticate", "Bearer"), ("Connection", "close"))
            self.connection.settimeout(3)
            with suppress(OSError):
                while self.connection.recv(65536):
                    pass
            return
        if "X-Answer" in self.headers:
            wait = self.headers.get("X-Wait")
            self.answer(int(self.headers["X-Answer"]), b"{}", *([("Retry-After", wait)] if wait else []))
            return
        length = int(self.headers.get("Content-Length", 0))
        self.rfile.read(length)
        forwarded = self.headers.get("X-Forwarded-For", "")
        if self.path != "/livez":
            self.server.seen.append((self.path, forwarded, length))  # type: ignore[attr-defined]
        self.answer(200, b"ok")

    def answer(self, status: int, body: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in (*headers, ("Content-Length", str(len(body)))):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    do_POST = do_GET
    do_DELETE = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


class Reply(NamedTuple):
    """A reply that was read to its end."""

    status: int
    headers: Message
    body: bytes


def ask(running: Gateway, method: str, path: str, body: bytes | None = None, **headers: str) -> Reply:
    """One request on a connection of its own; `path` is sent as it is."""
    connection = http.client.HTTPSConnection("localhost", running.tls, context=running.context(), timeout=20)
    with closing(connection):
        with suppress(
            BrokenPipeError, ConnectionResetError
        ):  # a client that is refused while it sends reads on
            connection.request(method, path, body=body, headers=headers)
        reply = connection.getresponse()
        return Reply(reply.status, reply.headers, reply.read())


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for which the real `reward-service init --compose` has written certificates."""
    folder = tmp_path_factory.mktemp("gateway")
    shutil.copy(ROOT / "docker-compose.yml", folder)
    prepare_project(folder, Profile.CPU)
    return folder


class Many(ThreadingHTTPServer):
    request_queue_size = 512

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: the tests break connections off."""


@pytest.fixture(scope="module")
def behind() -> Iterator[ThreadingHTTPServer]:
    server = Many(("127.0.0.1", 0), Behind)
    server.seen = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def running(workplace: Path, behind: ThreadingHTTPServer) -> Iterator[Gateway]:
    with gateway(workplace, workplace / "docker/secrets", ["127.0.0.1"], behind.server_port) as started:
        yield started


@pytest.fixture
def seen(behind: ThreadingHTTPServer) -> list[tuple[str, str, int]]:
    """(path, X-Forwarded-For, length) of what reached the server."""
    return behind.seen  # type: ignore[attr-defined,no-any-return]


def test_a_request_reaches_the_service_without_what_a_caller_says_of_itself(
    running: Gateway, seen: list[tuple[str, str, int]]
) -> None:
    reply = running.ask("POST", "/v1/score", b"x" * 200_000, **{"X-Forwarded-For": "10.0.0.1"}, **AUTHORIZED)
    assert reply.status == 200
    assert seen[-1] == ("/v1/score", "", 200_000)


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /trickled HTTP/1.1\r\nHost: x\r\nX-Slow: ",
        b"POST /trickled HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer x\r\nContent-Length: 100\r\n\r\n{",
    ],
    ids=["in the headers", "in the body"],
)
def test_a_client_that_trickles_is_cut_at_five_seconds(
    running: Gateway, seen: list[tuple[str, str, int]], sent: bytes
) -> None:
    with running.connect(running.tls, running.context()) as client:
        client.settimeout(0.5)
        began = time.monotonic()
        client.sendall(sent)
        reply = b""
        while time.monotonic() - began < 15:
            try:
                client.sendall(b"a")
                part = client.recv(1000)
            except TimeoutError:
                continue
            except OSError:
                break
            reply += part
            if not part or b"\r\n\r\n" in reply:
                break
        taken = time.monotonic() - began
    assert 4.0 < taken < 7.0
    assert reply.startswith(b"HTTP/1.1 408")
    assert "/trickled" not in {path for path, _, _ in seen}


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_of_today_is_spoken(running: Gateway, version: ssl.TLSVersion) -> None:
    context = running.context()
    context.minimum_version = context.maximum_version = version
    with running.connect(running.tls, context) as client:
        assert client.version() == version.name.replace("_", ".")


def test_tls_of_yesterday_is_refused(running: Gateway) -> None:
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{running.tls}", "-cipher", "ALL:@SECLEVEL=0"]
    old = subprocess.run([*command, "-tls1_1"], input=b"", capture_output=True, check=False, timeout=20)
    new = subprocess.run([*command, "-tls1_2"], input=b"", capture_output=True, check=False, timeout=20)
    assert b"alert protocol version" in old.stderr
    assert b"Cipher is (NONE)" in old.stdout
    assert b"alert" not in new.stderr
    assert b"Cipher is ECDHE" in new.stdout


def test_plain_http_is_refused(running: Gateway, seen: list[tuple[str, str, int]]) -> None:
    with socket.create_connection(("127.0.0.1", running.tls), timeout=10) as client:
        client.sendall(b"GET /plain HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200" not in client.recv(1000)
    assert "/plain" not in {path for path, _, _ in seen}


def test_the_mutual_port_refuses_a_client_without_a_certificate(
    running: Gateway, seen: list[tuple[str, str, int]]
) -> None:
    request = b"GET /mutual HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer x\r\nConnection: close\r\n\r\n"

    def ask(context: ssl.SSLContext) -> bytes:
        with running.connect(running.mutual, context) as client:
            client.sendall(request)
            return client.recv(1000)  # TLS 1.3 tells a client of its refusal only here

    with pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"):
        ask(running.context())
    assert "/mutual" not in {path for path, _, _ in seen}
    assert ask(running.context(certificate=True)).startswith(b"HTTP/1.1 200")


def test_a_method_that_the_contract_lacks_is_refused(running: Gateway) -> None:
    refused = running.ask("DELETE", "/v1/score", **AUTHORIZED)
    assert refused.status == 405
    assert refused.headers["Allow"] == "GET, POST"
    assert running.ask("GET", "/v1/info", **AUTHORIZED).status == 200


def assert_problem(reply: Reply, code: ProblemCode) -> None:
    """It is what the service would say: the constant body of `code`, with a request id of its form."""
    problem = Problem.model_validate_json(reply.body)
    assert reply.status == problem.status
    assert reply.headers["Content-Type"] == PROBLEM_CONTENT_TYPE
    assert re.fullmatch("[0-9a-f]{32}", problem.request_id)
    assert problem == Problem.of(code, problem.request_id)


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
@pytest.mark.parametrize("path", ["/v1/score", "/v1/info", "/readyz", "/", "/livez/", "/livez/../v1/info"])
def test_without_a_key_the_gateway_answers_as_the_service_does(
    running: Gateway, seen: list[tuple[str, str, int]], method: str, path: str
) -> None:
    before = len(seen)
    reply = ask(running, method, path)
    assert_problem(reply, ProblemCode.UNAUTHENTICATED)
    assert reply.headers["WWW-Authenticate"] == "Bearer"
    assert len(seen) == before


def test_methods_and_too_many_connections_are_refused_in_the_services_words(running: Gateway) -> None:
    assert_problem(ask(running, "DELETE", "/v1/score", **AUTHORIZED), ProblemCode.METHOD_NOT_ALLOWED)
    with ExitStack() as stack:
        head = b"POST / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer x\r\nContent-Length: 1000000\r\n\r\n"
        for _ in range(129):
            client = stack.enter_context(running.connect(running.tls, running.context()))
            client.sendall(head + b"x" * 70_000)
        time.sleep(0.5)
        reply = ask(running, "GET", "/v1/info", **AUTHORIZED)
    assert_problem(reply, ProblemCode.RATE_LIMITED)
    assert reply.headers["Retry-After"] == "2"


@pytest.mark.parametrize(
    ("status", "wait", "expected"),
    [
        (429, "120", "120"),
        (503, "30", "30"),
        (429, None, "2"),
        (503, None, "2"),
        (500, None, None),
        (200, "7", "7"),
    ],
)
def test_the_services_word_on_when_to_come_again_is_passed_on(
    running: Gateway, status: int, wait: str | None, expected: str | None
) -> None:
    headers = {"X-Answer": str(status)} | ({} if wait is None else {"X-Wait": wait})
    reply = ask(running, "GET", "/v1/info", **AUTHORIZED, **headers)
    assert reply.status == status
    assert reply.headers.get_all("Retry-After") == (None if expected is None else [expected])


@pytest.mark.parametrize(
    "authorization", [b"", b"Authorization: Bearer wrong\r\n"], ids=["no key", "a wrong key"]
)
def test_strangers_that_stop_within_a_body_keep_nobody_waiting(
    running: Gateway, authorization: bytes
) -> None:
    head = b"POST /v1/score HTTP/1.1\r\nHost: x\r\n" + authorization + b"Content-Length: 1000000\r\n\r\n"
    context = running.context()
    with ExitStack() as stack:
        stuck = []
        for i in range(360):  # from three addresses
            source = f"127.0.0.{2 + i // 120}", 0
            plain = socket.create_connection(("127.0.0.1", running.tls), timeout=20, source_address=source)
            client = stack.enter_context(context.wrap_socket(plain, server_hostname="localhost"))
            with suppress(OSError):  # it may have been refused after its head
                client.sendall(head + b"x" * 70_000)
            stuck.append(client)
        began = time.monotonic()
        reply = ask(running, "POST", "/v1/score", b"x" * 1000, **AUTHORIZED)
        assert reply.status == 200
        assert time.monotonic() - began < 1
        if authorization:
            assert {client.recv(65536)[:12] for client in stuck} == {b"HTTP/1.1 401"}


@pytest.mark.parametrize("size", [1000, 200_000, 1_000_000])
def test_a_client_with_a_wrong_key_reads_its_401_whatever_it_sends(running: Gateway, size: int) -> None:
    for _ in range(10):
        reply = ask(running, "POST", "/v1/score", b"x" * size, Authorization="Bearer wrong")
        assert (reply.status, reply.body) == (401, UNKNOWN)


def test_every_replica_of_the_name_gets_its_share(workplace: Path, behind: ThreadingHTTPServer) -> None:
    def serve(address: str) -> ThreadingHTTPServer:
        server = ThreadingHTTPServer((address, behind.server_port), Behind)
        server.seen = []  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server

    servers = [serve("127.0.0.2"), serve("127.0.0.3")]
    folder = workplace / "replicas"
    folder.mkdir()
    addresses = ["127.0.0.2", "127.0.0.3"]
    with gateway(folder, workplace / "docker/secrets", addresses, behind.server_port) as running:
        deadline = time.monotonic() + 60
        while not all(server.seen for server in servers):  # type: ignore[attr-defined]
            assert running.ask("GET", "/v1/info", **AUTHORIZED).status == 200
            assert time.monotonic() < deadline
    for server in servers:
        server.shutdown()
        server.server_close()

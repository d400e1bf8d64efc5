"""The gateway's configuration, run by a real HAProxy in front of a small server.

Needs `haproxy` (on PATH, or the command in LOOPER_HAPROXY) and `openssl`; skips where there is none.
"""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from reward_service.compose import Profile, prepare_project

from .gateway import COMMAND, ROOT, Gateway, gateway

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("postgres"),
    pytest.mark.skipif(not COMMAND[0] or not shutil.which("openssl"), reason="needs haproxy and openssl"),
]


class Behind(BaseHTTPRequestHandler):
    """Answers 200 and notes what arrived."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        self.rfile.read(length)
        forwarded = self.headers.get("X-Forwarded-For", "")
        if self.path != "/livez":
            self.server.seen.append((self.path, forwarded, length))  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    do_POST = do_GET
    do_DELETE = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for which the real `reward-service init --compose` has written certificates."""
    folder = tmp_path_factory.mktemp("gateway")
    shutil.copy(ROOT / "docker-compose.yml", folder)
    prepare_project(folder, Profile.CPU)
    return folder


@pytest.fixture(scope="module")
def behind() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Behind)
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
    reply = running.ask("POST", "/v1/score", b"x" * 200_000, **{"X-Forwarded-For": "10.0.0.1"})
    assert reply.status == 200
    assert seen[-1] == ("/v1/score", "", 200_000)


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /trickled HTTP/1.1\r\nHost: x\r\nX-Slow: ",
        b"POST /trickled HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
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
    request = b"GET /mutual HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"

    def ask(context: ssl.SSLContext) -> bytes:
        with running.connect(running.mutual, context) as client:
            client.sendall(request)
            return client.recv(1000)  # TLS 1.3 tells a client of its refusal only here

    with pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"):
        ask(running.context())
    assert "/mutual" not in {path for path, _, _ in seen}
    assert ask(running.context(certificate=True)).startswith(b"HTTP/1.1 200")


def test_a_method_that_the_contract_lacks_is_refused(running: Gateway) -> None:
    assert running.ask("DELETE", "/v1/score").status == 405
    assert running.ask("GET", "/v1/info").status == 200


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
            assert running.ask("GET", "/v1/info").status == 200
            assert time.monotonic() < deadline
    for server in servers:
        server.shutdown()
        server.server_close()

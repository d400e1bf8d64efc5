"""The gateway's configuration, run by a real HAProxy in front of a small server.

Needs `haproxy` (on PATH, or the command in LOOPER_HAPROXY) and `openssl`; skips where there is none.
"""

from __future__ import annotations

import http.client
import os
import shlex
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMAND = shlex.split(os.environ.get("LOOPER_HAPROXY", "")) or [shutil.which("haproxy") or ""]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("gateway"),
    pytest.mark.skipif(not COMMAND[0] or not shutil.which("openssl"), reason="needs haproxy and openssl"),
]


class Gateway(NamedTuple):
    """A running gateway: its two ports, the folder of its certificates, and the server behind it."""

    tls: int
    mutual: int
    secrets: Path
    seen: list[tuple[str, str, int]]

    def context(self, *, certificate: bool = False) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.secrets / "ca.crt"))
        if certificate:
            context.load_cert_chain(self.secrets / "client.crt", self.secrets / "client.key")
        return context

    def connect(self, port: int, context: ssl.SSLContext) -> ssl.SSLSocket:
        plain = socket.create_connection(("127.0.0.1", port), timeout=20)
        return context.wrap_socket(plain, server_hostname="localhost")

    def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPSConnection("localhost", self.tls, context=self.context(), timeout=20)
        connection.request(method, path, body=body or None, headers=headers)
        reply = connection.getresponse()
        reply.read()
        return reply


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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the real init.sh has run."""
    folder = tmp_path_factory.mktemp("gateway")
    (folder / "docker").mkdir()
    shutil.copy(ROOT / "docker/init.sh", folder / "docker/init.sh")
    subprocess.run([folder / "docker/init.sh", "cpu"], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def gateway(workplace: Path) -> Iterator[Gateway]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Behind)
    server.seen = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    ports = free_port(), free_port()
    text = (ROOT / "docker/gateway/haproxy.cfg").read_text()
    for fixed, port in (("8443", ports[0]), ("9443", ports[1]), ("8080", server.server_address[1])):
        assert text.count(f":{fixed}") == 1
        text = text.replace(f":{fixed}", f":{port}")
    config = workplace / "haproxy.cfg"
    config.write_text(text)
    secrets = workplace / "docker/secrets"
    environment = os.environ | {
        "LOOPER_BIND": "127.0.0.1",
        "LOOPER_DNS": "127.0.0.1:53",
        "LOOPER_REWARD_HOST": "localhost",
        "LOOPER_SECRETS": str(secrets),
    }
    process = subprocess.Popen(
        [*COMMAND, "-db", "-f", str(config)], env=environment, stdout=subprocess.DEVNULL
    )
    running = Gateway(*ports, secrets, server.seen)  # type: ignore[attr-defined]
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            assert process.poll() is None
            try:
                if running.ask("GET", "/v1/info").status == 200:
                    break
            except OSError:
                pass
            time.sleep(0.2)
        yield running
    finally:
        process.terminate()
        process.wait(timeout=10)
        server.shutdown()
        server.server_close()


def test_a_request_reaches_the_service_without_what_a_caller_says_of_itself(gateway: Gateway) -> None:
    reply = gateway.ask("POST", "/v1/score", b"x" * 200_000, **{"X-Forwarded-For": "10.0.0.1"})
    assert reply.status == 200
    assert gateway.seen[-1] == ("/v1/score", "", 200_000)


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /trickled HTTP/1.1\r\nHost: x\r\nX-Slow: ",
        b"POST /trickled HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
    ],
    ids=["in the headers", "in the body"],
)
def test_a_client_that_trickles_is_cut_at_five_seconds(gateway: Gateway, sent: bytes) -> None:
    with gateway.connect(gateway.tls, gateway.context()) as client:
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
    assert "/trickled" not in {path for path, _, _ in gateway.seen}


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_of_today_is_spoken(gateway: Gateway, version: ssl.TLSVersion) -> None:
    context = gateway.context()
    context.minimum_version = context.maximum_version = version
    with gateway.connect(gateway.tls, context) as client:
        assert client.version() == version.name.replace("_", ".")


def test_tls_of_yesterday_is_refused(gateway: Gateway) -> None:
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{gateway.tls}", "-cipher", "ALL:@SECLEVEL=0"]
    old = subprocess.run([*command, "-tls1_1"], input=b"", capture_output=True, check=False, timeout=20)
    new = subprocess.run([*command, "-tls1_2"], input=b"", capture_output=True, check=False, timeout=20)
    assert b"alert protocol version" in old.stderr
    assert b"Cipher is (NONE)" in old.stdout
    assert b"alert" not in new.stderr
    assert b"Cipher is ECDHE" in new.stdout


def test_plain_http_is_refused(gateway: Gateway) -> None:
    with socket.create_connection(("127.0.0.1", gateway.tls), timeout=10) as client:
        client.sendall(b"GET /plain HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200" not in client.recv(1000)
    assert "/plain" not in {path for path, _, _ in gateway.seen}


def test_the_mutual_port_refuses_a_client_without_a_certificate(gateway: Gateway) -> None:
    request = b"GET /mutual HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"

    def ask(context: ssl.SSLContext) -> bytes:
        with gateway.connect(gateway.mutual, context) as client:
            client.sendall(request)
            return client.recv(1000)  # TLS 1.3 tells a client of its refusal only here

    with pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"):
        ask(gateway.context())
    assert "/mutual" not in {path for path, _, _ in gateway.seen}
    assert ask(gateway.context(certificate=True)).startswith(b"HTTP/1.1 200")


def test_a_method_that_the_contract_lacks_is_refused(gateway: Gateway) -> None:
    assert gateway.ask("DELETE", "/v1/score").status == 405
    assert gateway.ask("GET", "/v1/info").status == 200


def test_init_writes_secrets_for_the_owner_alone_and_keeps_what_is_there(workplace: Path) -> None:
    secrets = workplace / "docker/secrets"
    before = {file.name: file.read_bytes() for file in secrets.iterdir()}
    subprocess.run([workplace / "docker/init.sh", "gpu"], check=True, capture_output=True)
    assert {file.name: file.read_bytes() for file in secrets.iterdir()} == before
    assert all(file.stat().st_mode & 0o077 == 0 for file in secrets.iterdir())
    assert (workplace / ".env").read_text().startswith("COMPOSE_PROFILES=cpu\n")
    wrong = subprocess.run([workplace / "docker/init.sh", "tpu"], capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stderr) == (2, "error: tpu: choose cpu or gpu\n")

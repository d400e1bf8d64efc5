"""The gateway of docker-compose.yml as a process: a real HAProxy with its configuration, a name server."""

from __future__ import annotations

import http.client
import os
import shlex
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
COMMAND = shlex.split(os.environ.get("LOOPER_HAPROXY", "")) or [shutil.which("haproxy") or ""]
HOST = "reward"


class Gateway(NamedTuple):
    """A running gateway: its two ports and the folder of its certificates."""

    tls: int
    mutual: int
    secrets: Path

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


def free_port(host: str = "127.0.0.1") -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


@contextmanager
def names(addresses: Sequence[str]) -> Iterator[int]:
    """A name server on the loopback that knows one name, HOST, and its `addresses`; yields its port."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=_answer, args=(server, addresses), daemon=True)
        thread.start()
        port: int = server.getsockname()[1]
        yield port
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(b"", ("127.0.0.1", port))
        thread.join(timeout=10)


def _answer(server: socket.socket, addresses: Sequence[str]) -> None:
    """RFC 1035: the question is repeated, each address is one record that points back at its name."""
    while True:
        asked, sender = server.recvfrom(1024)
        if not asked:
            return
        end = asked.index(b"\0", 12) + 5
        kind = int.from_bytes(asked[end - 4 : end - 2])
        wanted = bytes([len(HOST)]) + HOST.encode() + b"\0"
        known = asked[12 : end - 4].lower() == wanted
        records = [
            b"\xc0\x0c" + struct.pack("!HHIH", 1, 1, 1, 4) + socket.inet_aton(address)
            for address in addresses
            if known and kind == 1
        ]
        flags = 0x8180 if known else 0x8183
        head = asked[:2] + struct.pack("!HHHHH", flags, 1, len(records), 0, 0)
        server.sendto(head + asked[12:end] + b"".join(records), sender)


@contextmanager
def gateway(folder: Path, secrets: Path, addresses: Sequence[str], port: int) -> Iterator[Gateway]:
    """The gateway in front of services on `port` of each of `addresses`, once one of them answers."""
    own = free_port(), free_port()
    text = (ROOT / "docker/gateway/haproxy.cfg").read_text()
    for fixed, chosen in (("8443", own[0]), ("9443", own[1]), ("8080", port)):
        assert text.count(f":{fixed}") == 1
        text = text.replace(f":{fixed}", f":{chosen}")
    config = folder / "haproxy.cfg"
    config.write_text(text)
    with names(addresses) as dns, (folder / "haproxy.log").open("wb") as log:
        environment = os.environ | {
            "LOOPER_BIND": "127.0.0.1",
            "LOOPER_DNS": f"127.0.0.1:{dns}",
            "LOOPER_REWARD_HOST": HOST,
            "LOOPER_CERTIFICATES": str(secrets),
        }
        process = subprocess.Popen([*COMMAND, "-db", "-f", str(config)], env=environment, stdout=log)
        running = Gateway(*own, secrets)
        try:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                assert process.poll() is None, (folder / "haproxy.log").read_text()
                try:
                    if running.ask("GET", "/livez").status == 200:
                        break
                except OSError:
                    pass
                time.sleep(0.2)
            else:
                raise AssertionError("no service answers: " + (folder / "haproxy.log").read_text())
            yield running
        finally:
            process.terminate()
            process.wait(timeout=10)

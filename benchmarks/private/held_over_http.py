"""100,000 arms held at once by the whole service, over HTTP: its memory meanwhile, and the time to answer.

    python benchmarks/private/held_over_http.py [--arms 1024 10240 100352]

A service in a process of its own, with room for twice that many (one key has half of it), gets one
request of 512 distinct arms over each of many connections. Its scorer waits until all of them are inside, as
the service's own metrics say; then it is let go, and every reply is checked. As in `linear_cost.py` vectors
come from a hash: embedding costs every arm the same, and 100,000 would take the better part of an hour.
Writes benchmarks/results/private/held_over_http.json.
"""

from __future__ import annotations

import argparse
import http.client
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _servers import CREATE_KEY, RESULTS, Server, Texts, free_port, model_folder, os, post, score_body, stamp

ARMS, QUESTIONS = 8, 64  # of a request
SERVE = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
gate = Path(sys.argv[2])
from linear_cost import Hashed
from regime_w import scorer
Scorer = scorer.Scorer
class Gated(Hashed):
    def embed(self, texts):
        while gate.exists():
            time.sleep(0.05)
        return super().embed(texts)
scorer.Scorer = lambda settings, judge=None: Scorer(settings, embedder=Gated(), judge=judge)
from reward_service.cli import main
main(sys.argv[3:])
"""


class Held:
    """The service and its two listeners."""

    def __init__(self, folder: Path, most_arms: int) -> None:
        home, self.gate = folder / "home", folder / "gate"
        env = {"REWARD_SERVICE_HOME": str(home)}
        scopes = "score:reward,score:components,metrics:read"
        key = subprocess.run(
            [*CREATE_KEY, "--name", "bench", "--scopes", scopes],
            env={**os.environ, **env}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        self._bearer = {"Authorization": f"Bearer {key.stdout.strip()}"}
        self._metrics = free_port()
        (home / "settings.toml").write_text(
            f"metrics_port = {self._metrics}\nmax_waiting_arms = {2 * most_arms}\n"
            f"max_waiting_bytes = {2**31}\nreceive_deadline_s = 300.0\n[scorer]\nscore_cache_entries = 1024\n"
        )
        self.server = Server(
            "service",
            [sys.executable, "-c", SERVE, str(Path(__file__).parent), str(self.gate),
             "serve", "--port", str(port := free_port())],
            port, env,
        )  # fmt: skip
        self.server.wait("/readyz", self._bearer)

    def waiting(self) -> int:
        """How many arms are inside, as the service's metrics say."""
        connection = http.client.HTTPConnection("127.0.0.1", self._metrics, timeout=60)
        connection.request("GET", "/metrics", headers=self._bearer)
        text = connection.getresponse().read().decode()
        return next(
            int(float(x.split()[1])) for x in text.splitlines() if x.startswith("service_waiting_items ")
        )

    def ask(self, body: bytes) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=900)
        headers = {**self._bearer, "Content-Type": "application/json", "X-Deadline-Ms": "600000"}
        try:
            return post(connection, "/v1/score", body, headers)
        finally:
            connection.close()


def held(service: Held, texts: list[str], count: int) -> dict[str, Any]:
    """`count` distinct arms wait in the service at once, then are answered."""
    before = service.server.rss_mib()
    service.gate.touch()
    replies: list[bytes] = []
    errors: list[BaseException] = []
    size = 0

    def ask(body: bytes) -> None:
        try:
            replies.append(service.ask(body))
        except BaseException as error:
            errors.append(error)

    threads = []
    started = time.perf_counter()
    for request in range(count // (ARMS * QUESTIONS)):
        names = [f"{count}/{request}/{q}" for q in range(QUESTIONS)]
        questions = [
            (f"How many, in case {name}?",
             [f"{texts[(ARMS * q + a + request) % len(texts)]}\nnumber {name}/{a}" for a in range(ARMS)])
            for q, name in enumerate(names)
        ]  # fmt: skip
        body = score_body(questions)
        size += len(body)
        threads.append(threading.Thread(target=ask, args=(body,)))
        threads[-1].start()
    wanted = len(threads) * ARMS * QUESTIONS
    while (inside := service.waiting()) < wanted and not errors:
        time.sleep(0.2)
    taken = time.perf_counter() - started
    waiting = peak = service.server.rss_mib()
    started = time.perf_counter()
    service.gate.unlink()
    while any(thread.is_alive() for thread in threads):
        peak = max(peak, service.server.rss_mib())
        time.sleep(0.1)
    seconds = time.perf_counter() - started
    if errors:
        raise errors[0]
    scored = sum(
        len(result["arms"])
        for reply in replies for result in json.loads(reply)["results"] if result["status"] == "scored"
    )  # fmt: skip
    return {
        "connections": len(threads), "arms_inside_at_once": inside, "arms_scored": scored,
        "request_mib": size / 2**20, "seconds_to_take_all": taken, "mib_before": before,
        "mib_while_waiting": waiting - before, "mib_at_most": peak - before,
        "kib_per_arm_waiting": 1024 * (waiting - before) / inside, "ms_per_arm": 1e3 * seconds / scored,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arms", type=int, nargs="+", default=[1024, 10_240, 100_352])
    options = parser.parse_args()
    import tokenizers

    result: dict[str, Any] = {"note": stamp(), "held": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = tokenizers.Tokenizer.from_file(str(model_folder(folder / "model") / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        drawn = Texts(tokenizer, seed=3)
        texts = [drawn.arm() for _ in range(512)]
        for count in options.arms:
            (folder / str(count)).mkdir()
            service = Held(folder / str(count), max(options.arms))
            try:
                result["held"].append(held(service, texts, count))
            finally:
                service.server.stop()
            print(result["held"][-1], flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "held_over_http.json").write_text(json.dumps(result, indent=1) + "\n")
    whole = all(row["arms_scored"] == row["arms_inside_at_once"] for row in result["held"])
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())

"""One question of 8 arms a request: latency at 1 and 16 clients, /livez meanwhile, what is no embedding.

    python benchmarks/private/latency.py [--requests 96]

Prints and writes benchmarks/results/private/latency.json. "Repeated": the same questions again under new
idempotency keys. "Embedded before": the same arms in other questions, so that everything but embedding and
the parsing of single arms is done anew.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _servers import RESULTS, Service, Texts, closed_loop, model_folder, percentile, post, score_body, stamp


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=96)
    options = parser.parse_args()
    note = stamp()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_file(str(model_folder(folder / "model") / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        texts = Texts(tokenizer, seed=1)
        service = Service("ours", folder)

        def send(connection: http.client.HTTPConnection, question: Any) -> None:
            post(connection, "/v1/score", score_body([question]), service.headers())

        def measure(questions: list[Any], clients: int) -> dict[str, float]:
            cpu = service.cpu_seconds()
            seconds, latencies = closed_loop(service.port, questions, send, clients)
            return {
                "p50_ms": 1e3 * statistics.median(latencies), "p99_ms": 1e3 * percentile(latencies, 0.99),
                "requests_per_s": len(questions) / seconds,
                "cpu_ms_per_request": 1e3 * (service.cpu_seconds() - cpu) / len(questions),
            }  # fmt: skip

        livez: list[float] = []
        stop = threading.Event()

        def watch() -> None:
            connection = http.client.HTTPConnection("127.0.0.1", service.port)
            while not stop.wait(0.02):
                started = time.perf_counter()
                connection.request("GET", "/livez")
                connection.getresponse().read()
                livez.append(time.perf_counter() - started)

        try:
            measure([texts.question() for _ in range(8)], 2)
            questions = [texts.question() for _ in range(options.requests)]
            result: dict[str, Any] = {"note": note, "one_client": measure(questions, 1)}
            watcher = threading.Thread(target=watch)
            watcher.start()
            result["sixteen_clients"] = measure([texts.question() for _ in range(2 * options.requests)], 16)
            stop.set()
            watcher.join()
            result["repeated"] = measure(questions, 1)
            result["embedded_before"] = measure([(q + " Again?", arms) for q, arms in questions], 1)
        finally:
            stop.set()
            service.stop()
    one, many = result["one_client"], result["sixteen_clients"]
    result["livez"] = {
        "p50_ms": 1e3 * statistics.median(livez), "p99_ms": 1e3 * percentile(livez, 0.99), "polls": len(livez)
    }  # fmt: skip
    result["p99_over_p50"] = {
        "one_client": one["p99_ms"] / one["p50_ms"],
        "sixteen": many["p99_ms"] / many["p50_ms"],
    }
    result["throughput_16_over_1"] = many["requests_per_s"] / one["requests_per_s"]
    for label in ("repeated", "embedded_before"):
        result[f"{label}_share"] = {
            kind: result[label][kind] / one[kind] for kind in ("p50_ms", "cpu_ms_per_request")
        }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "latency.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

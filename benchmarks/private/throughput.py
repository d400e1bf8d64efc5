"""Questions a second through HTTP: our service against the obvious one and against infinity, in one run.

64 questions of 8 distinct arms of 100 to 300 tokens, 8 clients with one question a request; rounds in which
every server has its turn, new texts each time; medians. Then the roofline: the rate of matrix products that
these cores reach, the seconds that an arm's products take at that rate, and their share of the time.

    python benchmarks/private/throughput.py --infinity /path/to/venv/bin/infinity_emb

Without --infinity those two rows are left out. Writes benchmarks/results/private/throughput.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _servers import (
    RESULTS,
    Server,
    Service,
    Texts,
    closed_loop,
    free_port,
    model_folder,
    post,
    score_body,
    stamp,
)

GOALS = {"naive": 3.5, "infinity": 3.0, "infinity bf16": 1.5}


# Of what a backend's linear layers are products, how many for each of the model, and its attention.
PRODUCTS = {
    "packed-float32": ("float32", 1, "float32"),
    "packed-bf16": ("bfloat16", 1, "bfloat16"),
    "packed-int16": ("int8", 3, "float32"),
    "packed-int8": ("int8", 1, "float32"),
}


def flop_per_token(tokens: float, layers: int = 6, width: int = 384) -> tuple[float, float]:
    """Of a BERT encoder: its linear layers, 24 d^2 each, and its attention, 4 T d."""
    return layers * 24.0 * width * width, layers * 4.0 * tokens * width


def peak_gflops(kind: str) -> float:
    """The rate of large matrix products of this kind on all cores, one thread a core, best of five."""
    import torch
    from _servers import os

    cores = len(os.sched_getaffinity(0))
    m, k, n = 2048, 1536, 1536
    barrier = threading.Barrier(cores)
    rates: list[float] = [0.0] * cores

    def run(core: int) -> None:
        torch.set_num_threads(1)
        a, b, bias = torch.randn(m, k), torch.randn(n, k), torch.zeros(n)
        if kind == "int8":
            quantised = torch.randint(0, 255, (m, k), dtype=torch.uint8)
            packed = torch.ops.onednn.qlinear_prepack(
                torch.randint(-127, 127, (n, k), dtype=torch.int8), None
            )
            scale, zero = torch.ones(n), torch.zeros(n, dtype=torch.int64)
        elif kind == "bfloat16":
            a, b, bias = a.bfloat16(), b.bfloat16(), bias.bfloat16()
        with torch.inference_mode():
            for _ in range(6):
                barrier.wait()
                started = time.perf_counter()
                if kind == "int8":
                    torch.ops.onednn.qlinear_pointwise(
                        quantised, 1.0, 128, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
                    )
                else:
                    torch.nn.functional.linear(a, b, bias)
                rates[core] = max(rates[core], 2 * m * k * n / (time.perf_counter() - started) / 1e9)

    threads = [threading.Thread(target=run, args=(core,)) for core in range(cores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(rates)


def embed_rate(backend: str, texts: list[str]) -> tuple[float, str]:
    """Arms a second of the embedder alone, all streams; and the backend that it was."""
    from regime_w.embedding import TransformerEmbedder

    embedder = TransformerEmbedder("sentence-transformers/all-MiniLM-L6-v2", backend=backend)
    embedder.embed(texts[:16])
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        embedder.embed(texts)
        seconds.append(time.perf_counter() - started)
    return len(texts) / statistics.median(seconds), embedder.backend


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--infinity", type=Path, help="the infinity_emb command of a virtual environment")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=8)
    options = parser.parse_args()
    note = stamp()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = str(model_folder(folder / "model"))
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_file(f"{model}/tokenizer.json")
        tokenizer.no_truncation()
        tokenizer.no_padding()
        texts = Texts(tokenizer)
        servers: dict[str, Server] = {}
        here = Path(__file__).parent
        default_threads = {"OMP_NUM_THREADS": ""}  # as a user would start them
        try:
            port = free_port()
            naive = [sys.executable, str(here / "competitors" / "naive.py"), model, str(port)]
            servers["naive"] = Server("naive", naive, port, default_threads)
            if options.infinity:
                for label, extra in (("infinity", []), ("infinity bf16", ["--dtype", "bfloat16"])):
                    port = free_port()
                    command = [str(options.infinity), "v2", "--model-id", model, "--port", str(port)]
                    servers[label] = Server(
                        label, [*command, "--host", "127.0.0.1", "--device", "cpu", "--engine", "torch",
                                "--no-model-warmup", *extra], port, {**default_threads, "PYTHONPATH": ""},
                    )  # fmt: skip
            servers["ours"] = Service("ours", folder)
            servers["ours fast"] = Service("fast", folder, '[scorer]\nembedding_backend = "packed-int8"\n')
            servers["naive"].wait("/docs")
            for label in servers:
                if label.startswith("infinity"):
                    servers[label].wait("/health")

            def sender(label: str, server: Server) -> Any:
                if isinstance(server, Service):
                    return lambda connection, q: post(
                        connection, "/v1/score", score_body([q]), server.headers()
                    )
                kind = {"Content-Type": "application/json"}
                if label == "naive":
                    return lambda connection, q: post(
                        connection, "/score", json.dumps({"texts": q[1]}).encode(), kind
                    )
                return lambda connection, q: post(
                    connection, "/embeddings", json.dumps({"model": "model", "input": q[1]}).encode(), kind
                )

            rates: dict[str, list[float]] = {label: [] for label in servers}
            for label, server in servers.items():  # warm up
                closed_loop(server.port, [texts.question() for _ in range(8)], sender(label, server), 4)
            texts.tokens = 0
            arms = 0
            for _ in range(options.rounds):
                for label, server in servers.items():
                    questions = [texts.question() for _ in range(options.questions)]
                    arms += 8 * len(questions)
                    seconds, _ = closed_loop(server.port, questions, sender(label, server), options.clients)
                    rates[label].append(8 * len(questions) / seconds)
                    print(f"{label:14} {rates[label][-1]:7.1f} arms/s", flush=True)
            tokens = texts.tokens / arms + 2
        finally:
            for server in servers.values():
                server.stop()
        medians = {label: statistics.median(values) for label, values in rates.items()}
        linear, attention = (tokens * flop / 1e9 for flop in flop_per_token(tokens))
        peaks = {kind: peak_gflops(kind) for kind in ("float32", "bfloat16", "int8")}
        sample = [texts.arm() for _ in range(128)]
        roofline = {}
        for label, backend in (("ours", "auto"), ("ours fast", "packed-int8")):
            rate, used = embed_rate(backend, sample)
            kind, times, attended = PRODUCTS[used]
            ideal = times * linear / peaks[kind] + attention / peaks[attended]
            roofline[label] = {
                "backend": used, "products": f"{times} x {kind}", "peak_gflops": peaks[kind],
                "gflop_per_arm": linear + attention, "ideal_arms_per_s": 1 / ideal,
                "embedder_arms_per_s": rate, "embedder_fraction": rate * ideal,
                "http_fraction": medians[label] * ideal,
            }  # fmt: skip
    ratios = {
        ours: {
            label: medians[ours] / medians[label] for label in medians if label not in ("ours", "ours fast")
        }
        for ours in ("ours", "ours fast")
    }
    result = {
        "note": note, "tokens_per_arm": tokens, "arms_per_s": rates, "medians": medians, "ratios": ratios,
        "goals": {"ours": GOALS, "ours fast": {"naive": 5.0}},
        "peak_gflops": peaks, "roofline": roofline,
    }  # fmt: skip
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "throughput.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("medians", "ratios", "roofline")}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

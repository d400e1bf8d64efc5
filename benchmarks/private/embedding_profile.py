"""Where one core spends its time in each packed backend: products, attention, what lies between.

    python benchmarks/private/embedding_profile.py [--arms 64]

Chunks of 2,048 tokens, one thread; CPU milliseconds an arm of 100 to 300 tokens, shared out by Python's
profiler. Writes benchmarks/results/private/embedding_profile.json.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _servers import RESULTS, Texts, model_folder, stamp

from regime_w.embedding import TransformerEmbedder

BACKENDS = ("packed-float32", "packed-bf16", "packed-int16", "packed-int8")
PARTS = {
    "products": ("addmm", "qlinear_pointwise", "high_bytes", "add_256th"),
    "attention": ("scaled_dot_product_attention", "bmm", "softmax"),
    "between": ("gelu", "layer_norm", "quantise", "restore", "of type object", "'to' of", "pad", "cat"),
}


def part_of(function: str) -> str:
    if "restore_" in function or "quantise" in function:
        return "between"
    return next((part for part, names in PARTS.items() if any(name in function for name in names)), "rest")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arms", type=int, default=64)
    options = parser.parse_args()
    result: dict[str, Any] = {"note": stamp(), "arms": options.arms, "ms_per_arm": {}}
    import tokenizers
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = model_folder(Path(name) / "model")
        tokenizer = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
        tokenizer.no_truncation()
        tokenizer.no_padding()
        drawn = Texts(tokenizer, seed=7)
        texts = [drawn.arm() for _ in range(options.arms)]
        for backend in BACKENDS:
            embedder = TransformerEmbedder(str(folder), backend=backend, device="cpu", streams=1)
            forward = embedder._pool._forward
            started = time.thread_time()
            windows = sorted((w for text in texts for w in embedder._windows(text)), key=len)
            tokenised = time.thread_time() - started
            chunks: list[list[Any]] = [[]]
            for window in windows:
                if sum(map(len, chunks[-1])) + len(window) > 2048:
                    chunks.append([])
                chunks[-1].append(window)
            seconds = []
            for _ in range(4):
                started = time.thread_time()
                for chunk in chunks:
                    forward(chunk)
                seconds.append(time.thread_time() - started)
            profile = cProfile.Profile()
            profile.enable()
            for chunk in chunks:
                forward(chunk)
            profile.disable()
            parts = dict.fromkeys((*PARTS, "rest"), 0.0)
            for (_, _, function), (_, _, own, _, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
                parts[part_of(function)] += own
            whole = sum(parts.values())
            best = min(seconds[1:])
            result["ms_per_arm"][backend] = {
                "tokenizer": 1e3 * tokenised / options.arms,
                "forward": 1e3 * best / options.arms,
                **{part: 1e3 * best * own / whole / options.arms for part, own in parts.items()},
            }
            print(backend, result["ms_per_arm"][backend], flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "embedding_profile.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

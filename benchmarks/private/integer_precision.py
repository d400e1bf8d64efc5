"""How many bits of weights and of activations s_path needs, by rounding in float32 what integers would round.

    python benchmarks/private/integer_precision.py [--questions 100]

Linear layers of the packed float32 encoder are given weights and inputs rounded to so many levels (0: not at
all), each channel and each token by its own scale, with the smoothing of `regime_w.int8`. Writes
benchmarks/results/private/integer_precision.json: the largest error of s_path and the rank correlation.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).parent))
from _servers import DATA, RESULTS, stamp

from looper_schemas.answers import split_final_answer
from regime_w.embedding import TransformerEmbedder
from regime_w.int8 import _Watched, calibration_texts
from regime_w.model_files import read_model_files
from regime_w.packed import Linear, PackedBert, PlainLinear
from regime_w.scoring import path_agreement

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
TRIED = (  # bits of weights and of inputs
    (8, 8), (8, 0), (0, 8), (8, 16), (12, 12), (16, 16),
)  # fmt: skip


def rounded(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Each row of x rounded to integers of so many bits, of its own scale."""
    if not bits:
        return x
    scale = x.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / (2 ** (bits - 1) - 1)
    return (x / scale).round() * scale


def encoder(config: Any, weights: Any, largest: dict[str, torch.Tensor], bits: tuple[int, int]) -> PackedBert:
    def make(name: str, weight_NK: torch.Tensor, bias_N: torch.Tensor) -> Linear:
        ratio_K = largest[name].clamp_min(1e-4) / weight_NK.abs().amax(dim=0).clamp_min(1e-4)
        smooth_K = torch.exp2(torch.log2(ratio_K.sqrt()).round())
        layer = PlainLinear(rounded(weight_NK * smooth_K, bits[0]), bias_N, torch.float32)
        return lambda x_TK: layer(rounded(x_TK / smooth_K, bits[1]))

    return PackedBert(config, weights, make)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--questions", type=int, default=100)
    options = parser.parse_args()
    lines = (DATA / "model_solutions" / "half.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in random.Random(1).sample(lines, options.questions)]
    texts = [split_final_answer(arm["text"])[0] for row in rows for arm in row["arms"]]
    files = read_model_files(MODEL)
    config = json.loads(files["config.json"])
    weights = {k: v.float() for k, v in safetensors.torch.load(files["model.safetensors"]).items()}
    embedder = TransformerEmbedder(MODEL, backend="packed-float32", device="cpu")
    watched: dict[str, _Watched] = {}

    def watch(name: str, weight_NK: torch.Tensor, bias_N: torch.Tensor) -> Linear:
        watched[name] = _Watched(weight_NK, bias_N)
        return watched[name]

    PackedBert(config, weights, watch)([embedder._first_window(text) for text in calibration_texts()])
    largest = {name: layer.largest_K for name, layer in watched.items()}

    def s_path() -> Any:
        vectors = embedder.embed(texts)
        return np.array([path_agreement(vectors[i : i + 4]).value for i in range(0, len(texts), 4)])

    exact = s_path()
    result: dict[str, Any] = {"note": stamp(), "questions": len(rows), "tried": []}
    for bits in TRIED:
        embedder._pool._forward = encoder(config, weights, largest, bits)
        found = s_path()
        result["tried"].append(
            {"bits_of_weights": bits[0], "bits_of_inputs": bits[1],
             "max_error": float(np.abs(found - exact).max()),
             "spearman": float(spearmanr(found, exact).statistic)}
        )  # fmt: skip
        print(result["tried"][-1], flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "integer_precision.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

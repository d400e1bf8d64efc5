"""s_path of real solutions in every backend of a CPU against float32: error, rank correlation, bits.

    python benchmarks/private/s_path_error.py [--questions 200]

Of fewer than all 657 questions a random sample (of a fixed seed) is taken. Prints and writes
benchmarks/results/private/s_path_error.json after every backend: a run that is cut leaves what it had.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).parent))
from _servers import DATA, RESULTS, stamp

from looper_schemas.answers import split_final_answer
from regime_w.embedding import TransformerEmbedder
from regime_w.scoring import path_agreement

MODEL = "sentence-transformers/all-MiniLM-L6-v2"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--questions", type=int, default=200)
    options = parser.parse_args()
    lines = (DATA / "model_solutions" / "half.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in random.Random(1).sample(lines, min(options.questions, len(lines)))]
    texts = [split_final_answer(arm["text"])[0] for row in rows for arm in row["arms"]]
    result: dict[str, object] = {"note": stamp(), "questions": len(rows)}
    exact = None
    for backend in ("float32", "packed-float32", "packed-bf16", "packed-int16", "packed-int8"):
        embedder = TransformerEmbedder(MODEL, backend=backend, device="cpu")
        vectors = embedder.embed(texts)
        s_path = np.array([path_agreement(vectors[i : i + 4]).value for i in range(0, len(texts), 4)])
        if exact is None:
            exact = s_path
            continue
        rng = random.Random(0)
        unequal = 0
        for _ in range(100):  # each batch against the vectors of the whole
            picks = rng.sample(range(len(texts)), rng.choice([1, 2, 5, 12]))
            unequal += not np.array_equal(embedder.embed([texts[i] for i in picks]), vectors[picks])
        result[backend] = {
            "max_error": float(np.abs(s_path - exact).max()),
            "spearman": float(spearmanr(s_path, exact).statistic),
            "batches_with_other_bits": unequal,
        }
        print(backend, result[backend], flush=True)
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / "s_path_error.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

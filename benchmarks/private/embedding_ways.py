"""Every way to embed on these cores that was tried, each beside the naive one in the same rounds.

    python benchmarks/private/embedding_ways.py [--rounds 3] [--questions 16] [--site FOLDER] [--ways NAME...]

Arms a second of the embedding alone (no HTTP), as a ratio to `SentenceTransformer.encode` on eight texts a
call; the largest error of s_path against it and the rank correlation; how many of 16 texts have other bits
alone than in company. With --ways only those are measured, and replace theirs in the kept result. FOLDER
holds what the project does not need itself: `pip install --target FOLDER openvino nncf onnx onnxruntime`. A
way whose library is missing is left out and said to be. Writes
benchmarks/results/private/embedding_ways.json after every way.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Self

import numpy as np
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).parent))
from _servers import RESULTS, Texts, model_folder, os, stamp
from competitors.way import ALONE, WAYS
from throughput import flop_per_token, peak_gflops

from regime_w.scoring import path_agreement


class Way:
    """A way in a process of its own; `round()` is the seconds of one round."""

    def __init__(self, name: str, folder: Path, site: Path | None) -> None:
        self._vectors = folder / "vectors.npy"
        paths = [os.environ.get("PYTHONPATH", ""), *([str(site)] if site else [])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        if not name.startswith("ours"):
            env.pop("OMP_NUM_THREADS", None)  # as a user would start them
        self._log = (folder / "log").open("wb")
        script = Path(__file__).parent / "competitors" / "way.py"
        self._process = subprocess.Popen(
            [sys.executable, str(script), name, str(folder / "model"), str(folder / "texts.json"),
             str(self._vectors)],
            env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def starts(self) -> bool:
        assert self._process.stdout is not None
        return self._process.stdout.readline() == "ready\n"

    def round(self) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def vectors(self) -> Any:
        """(2, n, d): together and alone. Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        return np.load(self._vectors)


def s_path(vectors: Any) -> Any:
    return np.array([path_agreement(vectors[i : i + 8]).value for i in range(0, len(vectors), 8)])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--site", type=Path, help="a folder of more libraries")
    parser.add_argument("--ways", nargs="*", default=[name for name in WAYS if name != "naive"])
    options = parser.parse_args()
    note = stamp()
    result: dict[str, Any] = {"note": note, "arms": 8 * options.questions, "ways": {}}
    kept = RESULTS / "embedding_ways.json"
    if set(options.ways) < set(WAYS) - {"naive"} and kept.is_file():
        result = json.loads(kept.read_text())
    import tokenizers

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "naive").mkdir()
        tokenizer = tokenizers.Tokenizer.from_file(f"{model_folder(folder / 'model')}/tokenizer.json")
        (folder / "naive" / "model").symlink_to(folder / "model")
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # At most 252 tokens, so that a way which truncates at the window has the same work.
        drawn = Texts(tokenizer, seed=5)
        texts = [drawn.arm(100, 245) for _ in range(8 * options.questions)]
        lengths = [len(tokenizer.encode(text).ids) for text in texts]
        for place in (folder, folder / "naive"):
            (place / "texts.json").write_text(json.dumps(texts))
        gflop = sum(n * sum(flop_per_token(n)) for n in lengths) / 1e9
        peaks = {kind: peak_gflops(kind) for kind in ("float32", "bfloat16", "int8")}
        if result["note"] is note:
            result |= {"tokens_per_arm": sum(lengths) / len(lengths), "peak_gflops": peaks}
        with Way("naive", folder / "naive", None) as base:
            assert base.starts()
            exact = None
            for name in options.ways:
                with Way(name, folder, options.site) as way:
                    if not way.starts():
                        log = (folder / "log").read_text(errors="replace").strip().splitlines()
                        result["ways"][name] = {"left_out": log[-1] if log else "it did not start"}
                        print(name, result["ways"][name], flush=True)
                        continue
                    pairs = [(base.round(), way.round()) for _ in range(options.rounds)]
                    vectors = way.vectors()
                if exact is None:
                    with Way("library, one call", folder, None) as reference:
                        assert reference.starts()
                        exact = s_path(reference.vectors()[0])
                seconds = statistics.median(own for _, own in pairs)
                result["ways"][name] = {
                    "arms_per_s": len(texts) / seconds,
                    "naive_arms_per_s": len(texts) / statistics.median(other for other, _ in pairs),
                    "ratio": statistics.median(other for other, _ in pairs) / seconds,
                    "ratios": [other / own for other, own in pairs],
                    "gflops_of_the_model": gflop / seconds,
                    "max_s_path_error": float(np.abs(s_path(vectors[0]) - exact).max()),
                    "spearman": float(spearmanr(s_path(vectors[0]), exact).statistic),
                    "other_bits_alone": sum(
                        not np.array_equal(vectors[0][i], vectors[1][i]) for i in range(ALONE)
                    ),
                } | ({} if result["note"] is note else {"note": note})
                print(name, result["ways"][name], flush=True)
                RESULTS.mkdir(parents=True, exist_ok=True)
                kept.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

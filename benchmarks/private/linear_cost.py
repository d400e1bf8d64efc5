"""How cost and memory grow: with the arms of a question (2 to 64), and with those held at once (to 100,000).

    python benchmarks/private/linear_cost.py [--arms 256] [--held 100000] [--skip-model]

Part 1, the real scorer (default backend of a CPU): about `--arms` new arms of 100 to 300 tokens for each size
of question, in seconds an arm. Part 2, the batcher of the service with `--held` distinct arms waiting in it,
8 a question, 64 questions a request: memory while all of them wait, and the time to score them. There the
vectors come from a hash, because embedding, which part 1 shows to cost the same for every arm, would take the
better part of an hour; everything else is the service's own (`held_over_http.py` asks the whole service over
HTTP). Writes linear_cost.json and a plot, linear_cost.svg, to benchmarks/results/private.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import hashlib
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from _servers import RESULTS, Texts, model_folder, stamp

from looper_schemas.scoring import Arm, Question, RewardMode
from regime_w.embedding import Vectors
from regime_w.scorer import Scorer
from regime_w.settings import RegimeWSettings
from reward_service.batching import Batcher, Result

MODE = RewardMode.ARM_GATED
SIZES = (2, 4, 8, 16, 32, 64)


class Hashed:
    """Vectors of the size of the real model's, from a digest of the text."""

    identity = "hashed"

    def embed(self, texts: Sequence[str]) -> Vectors:
        rows = [
            np.frombuffer(hashlib.shake_128(text.encode()).digest(4 * 384), dtype=np.uint8)[::4]
            for text in texts
        ]
        return np.array(rows, dtype=np.float32).reshape(-1, 384)


class Gated:
    """An engine that waits until it is opened."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer_id, self._scorer, self.gate = scorer.scorer_id, scorer, threading.Event()
        self.reward_range = scorer.reward_range

    def score(self, questions: Sequence[Question], mode: RewardMode, *, fresh: bool = False) -> list[Result]:
        self.gate.wait()
        return self._scorer.score(questions, mode, fresh=fresh)


def rss_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def question(name: str, texts: Sequence[str]) -> Question:
    arms = tuple(Arm(id=str(i), full_text=text) for i, text in enumerate(texts))
    return Question(id=name, question=f"How many, in case {name}?", gold_answer="12", arms=arms)


def by_size(texts: Texts, arms: int) -> list[dict[str, float]]:
    """Seconds an arm for every size of question; the best of two rounds of new texts each."""
    scorer = Scorer(RegimeWSettings(embedding_device="cpu"))
    scorer.score([question("warm", [texts.arm() for _ in range(16)])], MODE)
    found = []
    for size in SIZES:
        seconds = []
        for _ in range(2):
            questions = [
                question(f"{size}/{i}", [texts.arm() for _ in range(size)])
                for i in range(max(1, arms // size))
            ]
            started = time.perf_counter()
            results = scorer.score(questions, MODE)
            seconds.append((time.perf_counter() - started) / (size * len(questions)))
            assert all(result.status == "scored" for result in results)
        plain = Scorer(embedder=Hashed())
        started = time.perf_counter()
        plain.score(questions, MODE)
        rest = (time.perf_counter() - started) / (size * len(questions))
        found.append({"arms": size, "ms_per_arm": 1e3 * min(seconds), "ms_per_arm_without_model": 1e3 * rest})
        print(found[-1], flush=True)
    return found


async def held(texts: list[str], count: int) -> dict[str, float]:
    """`count` distinct arms wait at once, then are scored."""
    engine = Gated(Scorer(RegimeWSettings(score_cache_entries=1024), embedder=Hashed()))
    batcher = Batcher(engine, batch_arms=64, threads=2)
    batcher.start()
    gc.collect()
    before = rss_mib()
    jobs, size = [], 0
    for request in range(count // 512 + (count % 512 > 0)):
        questions = []
        for q in range(min(64, (count - 512 * request) // 8)):
            name = f"{request}/{q}"
            arms = [f"{texts[(8 * q + a + request) % len(texts)]}\nnumber {name}/{a}" for a in range(8)]
            questions.append(question(name, arms))
            size += sum(map(len, arms))
        jobs.append(batcher.submit(questions, MODE))
    waiting = rss_mib()
    started = time.perf_counter()
    engine.gate.set()
    peak = waiting
    arms_done = 0
    for job in jobs:
        results = await job.wait(600)
        assert all(result.status == "scored" for result in results)
        arms_done += sum(len(asked.arms) for asked in job.questions)
        peak = max(peak, rss_mib())
    seconds = time.perf_counter() - started
    batcher.stop()
    return {
        "arms": arms_done,
        "text_mib": size / 2**20,
        "mib_while_waiting": waiting - before,
        "mib_at_most": peak - before,
        "kib_per_arm_waiting": 1024 * (waiting - before) / arms_done,
        "ms_per_arm": 1e3 * seconds / arms_done,
    }


def plot(sizes: list[dict[str, float]], holds: list[dict[str, float]]) -> str:
    """Two panels on logarithmic x axes: ms an arm by arms a question, and by arms held at once."""

    def panel(left: float, title: str, xs: list[float], rows: list[tuple[str, list[float], str]]) -> str:
        top = 1.15 * max(max(ys) for _, ys, _ in rows)
        low, high = np.log(xs[0]), np.log(xs[-1]) if len(xs) > 1 else np.log(xs[0]) + 1

        def at(x: float, y: float) -> str:
            return f"{left + 50 + 280 * (np.log(x) - low) / (high - low):.1f},{220 - 180 * y / top:.1f}"

        parts = [
            f'<text x="{left + 50}" y="24">{title}</text>',
            f'<path d="M{left + 50},40V220H{left + 330}" fill="none" stroke="#888"/>',
            f'<text x="{left + 46}" y="224" text-anchor="end">0</text>',
            f'<text x="{left + 46}" y="48" text-anchor="end">{top:.3g}</text>',
        ]
        parts += [
            f'<text x="{at(x, 0).split(",")[0]}" y="236" text-anchor="middle">{x:,.0f}</text>' for x in xs
        ]
        for i, (name, ys, colour) in enumerate(rows):
            points = " ".join(at(x, y) for x, y in zip(xs, ys, strict=True))
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
            parts.append(f'<text x="{left + 60}" y="{256 + 14 * i}" fill="{colour}">{name}</text>')
        return "".join(parts)

    body = ""
    if sizes:
        body += panel(
            0, "ms an arm, by arms a question", [row["arms"] for row in sizes],
            [("with the model", [row["ms_per_arm"] for row in sizes], "#1d4ed8"),
             ("everything else", [row["ms_per_arm_without_model"] for row in sizes], "#c2410c")],
        )  # fmt: skip
    body += panel(
        350, "by arms held at once", [row["arms"] for row in holds],
        [("ms an arm, without the model", [row["ms_per_arm"] for row in holds], "#c2410c"),
         ("KiB an arm while waiting", [row["kib_per_arm_waiting"] for row in holds], "#15803d")],
    )  # fmt: skip
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 290" font-family="sans-serif" '
        'font-size="11">'
        f'<rect width="700" height="290" fill="white"/>{body}</svg>\n'
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arms", type=int, default=256)
    parser.add_argument("--held", type=int, default=100_000)
    parser.add_argument("--skip-model", action="store_true", help="part 2 only")
    options = parser.parse_args()
    import tokenizers

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tokenizers.Tokenizer.from_file(str(model_folder(Path(folder)) / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    texts = Texts(tokenizer, seed=2)
    result: dict[str, Any] = {"note": stamp()}
    sizes = [] if options.skip_model else by_size(texts, options.arms)
    sample = [texts.arm() for _ in range(512)]
    holds = []
    for count in sorted({min(1024, options.held), min(10_240, options.held), options.held}):
        holds.append(asyncio.run(held(sample, count)))
        print(holds[-1], flush=True)
    result |= {
        "by_arms_of_a_question": sizes,
        "ms_per_arm_64_over_8": (
            {row["arms"]: row["ms_per_arm"] for row in sizes}[64]
            / {row["arms"]: row["ms_per_arm"] for row in sizes}[8]
            if sizes
            else None
        ),
        "by_arms_held_at_once": holds,
        "ms_per_arm_most_over_least": holds[-1]["ms_per_arm"] / holds[0]["ms_per_arm"],
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "linear_cost.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "linear_cost.svg").write_text(plot(sizes, holds))
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

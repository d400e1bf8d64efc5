"""Coherence scores of real solutions, asked of a running service over HTTP.

657 questions with four labelled solutions each (model_solutions/half.jsonl). Prints and writes
  - on how many questions s_end equals the reference (to 1e-6), and correct_flags the labels of all arms;
  - AUROC of s_end, s_path, s_cf and s_wm for "the plurality answer is right", over all questions and over
    those with a unique plurality answer, with bootstrap intervals;
  - the distance of s_path and s_cf from the reference's.

    LOOPER_REWARD_URL=http://127.0.0.1:8080 LOOPER_REWARD_KEY=... python benchmarks/private/coherence_auroc.py

The plurality answer is the most frequent one; of several that tie, the one that the earliest arm gave. Exit
code 1 when an equality fails, 2 when the service cannot be asked.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from scipy.stats import rankdata, spearmanr

ROOT = Path(__file__).parents[2]
COMPONENTS = ("s_end", "s_path", "s_cf", "s_wm")


def request_body(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The contract's request. The service finds the answers in the text; an arm without one is sent empty."""
    return {
        "contract": "1.0",
        "run_id": "coherence-auroc",
        "step": 0,
        "purpose": "eval",
        "scorer_id": None,
        "reward_mode": "arm_gated",
        "disclosure": "components",
        "questions": [
            {
                "id": row["qid"],
                "question": row["question"],
                "gold_answer": row["gold"],
                "arms": [
                    {"id": str(i), "full_text": arm["text"] if arm["answer"] is not None else ""}
                    for i, arm in enumerate(row["arms"])
                ],
            }
            for row in rows
        ],
    }


def ask(
    url: str, key: str, rows: list[dict[str, Any]], per_request: int
) -> tuple[dict[str, Any], str, float]:
    """Results by question id, the scorer's id, and the seconds it all took."""
    results: dict[str, Any] = {}
    scorer_id = ""
    start = time.perf_counter()
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=300) as client:
        for begin in range(0, len(rows), per_request):
            reply = client.post(
                "/v1/score",
                json=request_body(rows[begin : begin + per_request]),
                headers={"Idempotency-Key": uuid.uuid4().hex},
            )
            reply.raise_for_status()
            body = reply.json()
            scorer_id = body["scorer_id"]
            results.update((result["id"], result) for result in body["results"])
    return results, scorer_id, time.perf_counter() - start


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """P(score of a positive > score of a negative), ties half: the rank statistic of Mann and Whitney."""
    ones = int(positive.sum())
    zeros = len(positive) - ones
    if not ones or not zeros:
        return float("nan")
    ranks = rankdata(scores)
    return float((ranks[positive].sum() - ones * (ones + 1) / 2) / (ones * zeros))


def auroc_with_interval(scores: np.ndarray, positive: np.ndarray) -> dict[str, float]:
    """AUROC and the middle 95% of 1,000 bootstrap resamples of the questions."""
    rng = np.random.default_rng(0)
    picks = (rng.integers(len(scores), size=len(scores)) for _ in range(1000))
    low, high = np.nanquantile([auroc(scores[pick], positive[pick]) for pick in picks], [0.025, 0.975])
    return {"auroc": auroc(scores, positive), "low": float(low), "high": float(high)}


def plurality(row: dict[str, Any]) -> tuple[bool, bool]:
    """Whether the plurality answer is right, and whether it is the only most frequent one."""
    counts = Counter(arm["answer"] for arm in row["arms"] if arm["answer"] is not None)
    if not counts:
        return False, False
    [(answer, most), *_] = counts.most_common()  # in order of first occurrence where counts tie
    right = any(arm["correct"] for arm in row["arms"] if arm["answer"] == answer)
    return right, list(counts.values()).count(most) == 1


def report(rows: list[dict[str, Any]], results: dict[str, Any]) -> dict[str, Any]:
    """Every figure of this benchmark."""
    scored = [results[row["qid"]] for row in rows]
    values = {name: np.array([result["scores"][name] for result in scored]) for name in COMPONENTS}
    reference = {name: np.array([row["ref"][name] for row in rows]) for name in rows[0]["ref"]}
    flags = [
        ours == arm["correct"]
        for result, row in zip(scored, rows, strict=True)
        for ours, arm in zip(result["correct_flags"], row["arms"], strict=True)
    ]
    right, unique = (np.array(column) for column in zip(*map(plurality, rows), strict=True))
    path_error = np.abs(values["s_path"] - reference["s_path_raw_minilm"])
    complete = np.array([all(arm["answer"] is not None for arm in row["arms"]) for row in rows])
    cf_error = np.abs(values["s_cf"] - reference["s_cf_f1"])
    return {
        "questions": len(rows),
        "arms": sum(len(row["arms"]) for row in rows),
        "s_end_equal": int((np.abs(values["s_end"] - reference["s_end"]) <= 1e-6).sum()),
        "correct_flags_equal": sum(flags),
        "plurality_right": {"all": int(right.sum()), "unique": int((right & unique).sum())},
        "questions_with_unique_plurality": int(unique.sum()),
        "auroc": {name: auroc_with_interval(values[name], right) for name in COMPONENTS},
        "auroc_unique_plurality": {
            name: auroc_with_interval(values[name][unique], right[unique]) for name in COMPONENTS
        },
        "s_path_against_reference": {
            "max_error": float(path_error.max()),
            "max_error_where_all_arms_have_text": float(path_error[complete].max()),
            "median_error": float(np.median(path_error)),
            "spearman": float(spearmanr(values["s_path"], reference["s_path_raw_minilm"]).statistic),
        },
        "s_cf_against_reference": {
            "equal_to_1e-5": int((cf_error <= 1e-5).sum()),
            "max_error": float(cf_error.max()),
            "spearman": float(spearmanr(values["s_cf"], reference["s_cf_f1"]).statistic),
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("LOOPER_DATA") or (ROOT.parent / "shared" / "data"))
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "private" / "coherence_auroc.json"
    )
    parser.add_argument("--questions-per-request", type=int, default=16)
    options = parser.parse_args()
    path = options.data / "model_solutions" / "half.jsonl"
    url, key = os.environ.get("LOOPER_REWARD_URL"), os.environ.get("LOOPER_REWARD_KEY")
    if not url or not key:
        print(
            "error: set LOOPER_REWARD_URL and LOOPER_REWARD_KEY to those of a running service",
            file=sys.stderr,
        )
        return 2
    if not path.is_file():
        print(f"error: {path}: no such file; pass --data or set LOOPER_DATA", file=sys.stderr)
        return 2
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    try:
        results, scorer_id, seconds = ask(url, key, rows, options.questions_per_request)
    except httpx.HTTPError as error:
        print(f"error: the service at {url} did not score: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    failed = [row["qid"] for row in rows if results.get(row["qid"], {}).get("status") != "scored"]
    if failed:
        print(
            f"error: {len(failed)} questions were not scored, the first is {failed[0]}; run again",
            file=sys.stderr,
        )
        return 2

    figures = {"scorer_id": scorer_id, "seconds": round(seconds, 1), **report(rows, results)}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(f"s_end equals the reference on {figures['s_end_equal']} of {figures['questions']} questions")
    print(f"correct_flags equal the labels on {figures['correct_flags_equal']} of {figures['arms']} arms")
    print(f"{'AUROC':8}{'all questions':>28}{'unique plurality':>28}")
    for name in COMPONENTS:
        cells = [figures[table][name] for table in ("auroc", "auroc_unique_plurality")]
        print(f"{name:8}" + "".join(f"{c['auroc']:>11.3f} [{c['low']:.3f}, {c['high']:.3f}]" for c in cells))
    print(f"s_path against the reference: {figures['s_path_against_reference']}")
    print(f"s_cf against the reference: {figures['s_cf_against_reference']}")
    print(f"{seconds:.1f} s; written to {options.out}")
    exact = (
        figures["s_end_equal"] == figures["questions"] and figures["correct_flags_equal"] == figures["arms"]
    )
    return 0 if exact else 1


if __name__ == "__main__":
    sys.exit(main())

"""What the attacks of the gaming suite earn under every judge, in `arm_gated` and in `arm`.

    python benchmarks/private/gaming_judges.py [--model FOLDER --vllm /path/to/venv/bin/python]

The attacks are those of tests/reward_service/regime_w/test_gaming.py. Judges: `equations`; `yes`, which says
1 of every pair (no judge can give more, so it bounds all of them); `nli` over a tiny cross-encoder of random
weights (it tests the path and no judgement); `llm` over the model in FOLDER, served by vLLM. A question that
the judge fails has no reward. Writes benchmarks/results/private/gaming_judges.json and .md; exit code 1 when
an attack without the right answer earns more in `arm_gated` than the honest wrong answer, or one with it more
than the suite allows.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "reward_service" / "regime_w"))
from _servers import RESULTS, Server, free_port, stamp
from test_cross_encoder import LABELS, make_model
from test_gaming import ATTACKS, GOLD, HONEST_RIGHT, HONEST_WRONG, MOST_GAINED, PROBLEM, Attack

from looper_schemas.scoring import Arm, Question, RewardMode, ScoredQuestion
from regime_w.caches import CachedEmbedder
from regime_w.cross_encoder import CrossEncoderEntailer
from regime_w.embedding import TransformerEmbedder
from regime_w.judges import EquationsJudge, Judge, Pairs
from regime_w.llm_judge import LlmJudge
from regime_w.nli_judge import NliJudge
from regime_w.scorer import Scorer
from reward_service.judge_endpoint import JudgeEndpoint

MODES = (RewardMode.ARM_GATED, RewardMode.ARM)


class Yes:
    """Calls every pair consistent."""

    identity, concurrency = "yes", 1

    def judge_pairs(self, question: str, pairs: Pairs, *, fresh: bool = False) -> list[float]:
        return [1.0] * len(pairs)


def earned(scorer: Scorer, attack: Attack, text: str, answer: str | None, mode: RewardMode) -> float | None:
    """The reward of the last arm; None: the question failed."""
    arms = [Arm(id=str(i), full_text=other) for i, other in enumerate(attack.others)]
    arms.append(Arm(id="last", full_text=text, answer=answer))
    (result,) = scorer.score([Question(id="q", question=PROBLEM, gold_answer=GOLD, arms=tuple(arms))], mode)
    if not isinstance(result, ScoredQuestion):
        return None
    return {arm.id: arm.reward for arm in result.arms}["last"]


def under(judge: Judge, embedder: CachedEmbedder) -> list[dict[str, Any]]:
    """A row for each attack: what it earns, and an honest arm in its place; whether it is within bounds."""
    scorer = Scorer(embedder=embedder, judge=judge)
    rows = []
    for attack in ATTACKS:
        row: dict[str, Any] = {"attack": attack.name, "states_the_right_answer": attack.right}
        for mode in MODES:
            row[mode.value] = earned(scorer, attack, attack.text, attack.answer, mode)
        gated, honest = row["arm_gated"], HONEST_RIGHT if attack.right else HONEST_WRONG
        row["honest_arm_gated"] = earned(scorer, attack, honest, None, RewardMode.ARM_GATED)
        if gated is None:
            row["within_bounds"] = True  # no reward at all: the question is dropped and counted
        elif attack.right:
            most = MOST_GAINED if attack.gains else 0.0
            row["within_bounds"] = row["honest_arm_gated"] is None or gated <= row["honest_arm_gated"] + most
        else:
            row["within_bounds"] = gated == -0.5
        rows.append(row)
        print(judge.identity[:20], row, flush=True)
    return rows


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    def shown(value: float | None) -> str:
        return "failed" if value is None else f"{value:.3f}"

    judges = list(found)
    lines = [
        "| attack | " + " | ".join(f"{judge}, {mode.value}" for judge in judges for mode in MODES) + " |"
    ]
    lines.append("|---|" + "---|" * (len(judges) * len(MODES)))
    for place, attack in enumerate(ATTACKS):
        cells = [shown(found[judge][place][mode.value]) for judge in judges for mode in MODES]
        name = f"{attack.name} (states the right answer)" if attack.right else attack.name
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def keep(note: dict[str, Any], found: dict[str, list[dict[str, Any]]], what: dict[str, str]) -> None:
    result = {"note": note, "judges": {judge: what[judge] for judge in found}, "attacks": found}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "gaming_judges.json").write_text(json.dumps(result, indent=1) + "\n")
    described = "".join(f"- `{judge}`: {what[judge]}\n" for judge in found)
    (RESULTS / "gaming_judges.md").write_text(
        "# What attacks earn under each judge\n\nRewards of the last arm "
        f"(benchmarks/private/gaming_judges.py, {note['date'][:10]}, {note['commit']}).\n\n"
        f"{described}\n{table(found)}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder of the llm judge, that vLLM serves")
    parser.add_argument("--vllm", help="python that has vLLM")
    options = parser.parse_args(arguments)
    note = stamp()
    what = {
        "equations": "the default",
        "yes": "says 1 of every pair: no judge can give more",
        "nli": "a tiny cross-encoder with random weights: the path, no judgement",
        "llm": f"{Path(options.model or '').name}, served by vLLM in float32",
    }
    embedder = CachedEmbedder(
        TransformerEmbedder("sentence-transformers/all-MiniLM-L6-v2", backend="packed-float32", device="cpu"),
        4096,
    )
    with tempfile.TemporaryDirectory() as scratch:
        tiny = make_model(Path(scratch) / "nli", LABELS)
        found = {"equations": under(EquationsJudge(4096), embedder), "yes": under(Yes(), embedder)}
        found["nli"] = under(NliJudge(CrossEncoderEntailer(str(tiny), device="cpu"), 65_536), embedder)
        keep(note, found, what)
        if options.model and options.vllm:
            port = free_port()
            vllm = Server(
                "vllm",
                [options.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", options.model,
                 "--served-model-name", "judge", "--host", "127.0.0.1", "--port", str(port),
                 "--max-model-len", "4096", "--dtype", "float32", "--enforce-eager",
             # vLLM 0.31 on a CPU ends when it cuts the prompt of a request that has a seed.
             "--max-num-batched-tokens", "32768"],
                port, {"PYTHONPATH": "", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
                       "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            endpoint = JudgeEndpoint(
                f"http://127.0.0.1:{port}", "judge", concurrency=8, timeout_s=300.0, attempts=1
            )
            try:
                vllm.wait("/health", seconds=400)
                found["llm"] = under(LlmJudge(endpoint, 65_536), embedder)
            finally:
                endpoint.close()
                vllm.stop()
            keep(note, found, what)
    bad = [
        (judge, row["attack"]) for judge, rows in found.items() for row in rows if not row["within_bounds"]
    ]
    for judge, rows in found.items():
        failed = sum(row["arm_gated"] is None for row in rows)
        print(f"{judge}: {len(rows)} attacks, {failed} failed questions")
    print("out of bounds:", bad)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

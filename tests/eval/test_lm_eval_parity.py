"""lm-evaluation-harness itself, with its tasks as shipped, gives every generation the score that we give it.

It runs as a script in an interpreter that has lm-eval: this one, or the one that LOOPER_LM_EVAL_PYTHON names.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from looper_eval.grading import lm_eval_cot_strict, lm_eval_flexible, lm_eval_strict
from looper_eval.settings import resolve_settings

PYTHON = os.environ.get("LOOPER_LM_EVAL_PYTHON") or (
    sys.executable if importlib.util.find_spec("lm_eval") else None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="no lm-eval here, and LOOPER_LM_EVAL_PYTHON names none"),
]
ORACLE = Path(__file__).with_name("_lm_eval_oracle.py")
CASES = Path(__file__).parents[1] / "schemas" / "grader_cases.txt"
DATA = Path(os.environ.get("LOOPER_DATA") or (Path(__file__).resolve().parents[3] / "shared" / "data"))
ENDINGS = ("\n#### {}", "\n#### ${}.00", " The answer is {}.", " So the answer is ${}.\n")
RULES = {
    ("gsm8k", "strict-match"): lm_eval_strict,
    ("gsm8k_cot", "strict-match"): lm_eval_cot_strict,
    ("gsm8k", "flexible-extract"): lm_eval_flexible,
    ("gsm8k_cot", "flexible-extract"): lm_eval_flexible,
}


def generations() -> list[tuple[str, str]]:
    """(output, GSM8K answer): our labelled cases, real solutions where they are at hand, and random texts."""
    found = []
    for line in CASES.read_text(encoding="utf-8").splitlines():
        fields = line.split(" | ")
        if len(fields) == 4 and not line.startswith("#   "):
            text = fields[0].replace("⏎", "\n")
            found += [(text, f"Work.\n#### {gold}") for gold in (fields[1], fields[2]) if gold != "—"]
    solutions = DATA / "model_solutions" / "half.jsonl"
    if solutions.is_file():
        for line in solutions.read_text(encoding="utf-8").splitlines()[::8]:
            question = json.loads(line)
            gold = f"Work.\n#### {question['gold']}"
            for arm, ending in zip(question["arms"], ENDINGS, strict=True):
                found.append((arm["text"], gold))
                found.append((arm["text"] + ending.format(arm["answer"]), gold))
    for n in range(1, 100, 5):  # so that many are right also where no real solutions are at hand
        found += [(f"So many are {n}.{ending.format(n)}", f"Work.\n#### {n}") for ending in ENDINGS]
    rng = random.Random(0)
    pieces = ["#### ", "####", "The answer is ", "the answer is ", "$", "-", ".", ",", "1,000", "18", "18.00",
              "0", "7", "%", " ", "\n", "x", "72.", "[invalid]"]  # fmt: skip
    golds = ["18", "1,000", "72", "7", "0", "-7", "18.00"]
    for _ in range(800):
        text = "".join(rng.choices(pieces, k=rng.randrange(1, 9)))
        found.append((text, f"Work.\n#### {rng.choice(golds)}"))
    return found


def test_the_same_generations_get_the_same_scores_question_by_question(tmp_path: Path) -> None:
    pairs = generations()
    job = {
        "tasks": ["gsm8k", "gsm8k-cot"],
        "docs": [{"question": f"Q{n}?", "answer": answer} for n, (_, answer) in enumerate(pairs)],
        "outputs": [text for text, _ in pairs],
    }
    (tmp_path / "job.json").write_text(json.dumps(job), encoding="utf-8")
    assert PYTHON is not None
    command = [PYTHON, str(ORACLE), str(tmp_path / "job.json"), str(tmp_path / "result.json")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    subprocess.run(command, check=True, env=environment, capture_output=True, timeout=300)
    result = json.loads((tmp_path / "result.json").read_text())
    scores = result["scores"]
    settings = resolve_settings("lm-eval-cot")
    for sample in result["samples"]["gsm8k_cot"][:50]:
        ((prompt, options),) = sample["arguments"]
        assert prompt == settings.prompt(sample["doc"]["question"])
        assert tuple(options["until"]) == settings.stop
    for (task, name), rule in RULES.items():
        theirs = [score == 1.0 for score in scores[task][name]]
        ours = [rule(text, answer) for text, answer in pairs]
        differing = [pair for pair, a, b in zip(pairs, theirs, ours, strict=True) if a != b]
        assert differing == [], (task, name, differing[:5])
        assert 30 < sum(theirs) < len(theirs) - 30, "the generations tell nothing"
        print(f"{task} {name}: {sum(theirs)} of {len(theirs)} right for both")

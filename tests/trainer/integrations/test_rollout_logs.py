"""Rollouts as lm-eval's and inspect's logs: by their published shapes, and read by inspect itself.

The last needs `LOOPER_INSPECT_PYTHON`, an interpreter with inspect_ai.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path

import pytest

from looper_schemas.records import RolloutRecord, Trajectory, write_records
from looper_schemas.scoring import Scores
from looper_trainer.cli import main

# The keys that lm-eval 0.4.13 writes for each sample (lm_eval/evaluator.py), besides the metrics themselves.
LM_EVAL_KEYS = {
    *("doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics"),
    *("doc_hash", "prompt_hash", "target_hash"),
}


@pytest.fixture
def rollouts(tmp_path: Path) -> Path:
    scored = RolloutRecord(
        id="q/1",
        question="2+2?",
        gold_answer="4",
        trajectories=(
            Trajectory(output="Answer: #### 4", final_answer="4", reward=1.5, finish_reason="stop"),
            Trajectory(output="I wonder", final_answer=None, reward=-0.5, finish_reason="length"),
        ),
        scores=Scores(s_end=0.25, s_path=0.5, s_cf=None, s_wm=0.75),
        policy="sft@1",
        scorer_id="s",
        reward_mode="arm_gated",
    )
    failed = scored.model_copy(
        update={
            "id": "q/2",
            "scores": None,
            "trajectories": tuple(t.model_copy(update={"reward": None}) for t in scored.trajectories),
        }
    )
    write_records(tmp_path / "r.jsonl", [scored, failed])
    return tmp_path / "r.jsonl"


def export(rollouts: Path, kind: str) -> Path:
    out = rollouts.parent / "logs"
    assert (
        main(["export-rollouts", str(rollouts), "--to", kind, "--output", str(out), "--task", "gsm8k"]) == 0
    )
    (file,) = out.iterdir()
    return file


def test_lm_eval_lines_have_its_keys_and_hashes(rollouts: Path) -> None:
    file = export(rollouts, "lm-eval")
    assert file.name.startswith("samples_gsm8k_20")
    first, second = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
    assert first.keys() - set(first["metrics"]) == LM_EVAL_KEYS
    assert first["resps"] == [["Answer: #### 4", "I wonder"]]
    assert (first["exact_match"], first["reward"], first["s_wm"]) == (0.5, 0.5, 0.75)
    assert first["target_hash"] == hashlib.sha256(b"4").hexdigest()
    assert "s_cf" not in first
    assert second["metrics"] == ["exact_match"]  # no reward where there is no score


def test_inspect_has_a_sample_for_each_completion(rollouts: Path) -> None:
    log = json.loads(export(rollouts, "inspect").read_text(encoding="utf-8"))
    assert [(s["id"], s["epoch"]) for s in log["samples"]] == [("q/1", 1), ("q/1", 2), ("q/2", 1), ("q/2", 2)]
    assert [s["scores"]["correct"]["value"] for s in log["samples"]] == ["C", "I", "C", "I"]
    assert [s["scores"].get("reward", {}).get("value") for s in log["samples"]] == [1.5, -0.5, None, None]
    assert log["results"]["scores"][0]["metrics"]["accuracy"]["value"] == 0.5


@pytest.mark.slow
@pytest.mark.skipif("LOOPER_INSPECT_PYTHON" not in os.environ, reason="no inspect")
def test_inspect_reads_its_log(rollouts: Path) -> None:
    program = (
        "import sys\nfrom inspect_ai.log import read_eval_log\nlog = read_eval_log(sys.argv[1])\n"
        "first, second = log.samples[:2]\n"
        "print(log.status, len(log.samples), second.output.stop_reason, first.scores['reward'].value)"
    )
    done = subprocess.run(
        [os.environ["LOOPER_INSPECT_PYTHON"], "-c", program, str(export(rollouts, "inspect"))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "success 4 max_tokens 1.5\n", done.stderr

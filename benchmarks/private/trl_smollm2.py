"""TRL's GRPO and RLOO train SmolLM2-135M some steps on the private service, which is then killed.

    python benchmarks/private/trl_smollm2.py --model checkpoints/sft --data data/gsm8k_train.jsonl \
        --label "SmolLM2-135M-Instruct, 3 epochs of SFT"

A model that answers within the limit and is right now and then learns; one that never is has no gradient.

The trainer is `examples/trl_training.py` as it stands: one import and one argument more than without Looper.
The service is a process of its own with a fresh key, and gets SIGKILL once the log shows step --kill-after.
Kept is what TRL itself logged of each step. Exit code 1 when a step on the living service has no reward, or
one after its death has a number where there is none, or no step before it has a gradient.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from _servers import ROOT, Service
from kept import keep, stamp

KEPT = (
    "step",
    "loss",
    "grad_norm",
    "reward",
    "rewards/looper_reward/mean",
    "looper/s_wm",
    "looper/correct_rate",
    "looper/failed_share",
    "completions/mean_length",
)


def train(algorithm: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One run of the example; its steps as TRL logged them."""
    service = Service(algorithm, folder)
    out = folder / algorithm
    command = [
        sys.executable, "-u", ROOT / "examples/trl_training.py", "--algorithm", algorithm,
        "--model", options.model, "--data", options.data, "--out", out, "--steps", options.steps,
        "--questions", options.questions, "--samples", 4, "--max-new-tokens", options.max_new_tokens,
        "--learning-rate", 1e-5, "--give-up-after-s", 2,
    ]  # fmt: skip
    environment = os.environ | {
        "LOOPER_REWARD_URL": f"http://127.0.0.1:{service.port}",
        "LOOPER_REWARD_KEY": service.key,
    }
    began = time.monotonic()
    with (folder / f"{algorithm}.err").open("wb") as log:
        process = subprocess.Popen(
            [str(word) for word in command], env=environment, stdout=subprocess.PIPE, stderr=log, text=True
        )
        assert process.stdout is not None
        seen = 0
        for line in process.stdout:
            seen += "'loss'" in line
            if seen == options.kill_after and service.process.poll() is None:
                service.process.kill()
                service.process.wait()
    if process.wait() != 0:
        raise SystemExit((folder / f"{algorithm}.err").read_text()[-2000:])
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    errors = (folder / f"{algorithm}.err").read_text()
    return {
        "seconds": round(time.monotonic() - began, 1),
        "steps": [{key: row[key] for key in KEPT if key in row} for row in history if "loss" in row],
        "said": [line for line in errors.splitlines() if line.startswith("looper:")],
    }


def sound(run: dict[str, Any], kill_after: int) -> bool:
    """Whether steps before the kill have rewards, and those after it none; the one it fell into is either."""
    living, dead = run["steps"][:kill_after], run["steps"][kill_after + 1 :]
    learns = any(row["grad_norm"] > 0 for row in living)
    return (
        learns
        and all(row["reward"] is not None and row["looper/failed_share"] == 0 for row in living)
        and all(row["reward"] is None and row["looper/failed_share"] == 1 for row in dead)
    )


def main() -> int:
    """Run both trainers and keep what they logged."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--label", default="SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--kill-after", type=int, default=3)
    parser.add_argument("--questions", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: train(name, options, Path(folder)) for name in ("grpo", "rloo")}
    result: dict[str, Any] = {
        **stamp(),
        "model": options.label,
        "data": options.data.name,
        "trl": version("trl"),
        "killed_after_step": options.kill_after,
        "questions_a_step": options.questions,
        "samples": 4,
        "max_new_tokens": options.max_new_tokens,
        "runs": runs,
    }
    keep("trl_smollm2", result)
    return 0 if all(sound(run, options.kill_after) for run in runs.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

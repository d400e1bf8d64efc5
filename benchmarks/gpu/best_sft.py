"""SFT at its own best: a grid of learning rates and epochs, each judged by greedy dev accuracy.

    python benchmarks/gpu/best_sft.py --model DIR --train F --dev F --out DIR \
        --grid 1e-4:3 2e-4:3 2e-4:6 [--jobs N] [--devices 0 1] [--commit C]

Every cell is `looper sft` with full fine-tuning; `looper-eval` then asks every model every question of
`--dev`. The best model is linked as `<out>/best`; the table is printed and written to
`<out>/best_sft.json`. PPO that starts from it is not credited with what more SFT would have given.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Train the grid, evaluate it, link the best."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("model", "train", "dev", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--grid", nargs="+", required=True, metavar="RATE:EPOCHS")
    parser.add_argument("--batch-size", default="32")
    parser.add_argument("--max-new-tokens", default="256")
    parser.add_argument("--jobs", type=int, default=1, help="models trained side by side")
    parser.add_argument("--devices", nargs="*", default=[], help="GPU numbers, shared out among the jobs")
    parser.add_argument("--commit", default=None)
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)

    def one(numbered: tuple[int, str]) -> None:
        number, cell = numbered
        rate, _, epochs = cell.partition(":")
        out = options.out / name_of(cell)
        device = options.devices[number % len(options.devices)] if options.devices else None
        if (out / "config.json").is_file():
            return
        run(
            options.out / f"{name_of(cell)}.log", device, "looper_trainer.cli", "sft",
            "--model", options.model, "--train-file", options.train, "--output", out, "--mode", "full",
            "--learning-rate", rate, "--epochs", epochs, "--batch-size", options.batch_size,
            "--gradient-checkpointing", "false", "--log-every", 50,
        )  # fmt: skip
        run(
            options.out / f"{name_of(cell)}-eval.log", device, "looper_eval.cli", "run",
            "--model", f"{name_of(cell)}={out}", "--dataset", options.dev, "--out", f"{out}-eval",
            "--max-new-tokens", options.max_new_tokens, "--batch-size", 512,
        )  # fmt: skip

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(one, enumerate(options.grid)))
    found = []
    for cell in options.grid:
        summary = json.loads((options.out / f"{name_of(cell)}-eval/summary.json").read_text())
        accuracy = summary["models"][0]["accuracy"]
        found.append({"cell": cell, "dev_accuracy": accuracy, "n": summary["n"]})
        print(f"{cell}: {100 * accuracy:.2f}% of {summary['n']}", flush=True)
    best = max(found, key=lambda one: one["dev_accuracy"])
    link = options.out / "best"
    link.unlink(missing_ok=True)
    link.symlink_to(name_of(best["cell"]))
    (options.out / "best_sft.json").write_text(
        json.dumps({"commit": options.commit, "grid": found, "best": best["cell"]}, indent=1) + "\n"
    )
    print(f"best: {best['cell']}")
    return 0


def name_of(cell: str) -> str:
    """A folder's name for a cell of the grid."""
    return "sft-" + cell.replace(":", "-")


def run(log: Path, device: str | None, module: str, *arguments: object) -> None:
    """Run a public command with its output in `log`."""
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    with log.open("a", encoding="utf-8") as file:
        subprocess.run(
            [sys.executable, "-m", module, *map(str, arguments)],
            check=True, stdout=file, stderr=subprocess.STDOUT, env=environment,
        )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())

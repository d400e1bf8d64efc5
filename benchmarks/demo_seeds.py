"""The demo with several seeds and its control, a random reward: does PPO's gain come from the reward?

    python benchmarks/demo_seeds.py --service COMMAND [--seeds 0 1 2] [--controls 0 1 2] [--jobs N]

Every run is `scripts/demo/run.py` with its own folder; finished ones are not repeated. The control takes
problems, base and SFT model of its seed's run and differs in nothing but the server that rewards come from.
Prints the tables and writes them, with machine, date and commit, to
`benchmarks/results/demo_seeds.{json,md}`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
BEFORE_REWARDS = ("problems", "base", "data", "checkpoints/sft")


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--service", required=True, help="command that starts the reward service")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--controls", type=int, nargs="*", default=[0, 1, 2], help="seeds to control")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/seeds")
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs side by side; more than 1 distorts the times"
    )
    options = parser.parse_args(argv)

    def both(seed: int) -> None:
        trained = options.out / f"service-{seed}"
        run_demo(trained, seed, ["--service", options.service])
        if seed in options.controls:
            run_demo(options.out / f"random-{seed}", seed, ["--reward", "random"], like=trained)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(both, options.seeds))
    names = [f"service-{seed}" for seed in options.seeds] + [f"random-{seed}" for seed in options.controls]
    write_results([summary(options.out / name, name) for name in names])
    return 0


def run_demo(out: Path, seed: int, reward: list[str], like: Path | None = None) -> None:
    """One demo, unless it is finished; stages before the first reward are taken from `like`.

    Raises:
        subprocess.CalledProcessError: the demo failed.
    """
    if (out / "report.html").is_file():
        return
    for part in BEFORE_REWARDS if like and not out.exists() else ():
        shutil.copytree(
            like / part, out / part, ignore=shutil.ignore_patterns("ppo_rollouts*", ".rollouts-done")
        )
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "scripts/demo/run.py", "--seed", str(seed), "--out", str(out), *reward]
    with (out / "demo.log").open("a", encoding="utf-8") as log:
        subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=True)


def summary(out: Path, name: str) -> dict[str, Any]:
    """What the tables need of one finished demo."""
    found = json.loads((out / "eval/summary.json").read_text())
    stages = [json.loads(line) for line in (out / "timings.jsonl").read_text().splitlines()]
    return {
        "run": name,
        "seconds": sum(stage["seconds"] for stage in stages),
        "stages": stages,
        "eval": found,
    }


def write_results(runs: list[dict[str, Any]]) -> None:
    """The JSON record and the Markdown tables."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    stamp = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "commit": commit,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    for run in runs:
        for model in run["eval"]["models"]:
            model.pop("place")  # a path of this machine
        run["eval"]["dataset"] = Path(run["eval"]["dataset"]).name
    (RESULTS / "demo_seeds.json").write_text(json.dumps({**stamp, "runs": runs}, indent=1) + "\n")
    lines = [
        "# The demo, three seeds, and its control", "",
        f"Written by `benchmarks/demo_seeds.py` on {stamp['date']} ({stamp['machine']},",
        f"commit {stamp['commit']}).", "",
        "| run | base | SFT | PPO | PPO - SFT (95% interval) | McNemar p | questions | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [row(run) for run in runs]
    text = "\n".join(lines) + "\n"
    (RESULTS / "demo_seeds.md").write_text(text)
    print(text)


def row(run: dict[str, Any]) -> str:
    """One line of the table."""
    accuracy = {model["name"]: f"{100 * model['accuracy']:.1f}%" for model in run["eval"]["models"]}
    pair = next(pair for pair in run["eval"]["pairs"] if (pair["a"], pair["b"]) == ("sft", "ppo"))
    low, high = (100 * bound for bound in pair["interval"])
    return (
        f"| {run['run']} | {accuracy['base']} | {accuracy['sft']} | {accuracy['ppo']} "
        f"| {100 * pair['difference']:+.1f} ({low:+.1f}, {high:+.1f}) | {pair['p']:.2g} | {run['eval']['n']} "
        f"| {run['seconds']:.0f} |"
    )


if __name__ == "__main__":
    sys.exit(main())

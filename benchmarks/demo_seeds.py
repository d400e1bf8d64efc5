"""The demo with several seeds, and with a random reward in place of the service: does PPO's gain come from the reward?

    python benchmarks/demo_seeds.py --service "COMMAND" [--seeds 0 1 2] [--out runs/seeds] [--jobs 1]

Every run is `scripts/demo/run.py` with its own folder; finished ones are not repeated. The control differs in
nothing but the server that rewards come from. Prints the tables and writes them, with machine, date and commit, to
`benchmarks/results/demo_seeds.{json,md}`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--service", required=True, help="command that starts the reward service")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "runs/seeds")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side; more than 1 distorts the times")
    options = parser.parse_args(argv)
    runs = [
        (f"{kind}-{seed}", seed, ["--service", options.service] if kind == "service" else ["--reward", "random"])
        for kind in ("service", "random")
        for seed in options.seeds
    ]
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda run: run_demo(options.out / run[0], run[1], run[2]), runs))
    write_results([summary(options.out / name, name) for name, _, _ in runs])
    return 0


def run_demo(out: Path, seed: int, reward: list[str]) -> None:
    """One demo, unless it is finished; its wall time is kept beside it.

    Raises:
        subprocess.CalledProcessError: the demo failed.
    """
    if (out / "wall.json").is_file():
        return
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "scripts/demo/run.py", "--seed", str(seed), "--out", str(out), *reward]
    began = time.monotonic()
    with (out / "demo.log").open("w", encoding="utf-8") as log:
        subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=True)
    (out / "wall.json").write_text(json.dumps({"seconds": round(time.monotonic() - began, 1)}))


def summary(out: Path, name: str) -> dict[str, Any]:
    """What the tables need of one finished demo."""
    found = json.loads((out / "eval/summary.json").read_text())
    return {"run": name, "seconds": json.loads((out / "wall.json").read_text())["seconds"], "eval": found}


def write_results(runs: list[dict[str, Any]]) -> None:
    """The JSON record and the Markdown tables."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    stamp = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {len_cpus()} cores, Python {platform.python_version()}",
        "commit": commit,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "demo_seeds.json").write_text(json.dumps({**stamp, "runs": runs}, indent=1) + "\n")
    lines = [
        "# The demo, three seeds, and its control", "",
        f"Written by `benchmarks/demo_seeds.py` on {stamp['date']} ({stamp['machine']}, commit {stamp['commit']}).", "",
        "| run | base | SFT | PPO | PPO - SFT (95% interval) | McNemar p | questions | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [row(run) for run in runs]
    text = "\n".join(lines) + "\n"
    (RESULTS / "demo_seeds.md").write_text(text)
    print(text)


def row(run: dict[str, Any]) -> str:
    """One line of the table."""
    models = {model["name"]: model for model in run["eval"]["models"]}
    pair = next(p for p in run["eval"]["comparisons"] if {p["a"], p["b"]} == {"sft", "ppo"})
    accuracy = [f"{100 * models[name]['accuracy']:.1f}%" for name in ("base", "sft", "ppo")]
    low, high = (100 * bound for bound in pair["interval"])
    return (
        f"| {run['run']} | {' | '.join(accuracy)} | {100 * pair['difference']:+.1f} ({low:+.1f}, {high:+.1f}) "
        f"| {pair['mcnemar_p']:.2g} | {models['ppo']['questions']} | {run['seconds']:.0f} |"
    )


def len_cpus() -> int:
    """Cores this process may use."""
    import os

    return len(os.sched_getaffinity(0))


if __name__ == "__main__":
    sys.exit(main())

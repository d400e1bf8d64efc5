"""PPO from one SFT model under several rewards and seeds: does it learn, and what in the reward matters?

    python benchmarks/private/ppo_variants.py --sft DIR --train F --dev F --test F --config TOML --out DIR \
        --runs arm_gated:0 arm_gated:1 correctness:0 [--jobs N] [--devices 0 1] [--set steps=100 ...]

Every run starts a reward service of its own (a process with a fresh key), trains with `looper ppo` and asks
the SFT model and the trained one every question of `--test` with `looper-eval`. The variants, on one scale:

    arm_gated, arm, question   the service's reward modes
    correctness                the service without coherence
    coherence                  the service without correctness (mode arm)
    random_coherence           correctness, and for a right completion random numbers in coherence's place
    random                     random numbers for everything

Finished runs are not repeated. `--dev` picks each run's checkpoint (unless `--set result=last`); the
comparison is on `--test` alone. Prints and writes `<out>/variants.{json,md}`: accuracies, paired differences,
every run's curve and its evaluations on `--dev` against the start, those of a run that was cut short too.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import queue
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts/demo"))

import run as demo  # noqa: E402

from looper_eval.statistics import mcnemar_exact, paired_means, paired_table  # noqa: E402

WITHOUT_COHERENCE = "[scorer.reward]\ncoherence = 0.0\n"
WITHOUT_CORRECTNESS = "[scorer.reward]\ncorrect = 0.0\nwrong = 0.0\n"
COHERENCE_WEIGHT = 0.7
# variant -> (reward mode, settings of the private service, or arguments of the public fake server)
VARIANTS: dict[str, tuple[str, str | list[str]]] = {
    "arm_gated": ("arm_gated", ""),
    "arm": ("arm", ""),
    "question": ("question", ""),
    "correctness": ("arm", WITHOUT_COHERENCE),
    "coherence": ("arm", WITHOUT_CORRECTNESS),
    "random_coherence": ("arm", ["--mode", "correct", "--noise", str(COHERENCE_WEIGHT)]),
    "random": ("arm", ["--mode", "random"]),
}
CURVE = (
    "step", "correct_rate", "reward_mean", "s_end", "s_path", "s_cf", "s_wm", "kl_k1_per_completion",
    "entropy", "explained_variance", "questions_learnt_from", "length_mean", "truncation_rate",
    "distinct_answers_mean", "clip_fraction", "update_kl_k3", "dev_accuracy", "dev_sampled_accuracy",
    "step_seconds",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, then write the tables."""
    options = parse(argv)
    runs = [(name, int(seed)) for name, _, seed in (run.partition(":") for run in options.runs)]
    devices: queue.Queue[str] = queue.Queue()
    for job in range(options.jobs):
        devices.put(options.devices[job % len(options.devices)] if options.devices else "")

    def one(run: tuple[str, int]) -> None:
        device = devices.get()
        try:
            train_and_evaluate(options, *run, device)
        except (subprocess.CalledProcessError, OSError) as error:
            print(f"{run[0]}-{run[1]}: failed: {error}", flush=True)
        finally:
            devices.put(device)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(one, runs))
    write_results(options)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("sft", "train", "dev", "test", "config", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--runs", nargs="*", default=[], metavar="VARIANT:SEED")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--devices", nargs="*", default=[], help="GPU numbers, shared out among the jobs")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of looper ppo")
    parser.add_argument("--label", default="", help="put before the name of every run")
    parser.add_argument("--service-device", default="cpu", help="where the service embeds")
    parser.add_argument("--service-settings", default="", help="TOML put first in its settings")
    parser.add_argument("--service-backend", default="auto", help="how the service embeds")
    parser.add_argument(
        "--dev-alone", action="store_true", help="leave looper-eval out: `--dev` in the run says it"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of the evaluation")
    parser.add_argument("--eval-batch", type=int, default=32)
    parser.add_argument("--commit", default=None)
    return parser.parse_args(argv)


def train_and_evaluate(options: argparse.Namespace, variant: str, seed: int, device: str) -> None:
    """One run: its service, `looper ppo`, `looper-eval run`.

    Raises:
        subprocess.CalledProcessError: a stage failed; its log is in the run's folder.
    """
    name = "-".join(filter(None, (options.label, variant, str(seed))))
    out = options.out / name
    if (out / "seconds").is_file():
        return
    mode, reward = VARIANTS[variant]
    (out / "logs").mkdir(parents=True, exist_ok=True)
    environment = {"OMP_NUM_THREADS": "2"} | ({"CUDA_VISIBLE_DEVICES": device} if device else {})
    server = argparse.Namespace(out=out, service=None, reward=None, seed=seed)
    if isinstance(reward, str):
        settings = out / "service-settings.toml"
        settings.write_text(
            f'{options.service_settings}\n[scorer]\nembedding_device = "{options.service_device}"\n'
            f'embedding_backend = "{options.service_backend}"\n{reward}'
        )
        server.service = f"{sys.executable} scripts/demo/private_service.py --settings {settings}"
    else:
        server.fake = reward
    began = time.monotonic()
    with demo.reward_server(server) as client:
        ppo = [
            *demo.module("looper_trainer.cli"), "ppo", "--config", options.config, "--model", options.sft,
            "--train-file", options.train, "--dev-file", options.dev, "--output", out / "ppo",
            "--reward-mode", mode, "--seed", seed,
        ]  # fmt: skip
        for setting in options.set:
            key, _, value = setting.partition("=")
            ppo += ["--" + key.replace("_", "-"), value]
        if (out / "ppo/checkpoints").exists():
            ppo += ["--resume", "true"]
        logged(out / "logs/ppo.log", ppo, environment | client)
    if options.dev_alone:
        (out / "seconds").write_text(f"{time.monotonic() - began:.0f}")
        write_results(options)
        return
    evaluate = [
        *demo.module("looper_eval.cli"), "run", "--model", f"sft={options.sft}",
        "--model", f"ppo={out / 'ppo/merged'}", "--dataset", options.test, "--out", out / "eval",
        "--max-new-tokens", options.max_new_tokens, "--batch-size", options.eval_batch,
    ]  # fmt: skip
    logged(out / "logs/eval.log", evaluate, environment)
    (out / "seconds").write_text(f"{time.monotonic() - began:.0f}")
    write_results(options)


def logged(log: Path, command: Sequence[object], environment: dict[str, str]) -> None:
    """Run `command` with its output in `log`."""
    with log.open("a", encoding="utf-8") as file:
        subprocess.run(
            [str(word) for word in command], cwd=ROOT, check=True, stdout=file, stderr=subprocess.STDOUT,
            env=os.environ | demo.QUIET | environment,
        )  # fmt: skip


def write_results(options: argparse.Namespace) -> None:
    """`variants.json` and `variants.md` of every finished run in `--out`."""
    found = [result(path.parents[1]) for path in sorted(options.out.glob("*/ppo/metrics.jsonl"))]
    stamp = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "machine": machine(),
        "commit": options.commit or git_commit(),
        "test": options.test.name,
    }
    together = seeds_together(options.out)
    (options.out / "variants.json").write_text(
        json.dumps({**stamp, "runs": found, "together": together}, indent=1) + "\n"
    )
    lines = tables(found, together)
    (options.out / "variants.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)


def tables(found: Sequence[dict[str, Any]], together: Sequence[dict[str, Any]]) -> list[str]:
    """The lines of five tables: `looper-eval`'s comparisons, training, every evaluation, seeds by step and
    together."""
    return [
        "| run | SFT | PPO | PPO - SFT, points (95% interval) | exact McNemar p | n | steps | seconds |",
        "|---|---|---|---|---|---|---|---|",
        *map(row, filter(lambda run: "pairs" in run, found)),
        "",
        "| run | steps | solved of the training questions: first 5, last 15 steps | nats of KL, last 15 | "
        "entropy, first 5, last 15 | seconds a step |",
        "|---|---|---|---|---|---|",
        *map(training_row, filter(training, found)),
        "",
        "| run | step | dev | gained | lost | exact McNemar p | sampled | gain, points (95% interval) | p |",
        "|---|---|---|---|---|---|---|---|---|",
        *(dev_row(run["run"], one) for run in found for one in run.get("dev", [])),
        "",
        "| variant, seeds | step | dev, mean | sampled, mean |",
        "|---|---|---|---|",
        *by_step(found),
        "",
        "| seeds together | answers | SFT | PPO | gain, points (95% interval) | paired t p |",
        "|---|---|---|---|---|---|",
        *map(together_row, together),
    ]


def training(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps of a run's curve, without the evaluation before them."""
    return [step for step in run["curve"] if step["step"] and "correct_rate" in step]


def training_row(run: dict[str, Any]) -> str:
    """One line of the table of training."""
    steps = training(run)
    solved, entropy, kl = (
        [statistics.mean(step[name] for step in some) for some in (steps[:5], steps[-15:])]
        for name in ("correct_rate", "entropy", "kl_k1_per_completion")
    )
    seconds = run.get("seconds_median", {}).get("step without eval", "")
    return (
        f"| {run['run']} | {steps[-1]['step']} | {solved[0]:.1%}, {solved[1]:.1%} | {kl[1]:.1f} "
        f"| {entropy[0]:.2f}, {entropy[1]:.2f} | {seconds} |"
    )


def by_step(found: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each variant and step that all its seeds were evaluated at."""
    variants: dict[str, list[dict[int, dict[str, Any]]]] = {}
    for run in found:
        if run.get("dev"):
            evaluations = {one["step"]: one for one in run["dev"]}
            variants.setdefault(run["run"].rpartition("-")[0], []).append(evaluations)
    return [
        f"| {name}, {len(runs)} | {step} | {statistics.mean(run[step]['accuracy'] for run in runs):.1%} | "
        + (f"{statistics.mean(run[step]['sampled'] for run in runs):.1%} |" if "sampled" in one else "|")
        for name, runs in variants.items()
        for step, one in runs[0].items()
        if all(step in run for run in runs)
    ]


def seconds_median(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of a run's steps: the median seconds of each part, and of a step without its evaluation."""
    steps = [line for line in lines if line["step"]]
    if not steps:
        return {}
    parts = dict.fromkeys(part for line in steps for part in line["seconds"])
    found = {
        part: statistics.median(line["seconds"][part] for line in steps if part in line["seconds"])
        for part in parts
    }
    found["step without eval"] = statistics.median(
        line["step_seconds"] - line["seconds"].get("eval", 0.0) for line in steps
    )
    return {part: round(value, 3) for part, value in found.items()}


def result(out: Path) -> dict[str, Any]:
    """What is kept of one run."""
    evaluated: dict[str, Any] = {}
    if (out / "eval/summary.json").is_file():
        summary = json.loads((out / "eval/summary.json").read_text())
        for model in summary["models"]:
            model.pop("place", None)
        evaluated = {name: summary[name] for name in ("models", "pairs", "n")}
        evaluated["chosen"] = json.loads((out / "ppo/result.json").read_text())["from_step"]
    lines = [json.loads(line) for line in (out / "ppo/metrics.jsonl").read_text().splitlines()]
    return {
        "run": out.name,
        "seconds": int((out / "seconds").read_text()) if (out / "seconds").is_file() else None,
        **evaluated,
        "settings": without_paths(tomllib.loads((out / "ppo/config.toml").read_text())["ppo"]),
        "seconds_median": seconds_median(lines),
        "dev": evaluations(out / "ppo/dev.jsonl"),
        "curve": [{key: line[key] for key in CURVE if line.get(key) is not None} for line in lines],
    }


def evaluations(file: Path) -> list[dict[str, Any]]:
    """Every evaluation on the dev questions beside the first, which is of the SFT model."""
    if not file.is_file():
        return []
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [evaluation(lines[0], line) for line in lines]


def evaluation(start: dict[str, Any], line: dict[str, Any]) -> dict[str, Any]:
    """One of them: McNemar's test of the greedy answers, the paired t-test of the sampled ones."""
    table = paired_table(*([digit == "1" for digit in one["solved"]] for one in (start, line)))
    found = {
        "step": line["step"], "accuracy": line["accuracy"],
        "gained": table.only_second, "lost": table.only_first, "p": mcnemar_exact(table),
    }  # fmt: skip
    if samples := line.get("samples"):
        before, now = shares(start, "sampled"), shares(line, "sampled")
        means = paired_means(before, now, smallest=1 / samples)
        gain = (means.difference, means.low, means.high)
        found |= {"samples": samples, "sampled": sum(now) / len(now)}
        found |= {"sampled_gain": gain, "sampled_p": means.p}
    return found


def seeds_together(out: Path) -> list[dict[str, Any]]:
    """Of each variant with several seeds, its last evaluations against the first ones.

    A question counts with its mean over the seeds, so that the test is over questions, not over answers.
    """
    files: dict[str, list[Path]] = {}
    for file in sorted(out.glob("*/ppo/dev.jsonl")):
        files.setdefault(file.parents[1].name.rpartition("-")[0], []).append(file)
    found = []
    for variant, of_seeds in files.items():
        ends = [[json.loads(line) for line in file.read_text().splitlines()] for file in of_seeds]
        if len(ends) < 2:
            continue
        for answers in ("greedy", "sampled"):
            if answers == "sampled" and not ends[0][0].get("samples"):
                continue
            before, after = (
                [sum(of_question) / len(ends) for of_question in zip(*runs, strict=True)]
                for runs in ([shares(lines[end], answers) for lines in ends] for end in (0, -1))
            )
            each = len(ends) * (ends[0][0]["samples"] if answers == "sampled" else 1)
            means = paired_means(before, after, smallest=1 / each)
            found.append({
                "variant": variant, "seeds": len(ends), "answers": answers,
                "sft": sum(before) / len(before), "ppo": sum(after) / len(after), **means._asdict(),
            })  # fmt: skip
    return found


def shares(line: dict[str, Any], answers: str) -> list[float]:
    """Of each dev question, how much of its answers was right in one evaluation."""
    if answers == "greedy":
        return [float(digit) for digit in line["solved"]]
    return [right / line["samples"] for right in line["in_samples"]]


def together_row(one: dict[str, Any]) -> str:
    """One line of the table."""
    gain, low, high = (100 * one[name] for name in ("difference", "low", "high"))
    return (
        f"| {one['variant']}, {one['seeds']} seeds | {one['answers']} | {one['sft']:.1%} | {one['ppo']:.1%} "
        f"| {gain:+.1f} ({low:+.1f}, {high:+.1f}) | {one['p']:.2g} |"
    )


def without_paths(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that say how was trained, not where."""
    return {name: value for name, value in settings.items() if "/" not in str(value)}


def row(run: dict[str, Any]) -> str:
    """One line of the table."""
    accuracy = {model["name"]: f"{100 * model['accuracy']:.1f}%" for model in run["models"]}
    pair = next(pair for pair in run["pairs"] if {pair["a"], pair["b"]} == {"sft", "ppo"})
    low, high = (100 * bound for bound in pair["interval"])
    return (
        f"| {run['run']} | {accuracy['sft']} | {accuracy['ppo']} "
        f"| {100 * pair['difference']:+.1f} ({low:+.1f}, {high:+.1f}) | {pair['p']:.2g} | {run['n']} "
        f"| {run['curve'][-1]['step']} | {run.get('seconds', '')} |"
    )


def dev_row(run: str, one: dict[str, Any]) -> str:
    """One evaluation of a run on its dev questions."""
    accuracy = f"{100 * one['accuracy']:.1f}%"
    row = f"| {run} | {one['step']} | {accuracy} | {one['gained']} | {one['lost']} | {one['p']:.2g} |"
    if "sampled" not in one:
        return row + " | | |"
    gain, low, high = (100 * value for value in one["sampled_gain"])
    return row + f" {one['sampled']:.1%} | {gain:+.1f} ({low:+.1f}, {high:+.1f}) | {one['sampled_p']:.2g} |"


def machine() -> str:
    """The devices that the figures come from."""
    try:
        gpus = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True, text=True, check=True,
        ).stdout.split("\n")  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        gpus = []
    names = ", ".join(filter(None, gpus))
    return f"{platform.machine()}, {os.cpu_count()} cores" + (f", {names}" if names else "")


def git_commit() -> str:
    """Commit of the tree that ran."""
    return subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())

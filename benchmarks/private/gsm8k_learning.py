"""Does PPO make a small model better at GSM8K? SFT at its best, then PPO on renumbered training questions.

    python benchmarks/private/gsm8k_learning.py --model smollm2 --gsm8k train.jsonl --out DIR \
        --devices 0 1 [--runs arm_gated:0 correctness:0] [--jobs 2] [--minutes 60] [--set steps=200 ...]

1. `looper prepare-data`: 80% of the training file to learn from, 20% (dev) to judge by; the test file is
   not touched.
2. `looper sft` on the 80%, with the rate and epochs that best_sft.py found best on dev.
3. renumber.py: the 80% with other numbers. `looper rollouts`, one on each device, asks the SFT model one
   question of each original `--tries` times; kept are all questions of the originals that were solved
   sometimes. With `--tries 0` all are kept: then let PPO choose, `--set skip_equal_groups=true`.
4. ppo_variants.py: for each run a service of its own and `looper ppo` on those. Every dev question is
   answered greedily, and sampled `dev_samples` times, before the first step, every `eval_every` steps and
   after the last. Its tables are the result, `DIR/runs/variants.{json,md}`: each evaluation paired with the
   start.

What is there already is not made again, so a run that was cut short goes on. --minutes is what all of it may
take: PPO gets what the stages before it leave. Decision 0068 says why so.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from looper_schemas.records import Problem, RolloutRecord, read_records, write_records
from looper_trainer.ppo.rollout import pass_rates
from looper_trainer.testing import FakeRewardServer

ROOT = Path(__file__).resolve().parents[2]
KEY = "benchmark"
ON_A_GPU = (
    "--sampler vllm --dtype bfloat16 --vllm-tokens-only true --vllm-servers 2 --vllm-connections 128 "
    "--vllm-max-num-seqs 512 --vllm-max-model-len 1024 --vllm-args '--kv-cache-memory-bytes 8G'"
)
LAST_MINUTES = 1.0  # for the last evaluation and the result


def main(argv: Sequence[str] | None = None) -> int:
    """The four stages."""
    began = time.monotonic()
    options = parse(argv)
    out: Path = options.out
    data, sft, passes, kept = out / "data", out / "sft", out / "passes.jsonl", out / "kept.jsonl"
    train, dev, pool = data / "gsm8k_train.jsonl", data / "gsm8k_dev.jsonl", data / "renumbered.jsonl"
    first = options.devices[0] if options.devices else None
    if not train.is_file():
        looper(None, "prepare-data", "--input", options.gsm8k, "--output", data, "--name", "gsm8k")
    if not sft.is_dir():
        looper(
            first, "sft", "--model", options.model, "--train-file", train, "--output", sft, "--mode", "full",
            "--learning-rate", options.sft_rate, "--epochs", options.sft_epochs, "--batch-size", 32,
            "--gradient-checkpointing", "false",
        )  # fmt: skip
    if not pool.is_file():
        script("gpu/renumber.py", "--solutions", options.gsm8k, "--input", train, "--output", pool)
    if options.tries:
        if not passes.is_file():
            ask(sft, pool, passes, options)
        keep(pool, passes, kept)
    settings = list(options.set)
    if options.minutes:
        in_turn = -(-len(options.runs) // options.jobs)
        left = options.minutes - (time.monotonic() - began) / 60
        settings.append(f"max_minutes={max(1.0, left / in_turn - LAST_MINUTES):.2f}")
    script(
        "private/ppo_variants.py", "--sft", sft, "--train", kept if options.tries else pool,
        "--dev", dev, "--test", dev, "--config", options.config, "--out", out / "runs",
        "--jobs", options.jobs, "--runs", *options.runs,
        *(["--devices", *options.devices, "--service-device", "cuda"] if options.devices else []),
        "--dev-alone", "--commit", options.commit, *(["--set", *settings] if settings else []),
    )  # fmt: skip
    return 0


def ask(sft: Path, questions: Path, passes: Path, options: argparse.Namespace) -> None:
    """`passes`: the SFT model's rollouts of one question of each original, a share of them on each device."""
    devices = options.devices or [None]
    of_original = {original(problem.id): problem for problem in read_records(questions, Problem)}
    asked = list(of_original.values())[: options.asked]
    rollouts = options.rollouts if options.rollouts is not None else ON_A_GPU if options.devices else ""

    def share(number: int) -> Path:
        part, found = (passes.with_name(f"{name}-{number}.jsonl") for name in ("asked", "passes"))
        write_records(part, asked[number :: len(devices)])
        looper(
            devices[number], "rollouts", "--model", sft, "--questions-file", part, "--output", found,
            "--samples-per-question", options.tries, "--max-new-tokens", 200, *shlex.split(rollouts),
            LOOPER_REWARD_URL=judge.url, LOOPER_REWARD_KEY=KEY,
        )  # fmt: skip
        return found

    with FakeRewardServer(mode="correct", key=KEY) as judge, ThreadPoolExecutor(len(devices)) as pool:
        parts = [found.read_text(encoding="utf-8") for found in pool.map(share, range(len(devices)))]
    passes.write_text("".join(parts), encoding="utf-8")


def keep(questions: Path, passes: Path, kept: Path) -> None:
    """`kept`: all questions whose original was solved sometimes, but not always.

    Questions of one original differ in their numbers alone, so that one of them tells for all.
    """
    rates = {original(id_): rate for id_, rate in pass_rates(read_records(passes, RolloutRecord)).items()}
    chosen = [one for one in read_records(questions, Problem) if 0.0 < rates.get(original(one.id), 0.0) < 1.0]
    write_records(kept, chosen)
    originals = len({original(one.id) for one in chosen})
    print(f"{len(chosen)} questions of {originals} originals, of {len(rates)} that were asked", flush=True)


def original(id_: str) -> str:
    """The id of the training question that `id_` was made from."""
    return id_.rsplit("-n", 1)[0]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("model", "gsm8k", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("gsm8k_ppo.toml"))
    parser.add_argument("--sft-rate", default="8e-4")
    parser.add_argument("--sft-epochs", default="4")
    parser.add_argument("--tries", type=int, default=8, help="answers to each; 0: ask none, keep all")
    parser.add_argument("--asked", type=int, help="originals to try the SFT model on; all by default")
    three = [f"arm_gated:{seed}" for seed in range(3)]
    parser.add_argument("--runs", nargs="+", default=three, metavar="VARIANT:SEED", help="of ppo_variants.py")
    parser.add_argument("--devices", nargs="*", default=[], help="GPU numbers")
    parser.add_argument("--jobs", type=int, default=1, help="PPO runs side by side")
    parser.add_argument("--minutes", type=float, help="of the whole, from here")
    parser.add_argument("--rollouts", help="more arguments of looper rollouts, as one text; else for vLLM")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of looper ppo")
    parser.add_argument("--commit", default="")
    return parser.parse_args(argv)


def looper(device: str | None, command: str, *arguments: object, **environment: str) -> None:
    """A public command, in a process of its own; ends this one if it fails."""
    run([sys.executable, "-m", "looper_trainer.cli", command, *arguments], device, environment)


def script(name: str, *arguments: object) -> None:
    """A script of benchmarks/."""
    run([sys.executable, ROOT / "benchmarks" / name, *arguments], None, {})


def run(command: Sequence[object], device: str | None, environment: dict[str, str]) -> None:
    """`command` on `device`, its output shown."""
    visible = {} if device is None else {"CUDA_VISIBLE_DEVICES": device}
    done = subprocess.run([str(word) for word in command], env=os.environ | visible | environment)
    if done.returncode:
        raise SystemExit(done.returncode)  # it has said why


if __name__ == "__main__":
    sys.exit(main())

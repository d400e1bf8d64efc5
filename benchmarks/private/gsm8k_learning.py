"""Does PPO make a small model better at GSM8K? SFT at its best, then PPO on renumbered training questions.

    python benchmarks/private/gsm8k_learning.py --model smollm2 --gsm8k train.jsonl --out DIR \
        --seeds 0 1 2 --devices 0 1 [--jobs 3] [--rollouts "--sampler vllm --dtype bfloat16"] [--set ...]

1. `looper prepare-data`: 80% of the training file to learn from, 20% (dev) to judge by; the test file is
   not touched.
2. `looper sft` on the 80%, with the rate and epochs that best_sft.py found best on dev.
3. renumber.py: the 80% with other numbers; `looper rollouts` asks the SFT model --asked of them four times.
4. ppo_variants.py: for each seed a service of its own and `looper ppo` on the questions that were solved
   sometimes; SFT and PPO answer every dev question. Its tables are the result: `DIR/runs/variants.{json,md}`.

What is there already is not made again, so a run that was cut short goes on. Decision 0068 says why so.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from looper_trainer.testing import FakeRewardServer

ROOT = Path(__file__).resolve().parents[2]
KEY = "benchmark"


def main(argv: Sequence[str] | None = None) -> int:
    """The four stages."""
    options = parse(argv)
    out: Path = options.out
    data, sft, passes = out / "data", out / "sft", out / "passes.jsonl"
    train, dev, renumbered = data / "gsm8k_train.jsonl", data / "gsm8k_dev.jsonl", data / "renumbered.jsonl"
    first = options.devices[0] if options.devices else None
    if not train.is_file():
        looper(None, "prepare-data", "--input", options.gsm8k, "--output", data, "--name", "gsm8k")
    if not sft.is_dir():
        looper(
            first, "sft", "--model", options.model, "--train-file", train, "--output", sft, "--mode", "full",
            "--learning-rate", options.sft_rate, "--epochs", options.sft_epochs, "--batch-size", 32,
            "--gradient-checkpointing", "false",
        )  # fmt: skip
    if not renumbered.is_file():
        script("gpu/renumber.py", "--solutions", options.gsm8k, "--input", train, "--output", renumbered)
    if not passes.is_file():
        with FakeRewardServer(mode="correct", key=KEY) as judge:
            looper(
                first, "rollouts", "--model", sft, "--questions-file", renumbered, "--output", passes,
                "--limit", options.asked, "--samples-per-question", 4, "--max-new-tokens", 200,
                *shlex.split(options.rollouts), LOOPER_REWARD_URL=judge.url, LOOPER_REWARD_KEY=KEY,
            )  # fmt: skip
    script(
        "private/ppo_variants.py", "--sft", sft, "--train", renumbered, "--dev", dev, "--test", dev,
        "--config", options.config, "--out", out / "runs", "--jobs", options.jobs,
        "--runs", *(f"{options.variant}:{seed}" for seed in options.seeds),
        *(["--devices", *options.devices, "--service-device", "cuda", "--eval-batch", 512]
          if options.devices else []),
        "--commit", options.commit, "--set", f"rollouts_file={passes}", *options.set,
    )  # fmt: skip
    return 0


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
    parser.add_argument(
        "--asked", type=int, default=6000, help="renumbered questions to try the SFT model on"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variant", default="arm_gated", help="of ppo_variants.py")
    parser.add_argument("--devices", nargs="*", default=[], help="GPU numbers")
    parser.add_argument("--jobs", type=int, default=1, help="PPO runs side by side")
    parser.add_argument("--rollouts", default="", help="more arguments of looper rollouts, as one text")
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
        sys.exit(done.returncode)  # it has said why


if __name__ == "__main__":
    sys.exit(main())

"""What `looper` can be asked to do: the stages of a run, and the tools around them.

Each entry imports its settings and its code only when it is chosen, so that help needs no training library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from looper_trainer.config import StageConfig


@dataclass(frozen=True)
class Command:
    """A subcommand of `looper`.

    Args:
        summary: one line for the overview.
        examples: command lines for the help, each with what it is good for.
        positional: the field that is given without its name, where there is one.
        from_file: whether its settings may come from a TOML file.
    """

    summary: str
    examples: tuple[tuple[str, str], ...]
    positional: str | None = None
    from_file: bool = True


STAGES = {
    "prepare-data": Command(
        "split GSM8K into a train and a dev file",
        (
            ("looper prepare-data", "GSM8K from the hub to data/"),
            ("looper prepare-data --input my.jsonl --name mine", "your own questions and answers"),
        ),
    ),
    "sft": Command(
        "teach a base model the solution format (supervised fine-tuning)",
        (
            ("looper sft", "an adapter on the default 8B model, merged into checkpoints/sft"),
            ("looper sft --model ./base --mode full --learning-rate 2e-4", "every weight of a small model"),
        ),
    ),
    "rollouts": Command(
        "sample solutions of every question and have them scored",
        (
            ("looper rollouts --limit 512", "four scored solutions of each of 512 questions"),
            ("looper rollouts --limit 512", "the same again goes on where it was interrupted"),
        ),
    ),
    "ppo": Command(
        "train with PPO on the reward service's scores",
        (
            ("looper ppo --config run.toml", "the table [ppo] of a file"),
            ("looper ppo --config run.toml --resume", "go on from the last checkpoint"),
            ("looper ppo --steps 2 --batch-size 4 --mini-batch-size 2", "a quick try"),
        ),
    ),
    "merge": Command(
        "merge a LoRA adapter into a plain model folder",
        (
            (
                "looper merge --adapter checkpoints/ppo_rl/adapter --output my-model",
                "a folder that vLLM serves",
            ),
        ),
    ),
}

TOOLS = {
    "run": Command(
        "run every stage of a file, skipping what is done",
        (
            ("looper run run.toml --plan", "what would be done"),
            ("looper run run.toml", "do it; the same again goes on where it stopped"),
        ),
        positional="file",
        from_file=False,
    ),
    "status": Command(
        "say where every run below a folder stands",
        (("looper status", "this folder"), ("looper status runs/demo", "another")),
        positional="folder",
        from_file=False,
    ),
    "dashboard": Command(
        "follow a run in the browser",
        (
            ("looper dashboard", "the run in checkpoints/ppo_rl"),
            ("looper dashboard runs/a --port 0", "another"),
        ),
        positional="run",
        from_file=False,
    ),
    "watch": Command(
        "write a run's metrics to TensorBoard or W&B",
        (
            ("looper watch --to tensorboard", "while it trains, or afterwards"),
            (
                "looper watch runs/a --to wandb --once",
                "a run that is over, offline",
            ),
        ),
        positional="run",
        from_file=False,
    ),
    "export-rollouts": Command(
        "write rollouts as logs of lm-eval or inspect",
        (("looper export-rollouts --to inspect", "data/ppo_rollouts.jsonl for `inspect view`"),),
        positional="rollouts",
        from_file=False,
    ),
    "doctor": Command(
        "check this machine, its libraries and the reward service",
        (("looper doctor", "each finding with its fix"),),
        from_file=False,
    ),
    "completion": Command(
        "print a completion script for your shell",
        (
            ("looper completion bash > ~/.local/share/bash-completion/completions/looper", ""),
            ('looper completion zsh > "${fpath[1]}/_looper"', ""),
            ("looper completion fish > ~/.config/fish/completions/looper.fish", ""),
        ),
        positional="shell",
        from_file=False,
    ),
}

COMMANDS = {**STAGES, **TOOLS}


def settings_of(name: str) -> type[StageConfig]:
    """The class of a command's settings, imported when it is asked for."""
    match name:
        case "prepare-data":
            from looper_trainer.data import PrepareDataConfig

            return PrepareDataConfig
        case "sft":
            from looper_trainer.sft import SFTStageConfig

            return SFTStageConfig
        case "rollouts":
            from looper_trainer.rollouts import RolloutsConfig

            return RolloutsConfig
        case "ppo":
            from looper_trainer.ppo.config import PPOConfig

            return PPOConfig
        case "merge":
            from looper_trainer.merge import MergeConfig

            return MergeConfig
        case "run":
            from looper_trainer.pipeline import RunConfig

            return RunConfig
        case "status":
            from looper_trainer.status import StatusConfig

            return StatusConfig
        case "dashboard":
            from looper_trainer.dashboard import DashboardConfig

            return DashboardConfig
        case "watch":
            from looper_trainer.watch import WatchConfig

            return WatchConfig
        case "export-rollouts":
            from looper_trainer.integrations.rollout_logs import ExportRolloutsConfig

            return ExportRolloutsConfig
        case "doctor":
            from looper_trainer.doctor import DoctorConfig

            return DoctorConfig
        case "completion":
            from looper_trainer.completion import CompletionConfig

            return CompletionConfig
        case _:
            raise KeyError(name)


def action_of(name: str) -> Callable[[Any], None]:
    """What a command does, imported when it is asked for."""
    match name:
        case "prepare-data":
            from looper_trainer.data import run as run_prepare_data

            return run_prepare_data
        case "sft":
            from looper_trainer.sft import run as run_sft

            return run_sft
        case "rollouts":
            from looper_trainer.rollouts import run as run_rollouts

            return run_rollouts
        case "ppo":
            from looper_trainer.ppo.loop import run as run_ppo

            return run_ppo
        case "merge":
            from looper_trainer.merge import run as run_merge

            return run_merge
        case "run":
            from looper_trainer.pipeline import run as run_run

            return run_run
        case "status":
            from looper_trainer.status import run as run_status

            return run_status
        case "dashboard":
            from looper_trainer.dashboard import run as run_dashboard

            return run_dashboard
        case "watch":
            from looper_trainer.watch import run as run_watch

            return run_watch
        case "export-rollouts":
            from looper_trainer.integrations.rollout_logs import run as run_export_rollouts

            return run_export_rollouts
        case "doctor":
            from looper_trainer.doctor import run as run_doctor

            return run_doctor
        case "completion":
            from looper_trainer.cli import print_completion

            return print_completion
        case _:
            raise KeyError(name)

"""`looper run CONFIG.toml`: every stage that the file has a table for, in order, skipping what is done.

    looper run run.toml            # prepare-data, sft, rollouts, ppo (as far as the file has their tables)
    looper run run.toml --plan     # says what it would do

A stage is done when its result is there, and its result was made with the settings that the file gives now;
if they differ, the run stops and says so, since a result that is silently stale is worse than none. A PPO run
that was interrupted is resumed. Each stage is a process of its own: its memory is free again when it ends.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from looper_trainer.config import StageConfig, differing_from, load_config, read_toml
from looper_trainer.errors import ConfigError, UserError

ORDER = ("prepare-data", "sft", "rollouts", "ppo")
Standing = Literal["done", "to do", "interrupted", "stale"]

# Settings that may differ from those a result was made with, because they do not change it.
FREE = frozenset(
    {
        "resume",
        "device",
        "log_every",
        "save_every",
        "keep_checkpoints",
        "give_up_after_s",
        "sample_batch_size",
    }
    | {
        "micro_batch_tokens",
        "logit_chunk_tokens",
        "activation_checkpointing",
        "torch_compile",
        "run_id",
        "merge",
    }
)


class RunConfig(StageConfig):
    """Run every stage of a file, skipping what is done."""

    file: Annotated[Path, Field(description="TOML file with a table for each stage")]
    plan: Annotated[bool, Field(description="say what would be done, and do nothing")] = False
    until: Annotated[
        Literal["prepare-data", "sft", "rollouts", "ppo"], Field(description="last stage to run")
    ] = "ppo"


@dataclass(frozen=True)
class Step:
    """One stage with its settings, where its result is, and how it stands."""

    name: str
    config: Any
    result: Path
    standing: Standing
    reason: str = ""


def run(config: RunConfig) -> None:
    """Run what is not done.

    Raises:
        ConfigError: the file cannot be used, or a result was made with other settings.
        UserError: a stage failed; its own message stands above.
    """
    began = time.monotonic()
    steps = list(plan(config.file, config.until))
    for number, step in enumerate(steps, start=1):
        title = f"[{number}/{len(steps)}] {step.name}"
        if step.standing == "done":
            print(f"{title}: done, {step.result} is there", flush=True)
            continue
        if step.standing == "stale":
            raise ConfigError(f"{step.name}: {step.result} {step.reason}; remove it, or restore the settings")
        print(f"{title}: {step.standing} -> {step.result}", flush=True)
        if config.plan:
            continue
        started = time.monotonic()
        code = subprocess.run(command(step, config.file), check=False).returncode
        if code:
            raise UserError(
                f"{step.name} ended with exit code {code}; mend what it says above, then run this again"
            )
        print(f"{title}: {time.monotonic() - started:.0f} s", flush=True)
    if not config.plan:
        print(f"run: complete in {time.monotonic() - began:.0f} s; {steps[-1].result} is the result")


def command(step: Step, file: Path) -> list[str]:
    """The command line of one stage."""
    words = [sys.executable, "-m", "looper_trainer.cli", step.name, "--config", str(file)]
    return [*words, "--resume"] if step.standing == "interrupted" else words


def plan(file: Path, until: str = "ppo") -> Iterator[Step]:
    """The stages that `file` has tables for, in order, and how each stands.

    Raises:
        ConfigError: unreadable file, unknown table or setting, no stage in it.
    """
    tables = read_toml(file)
    names = [name for name in ORDER[: ORDER.index(until) + 1] if name.replace("-", "_") in tables]
    if not names:
        wanted = ", ".join(f"[{name.replace('-', '_')}]" for name in ORDER)
        raise ConfigError(f"{file}: holds no stage to run; give it one or more of the tables {wanted}")
    fresh = False  # once a stage is to be done, what later ones made of its old result is stale
    for name in names:
        step = STANDINGS[name](file)
        if fresh and step.standing == "done":
            step = Step(step.name, step.config, step.result, "stale", "was made from an earlier result")
        fresh = fresh or step.standing != "done"
        yield step


def _prepare_data(file: Path) -> Step:
    from looper_trainer.data import PrepareDataConfig

    config = load_config(PrepareDataConfig, file, {})
    result = config.output / f"{config.name}_dev.jsonl"
    saved = config.output / f"{config.name}_config.toml"
    return _step("prepare-data", config, result, result.exists(), saved)


def _sft(file: Path) -> Step:
    from looper_trainer.sft import SFTStageConfig

    config = load_config(SFTStageConfig, file, {})
    partial = config.output.with_name(config.output.name + ".partial")
    interrupted = any(partial.glob("checkpoint-*"))
    done = (config.output / "config.json").exists()
    return _step("sft", config, config.output, done, config.output / "config.toml", interrupted)


def _rollouts(file: Path) -> Step:
    from looper_trainer.rollouts import RolloutsConfig

    config = load_config(RolloutsConfig, file, {})
    saved = config.output.with_name(f"{config.output.stem}_config.toml")
    # An interrupted one goes on by itself when it is started again.
    return _step("rollouts", config, config.output, config.output.exists(), saved)


def _ppo(file: Path) -> Step:
    from looper_trainer.ppo.config import PPOConfig

    config = load_config(PPOConfig, file, {})
    done = config.output / ("merged/config.json" if config.merge else "result.json")
    interrupted = not done.exists() and any(config.output.glob("checkpoints/step_*/state.json"))
    return _step("ppo", config, config.output, done.exists(), config.output / "config.toml", interrupted)


STANDINGS: dict[str, Callable[[Path], Step]] = {
    "prepare-data": _prepare_data,
    "sft": _sft,
    "rollouts": _rollouts,
    "ppo": _ppo,
}


def _step(
    name: str, config: StageConfig, result: Path, done: bool, saved: Path, interrupted: bool = False
) -> Step:
    if not done:
        return Step(name, config, result, "interrupted" if interrupted else "to do")
    try:
        differing = [key for key in differing_from(config, saved) if key not in FREE]
    except ConfigError:
        return Step(name, config, result, "stale", "does not say which settings it was made with")
    if differing:
        return Step(name, config, result, "stale", f"was made with another {', '.join(differing)}")
    return Step(name, config, result, "done")

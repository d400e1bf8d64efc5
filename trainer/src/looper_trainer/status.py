"""`looper status`: where every stage and every run below a folder stands, from the files alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from looper_trainer.config import StageConfig
from looper_trainer.errors import DataError
from looper_trainer.health import alarms
from looper_trainer.run_folder import Row, last_write, read_metrics, read_settings

_SHOWN = (
    ("reward_mean", "reward", "{:+.3f}"),
    ("correct_rate", "correct", "{:.1%}"),
    ("dev_accuracy", "dev", "{:.1%}"),
    ("kl_k1_per_completion", "kl", "{:.3f}"),
    ("entropy", "entropy", "{:.3f}"),
    ("loss", "loss", "{:.4f}"),
)
ALIVE_S = 120.0


class StatusConfig(StageConfig):
    """Say where every run below a folder stands."""

    folder: Annotated[Path, Field(description="where to look")] = Path()
    depth: Annotated[int, Field(ge=1, le=6, description="folders down to look")] = 4


def run(config: StatusConfig) -> None:
    """Print a line for each data file and each run.

    Raises:
        DataError: no such folder, or nothing of Looper's in it.
    """
    if not config.folder.is_dir():
        raise DataError(f"{config.folder}: no such folder")
    lines = [*_data(config), *_runs(config)]
    if not lines:
        raise DataError(
            f"{config.folder}: holds no data and no run of Looper; begin with `looper prepare-data`"
        )
    print("\n".join(lines))


def _found(config: StatusConfig, pattern: str) -> list[Path]:
    places = [p for n in range(config.depth) for p in config.folder.glob("*/" * n + pattern)]
    return sorted(place for place in places if not any(part.startswith(".") for part in place.parts))


def _data(config: StatusConfig) -> Iterator[str]:
    for pattern in ("*_train.jsonl", "*_dev.jsonl", "*rollouts.jsonl"):
        for file in _found(config, pattern):
            yield f"data      {file}: {_lines(file)} questions"
    for file in _found(config, "*rollouts.jsonl.partial"):
        yield f"rollouts  {file}: running or interrupted, {_lines(file)} questions; the same command goes on"


def _lines(file: Path) -> int:
    with file.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


def _runs(config: StatusConfig) -> Iterator[str]:
    for metrics in _found(config, "metrics.jsonl"):
        folder = metrics.parent
        chunk = read_metrics(folder)
        rows, settings = chunk.rows, read_settings(folder)
        yield f"run       {folder}: {describe(rows, settings, folder)}"
        if chunk.skipped:
            yield f"          warning: {chunk.complaint}"
        written = last_write(folder)
        steps = settings.get("steps")
        silent = None if written is None else time.time() - written
        for alarm in alarms(rows, silent, steps if isinstance(steps, int) else None):
            yield f"          {alarm.level}: {alarm.text}"


def describe(rows: list[Row], settings: dict[str, Any], folder: Path) -> str:
    """One line on a run: its step, whether it is going on, and its last figures."""
    if not rows:
        return "has not logged a step yet"
    last: Row = {}
    for row in rows:
        last |= {key: value for key, value in row.items() if isinstance(value, int | float)}
    steps = settings.get("steps")
    parts = [f"step {rows[-1]['step']}" + (f" of {steps}" if isinstance(steps, int) else "")]
    written = last_write(folder)
    whole = (folder / "training_data.json").exists()  # the last thing that SFT writes
    if whole or (isinstance(steps, int) and rows[-1]["step"] >= steps):
        parts.append("complete")
    elif written is not None:
        silent = time.time() - written
        parts.append("running" if silent < ALIVE_S else f"silent for {_duration(silent)}")
    shown = [f"{label} {form.format(last[key])}" for key, label, form in _SHOWN if key in last]
    return ", ".join([*parts, *shown])


def _duration(seconds: float) -> str:
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} days"

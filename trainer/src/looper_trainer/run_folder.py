"""A run as its folder tells it: metrics as they grow, the latest trajectories, the settings.

Reads only, and copes with a run that is being written: a line that is not whole yet is left for next time,
and a file that a resume has cut is read again from its beginning.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from looper_schemas.records import RecordError, RolloutRecord, read_records
from looper_trainer.errors import DataError

METRICS = "metrics.jsonl"
Row = dict[str, Any]


@dataclass(frozen=True)
class Chunk:
    """Rows that were read, where the next read goes on (a byte offset), and whether the file began anew.

    `skipped` lines are no rows: another program's, or what a killed run left half-written.
    """

    rows: list[Row]
    offset: int
    restarted: bool
    skipped: int = 0

    @property
    def complaint(self) -> str:
        """What to say of the skipped lines; empty where there are none."""
        lines = "line" if self.skipped == 1 else "lines"
        return f"skipped {self.skipped} {lines} of {METRICS}: not a run's" if self.skipped else ""


def require_run(folder: Path) -> Path:
    """`folder` itself, once it is known to exist; a run that has not begun to write may be empty.

    Raises:
        DataError: there is no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; name the --output of a `looper ppo` or `looper sft` run")
    return folder


def read_metrics(folder: Path, offset: int = 0) -> Chunk:
    """The whole rows of the run's metrics behind `offset`."""
    file = folder / METRICS
    try:
        size = file.stat().st_size
        restarted = offset > size
        start = 0 if restarted else offset
        with file.open("rb") as lines:
            lines.seek(start)
            content = lines.read()
    except OSError:
        return Chunk([], 0, offset > 0)
    whole = content[: content.rfind(b"\n") + 1]
    read = [_row(line) for line in whole.splitlines() if line.strip()]
    rows = [row for row in read if row is not None]
    return Chunk(rows, start + len(whole), restarted, len(read) - len(rows))


def _row(line: bytes) -> Row | None:
    """The row in `line`: a whole `step`, plain values, and numbers under `seconds`; None where it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    seconds = row.get("seconds", {})
    if not isinstance(seconds, dict) or not all(isinstance(one, int | float) for one in seconds.values()):
        return None
    plain = not any(isinstance(value, list | dict) for key, value in row.items() if key != "seconds")
    return row if plain else None


def last_write(folder: Path) -> float | None:
    """When the run's metrics were last written to, in seconds since the epoch; None before they exist."""
    try:
        return (folder / METRICS).stat().st_mtime
    except OSError:
        return None


def read_settings(folder: Path) -> dict[str, Any]:
    """The resolved settings beside the result: the one table of `config.toml`, or nothing."""
    try:
        document = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return next((dict(table) for table in document.values() if isinstance(table, dict)), {})


def read_trajectories(folder: Path, limit: int = 8) -> tuple[int | None, list[dict[str, Any]]]:
    """The newest step with trajectories, and up to `limit` of its questions with all their completions.

    Questions are spread from the lowest mean reward to the highest; those without a score come first.
    """
    for file in sorted((folder / "trajectories").glob("step_*.jsonl"), reverse=True):
        try:
            records = read_records(file, RolloutRecord)
        except RecordError:
            continue  # being written, or damaged: the one before it is whole
        records.sort(key=_mean_reward)
        wanted = min(limit, len(records))
        chosen = [records[round(i * (len(records) - 1) / max(wanted - 1, 1))] for i in range(wanted)]
        return int(file.stem.removeprefix("step_")), [_shown(record) for record in chosen]
    return None, []


def _mean_reward(record: RolloutRecord) -> float:
    rewards = [t.reward for t in record.trajectories if t.reward is not None]
    return sum(rewards) / len(rewards) if rewards else float("-inf")


def _shown(record: RolloutRecord) -> dict[str, Any]:
    scores = record.scores.model_dump() if record.scores else {}
    return {
        "id": record.id,
        "question": record.question,
        "gold": record.gold_answer,
        "scores": scores,
        "completions": [
            {
                "output": trajectory.output,
                "answer": trajectory.final_answer,
                "reward": trajectory.reward,
                "tokens": trajectory.tokens_out,
            }
            for trajectory in record.trajectories
        ],
    }


def seconds_by_part(rows: Sequence[Row], last: int = 20) -> dict[str, float]:
    """Mean seconds of each part of a step, over the `last` rows that have them; the longest first."""
    timed = [row["seconds"] for row in rows if isinstance(row.get("seconds"), dict)][-last:]
    names = {name for seconds in timed for name in seconds}
    means = {name: sum(s.get(name) or 0.0 for s in timed) / len(timed) for name in names}
    return dict(sorted(means.items(), key=lambda item: -item[1]))

"""What a run writes while it goes: metrics, trajectories, and progress on the console."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from looper_schemas.records import RolloutRecord, write_records

_SHOWN = (
    ("reward_mean", "reward", "{:+.3f}"),
    ("correct_rate", "correct", "{:.1%}"),
    ("kl_k1_per_completion", "kl", "{:.3f}"),
    ("entropy", "entropy", "{:.3f}"),
    ("clip_fraction", "clipped", "{:.1%}"),
    ("explained_variance", "explained", "{:+.2f}"),
    ("length_mean", "tokens", "{:.0f}"),
    ("dev_accuracy", "dev", "{:.1%}"),
    ("dev_gained", "gained", "{}"),
    ("dev_lost", "lost", "{}"),
    ("dev_sampled_accuracy", "sampled", "{:.1%}"),
)

_RECENT = 20  # steps whose mean says how long another one takes; evaluations are among them


class RunLog:
    """`metrics.jsonl`, `dev.jsonl` and `trajectories/` in `output`; a progress bar on a terminal, plain lines
    elsewhere.

    Args:
        output: folder of the run.
        steps: steps the run will have.
        start: completed steps of a resumed run; whatever the files say of later ones is removed, since they
            come again. None for a new one, which begins with what it is before the first step.
        silent: write and show nothing: another process does.
    """

    def __init__(
        self,
        output: Path,
        steps: int,
        start: int | None,
        console: Console | None = None,
        silent: bool = False,
    ) -> None:
        self.output = output
        self.metrics_file = output / "metrics.jsonl"
        self.dev_file = output / "dev.jsonl"
        self._dev_start = ""  # which questions were solved before the first step
        self.history: list[dict[str, Any]] = []  # the metrics of every step so far
        self.console = console or Console()
        self._silent = silent
        self._steps = steps
        if not silent:
            self._keep_until(-1 if start is None else start)
        self._progress = Progress(
            TextColumn("ppo"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=silent or not self.console.is_terminal,
        )
        self._task = self._progress.add_task("ppo", total=steps, completed=start or 0)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, message: str) -> None:
        """One line for the user."""
        if self._silent:
            return
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Append one line to the metrics and show the main figures. What is not finite is written as null."""
        step = int(metrics["step"])
        plain = {key: _finite(value) for key, value in metrics.items()}
        if not self._silent:
            with self.metrics_file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(plain) + "\n")
        self.history.append(plain)
        shown = [
            f"{label} {form.format(plain[key])}" for key, label, form in _SHOWN if plain.get(key) is not None
        ]
        if seconds := metrics.get("step_seconds"):
            shown.append(f"{seconds:.1f} s")
        self.say(f"step {step}/{self._steps}  " + "  ".join(shown + self._left(step)))
        self._progress.update(self._task, completed=step)

    def _left(self, step: int) -> list[str]:
        """How long the steps to come will take, by the last ones; nothing before the first."""
        recent = [row["step_seconds"] for row in self.history[-_RECENT:] if row.get("step_seconds")]
        if not recent or step >= self._steps:
            return []
        left = (self._steps - step) * sum(recent) / len(recent)
        return [f"at most {timedelta(seconds=round(left))} left"]

    def dev(
        self, step: int, solved: Sequence[bool], in_samples: Sequence[int] = (), samples: int = 0
    ) -> dict[str, float]:
        """Keep which dev questions were solved, and say how many, also against the start: a paired test of
        any two evaluations needs no more than that file. `in_samples` says of each question in how many of
        `samples` more answers it was solved.
        """
        digits = "".join("01"[right] for right in solved)
        accuracy = sum(solved) / len(solved)
        if not self._silent:
            line = {"step": step, "accuracy": accuracy, "solved": digits}
            if samples:
                line |= {"samples": samples, "in_samples": list(in_samples)}
            with self.dev_file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(line) + "\n")
        if not step:
            self._dev_start = digits
        found = {"dev_accuracy": accuracy}
        if samples:
            found["dev_sampled_accuracy"] = sum(in_samples) / (samples * len(in_samples))
        if step and len(self._dev_start) == len(digits):
            pairs = list(zip(self._dev_start, digits, strict=True))
            found |= {"dev_gained": pairs.count(("0", "1")), "dev_lost": pairs.count(("1", "0"))}
        return found

    def trajectories(self, step: int, records: Iterable[RolloutRecord]) -> None:
        """Write every trajectory of a step."""
        write_records(self._trajectory_file(step), records)

    def _trajectory_file(self, step: int) -> Path:
        return self.output / "trajectories" / f"step_{step:05d}.jsonl"

    def _keep_until(self, start: int) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        self.history = _cut(self.metrics_file, start)
        evaluations = _cut(self.dev_file, start)
        if evaluations and evaluations[0]["step"] == 0:
            self._dev_start = str(evaluations[0]["solved"])
        for path in (self.output / "trajectories").glob("step_*.jsonl"):
            if path > self._trajectory_file(start):
                path.unlink()


def _cut(file: Path, start: int) -> list[dict[str, Any]]:
    """Remove the lines of `file` that are of steps after `start`; returns what is left."""
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if _step_of(line) <= start]
    partial = file.with_name(file.name + ".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(file)
    return [json.loads(line) for line in kept]


def _step_of(line: str) -> float:
    """The step of a line; infinite for one that a kill cut short."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Stopwatch:
    """Seconds by part of a step."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._since = time.perf_counter()

    def elapsed(self) -> float:
        """Seconds since the watch was made, to the millisecond."""
        return round(time.perf_counter() - self._since, 3)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time spent inside to `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def rounded(self) -> dict[str, float]:
        """Seconds of each part, to the millisecond."""
        return {name: round(value, 3) for name, value in self.seconds.items()}

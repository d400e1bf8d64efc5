"""How far an evaluation is: a bar for each task on a terminal, a line now and then where there is none."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

EVERY_S = 5.0
_TELLING = (
    20  # a twentieth of the work tells the pace; an engine that asks all at once ends the first ones late
)
Report = Callable[[int], None]
"""Told how much of a task is done: first what was there before, then each time there is more."""


@contextmanager
def shown(console: Console) -> Iterator[Callable[[str, int], Report]]:
    """Makes a task of a name and a total; each is reported on for as long as the context lasts."""
    if not console.is_terminal:
        yield lambda name, total: Lines(name, total, console).report
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:

        def task(name: str, total: int) -> Report:
            number = progress.add_task(name, total=total)
            return lambda done: progress.update(number, completed=done)

        yield task


class Lines:
    """One task in plain lines: the first and the last report, and in between one every `EVERY_S` seconds.

    Args:
        clock: seconds, for the pace and the time that is left.
    """

    def __init__(
        self, name: str, total: int, console: Console, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name, self.total, self.console, self.clock = name, total, console, clock
        self.before: int | None = None
        self.began = self.said = 0.0

    def report(self, done: int) -> None:
        """Say it, if it is time to."""
        now = self.clock()
        first = self.before is None
        if self.before is None:
            self.before, self.began = done, now
        elif done < self.total and now - self.said < EVERY_S:
            return
        self.said = now
        line = f"{self.name}: {done}/{self.total}"
        fresh, elapsed = done - self.before, now - self.began
        if not first and done == self.total:
            line += f" in {timedelta(seconds=round(elapsed))}"
        elif fresh * _TELLING >= self.total - self.before > 0:
            line += f", {timedelta(seconds=round(elapsed / fresh * (self.total - done)))} left"
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

"""The line of a step says how long the rest will take, also where there is no terminal."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from looper_trainer.ppo.log import RunLog


def lines_of(folder: Path, steps: int, start: int, *rows: dict[str, Any]) -> list[str]:
    out = io.StringIO()
    with RunLog(folder, steps, start, console=Console(file=out)) as log:
        for row in rows:
            log.step(row)
    return [line.strip() for line in out.getvalue().splitlines()]


def test_each_step_says_what_is_left_by_the_mean_of_the_last_steps(tmp_path: Path) -> None:
    first = {"step": 0, "dev_accuracy": 0.25}
    taken = [{"step": n, "step_seconds": seconds} for n, seconds in ((1, 10.0), (2, 30.0), (3, 20.0))]
    assert lines_of(tmp_path, 5, 0, first, *taken) == [
        "step 0/5  dev 25.0%",
        "step 1/5  10.0 s  at most 0:00:40 left",
        "step 2/5  30.0 s  at most 0:01:00 left",
        "step 3/5  20.0 s  at most 0:00:40 left",
    ]
    # A resumed run knows the pace of the steps before, and nothing is left after the last.
    assert lines_of(tmp_path, 5, 3, {"step": 4, "step_seconds": 20.0}, {"step": 5, "step_seconds": 20.0}) == [
        "step 4/5  20.0 s  at most 0:00:20 left",
        "step 5/5  20.0 s",
    ]

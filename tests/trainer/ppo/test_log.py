"""The line of a step says how long the rest will take, also where there is no terminal."""

from __future__ import annotations

import io
import json
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


def test_an_evaluation_is_kept_question_by_question_and_compared_with_the_start(tmp_path: Path) -> None:
    with RunLog(tmp_path, 9, 0) as log:
        assert log.dev(0, [True, False, False, True]) == {"dev_accuracy": 0.5}
        assert log.dev(3, [True, True, True, False]) == {
            "dev_accuracy": 0.75, "dev_gained": 2, "dev_lost": 1,
        }  # fmt: skip
    with (tmp_path / "dev.jsonl").open("a") as file:
        file.write('{"step": 6, "accuracy": 0.25, "solv')  # a kill cut it short
    with RunLog(tmp_path, 9, 5) as log:  # resumed from step 5
        assert log.dev(6, [False, False, False, True])["dev_lost"] == 1
    kept = [json.loads(line) for line in (tmp_path / "dev.jsonl").read_text().splitlines()]
    assert [(row["step"], row["solved"]) for row in kept] == [(0, "1001"), (3, "1110"), (6, "0001")]
    with RunLog(tmp_path, 9, 2) as log:  # a run that goes back forgets what came after
        pass
    assert len((tmp_path / "dev.jsonl").read_text().splitlines()) == 1
    with RunLog(
        tmp_path, 9, None
    ):  # a new one forgets all: the run before it was killed before its first save
        pass
    assert not (tmp_path / "dev.jsonl").read_text()


def test_samples_of_the_dev_questions_are_kept_beside_the_greedy_answers(tmp_path: Path) -> None:
    with RunLog(tmp_path, 9, 0) as log:
        found = log.dev(0, [True, False, False], [4, 1, 0], 4)
    assert found == {"dev_accuracy": 1 / 3, "dev_sampled_accuracy": 5 / 12}
    (line,) = map(json.loads, (tmp_path / "dev.jsonl").read_text().splitlines())
    assert (line["solved"], line["samples"], line["in_samples"]) == ("100", 4, [4, 1, 0])

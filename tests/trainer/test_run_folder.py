"""A run's folder is read while it is being written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from looper_schemas.records import RolloutRecord, Trajectory, write_records
from looper_trainer.errors import DataError
from looper_trainer.run_folder import (
    read_metrics,
    read_settings,
    read_trajectories,
    require_run,
    seconds_by_part,
)


def lines(*steps: int) -> str:
    return "".join(json.dumps({"step": step}) + "\n" for step in steps)


def test_rows_come_once_and_a_line_that_is_not_whole_comes_later(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert read_metrics(tmp_path).rows == []
    file.write_text(lines(1, 2) + '{"step": 3', encoding="utf-8")
    first = read_metrics(tmp_path)
    assert [row["step"] for row in first.rows] == [1, 2]
    file.write_text(lines(1, 2, 3, 4), encoding="utf-8")
    second = read_metrics(tmp_path, first.offset)
    assert [row["step"] for row in second.rows] == [3, 4]
    assert not second.restarted


def test_a_file_that_a_resume_has_cut_is_read_from_its_beginning(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(lines(1, 2, 3), encoding="utf-8")
    offset = read_metrics(tmp_path).offset
    (tmp_path / "metrics.jsonl").write_text(lines(1), encoding="utf-8")
    again = read_metrics(tmp_path, offset)
    assert (again.restarted, [row["step"] for row in again.rows]) == (True, [1])


def test_lines_that_are_no_rows_are_skipped_and_counted(tmp_path: Path) -> None:
    foreign = [
        '{"step": 1, "rew{"step": 2, "reward_mean": 0.5}',  # killed within a line, and begun again
        '{"step": 3, "reward_mean": [0.1, 0.2]}',
        '{"step": 3, "seconds": {"sample": null}}',
        '{"step": 3, "seconds": 4.5}',
        '{"step": "three"}',
        '{"step": true}',
        '{"loss": 1.0}',
        "[3]",
        "\ufffd" + "[" * 100_000,
        "[" * 100_000,
    ]
    text = "\n".join([*foreign[:5], '{"step": 7, "scorer_id": "s", "s_wm": null}', *foreign[5:], "", ""])
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    chunk = read_metrics(tmp_path)
    assert [row["step"] for row in chunk.rows] == [7]
    assert chunk.skipped == len(foreign)


def record(name: str, *rewards: float | None) -> RolloutRecord:
    trajectories = tuple(Trajectory(output="o", final_answer="1", reward=reward) for reward in rewards)
    return RolloutRecord(id=name, question="q", gold_answer="1", trajectories=trajectories, policy="p")


def test_questions_are_shown_from_the_unscored_to_the_best(tmp_path: Path) -> None:
    records = [record("best", 1.0, 0.5), record("none", None, None), record("worst", -0.5, -0.5)]
    write_records(tmp_path / "trajectories/step_00001.jsonl", records[:1])
    write_records(tmp_path / "trajectories/step_00002.jsonl", records)
    step, questions = read_trajectories(tmp_path)
    assert (step, [question["id"] for question in questions]) == (2, ["none", "worst", "best"])
    (tmp_path / "trajectories/step_00003.jsonl").write_text("{", encoding="utf-8")
    assert read_trajectories(tmp_path)[0] == 2
    assert [q["id"] for q in read_trajectories(tmp_path, limit=2)[1]] == ["none", "best"]


def test_seconds_are_means_of_the_last_steps_longest_first() -> None:
    rows = [{"step": n, "seconds": {"sample": 1.0, "update": float(n)}} for n in range(1, 31)]
    assert seconds_by_part(rows) == {"update": pytest.approx(20.5), "sample": pytest.approx(1.0)}
    assert seconds_by_part([{"step": 1}]) == {}


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        require_run(tmp_path / "absent")
    assert read_settings(tmp_path) == {}
    assert read_trajectories(tmp_path) == (None, [])

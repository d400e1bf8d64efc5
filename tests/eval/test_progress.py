"""Where there is no terminal, progress is lines with the time that is left, by the pace of this run."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from looper_eval.cli import main
from looper_eval.progress import Lines, shown


def test_lines_come_now_and_then_and_answers_of_an_earlier_run_do_not_quicken_the_pace() -> None:
    out = io.StringIO()
    now = 100.0
    lines = Lines("base", 100, Console(file=out, width=200), clock=lambda: now)
    lines.report(20)  # there before
    for seconds, done in ((2.0, 21), (6.0, 22), (11.0, 40), (12.0, 60), (16.0, 70), (17.0, 100)):
        now = 100.0 + seconds
        lines.report(done)
    assert out.getvalue().splitlines() == [
        "base: 20/100",
        "base: 22/100",  # two of eighty tell nothing yet
        "base: 40/100, 0:00:33 left",  # 20 in 11 s, so 60 take 33 s
        "base: 70/100, 0:00:10 left",  # 50 in 16 s, so 30 take 9.6 s
        "base: 100/100 in 0:00:17",
    ]


def test_a_finished_task_is_one_line() -> None:
    out = io.StringIO()
    with shown(Console(file=out)) as task:
        task("base", 7)(7)
    assert out.getvalue() == "base: 7/7\n"


def test_a_terminal_has_a_bar_and_the_time_left() -> None:
    out = io.StringIO()
    with shown(Console(file=out, force_terminal=True, width=100)) as task:
        report = task("base", 8)
        report(0)
        report(2)
    assert "2/8" in out.getvalue()
    assert "\r" in out.getvalue() or "\x1b[" in out.getvalue()


def test_a_run_without_a_terminal_says_how_far_each_model_is(
    tiny_models: tuple[Path, Path], dataset_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["run", "--model", f"one={tiny_models[0]}", "--model", f"two={tiny_models[1]}"]
    call += ["--dataset", str(dataset_file), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*call, "--max-new-tokens", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith(("one: ", "two: "))][::2] == ["one: 0/12", "two: 0/12"]
    assert sum("12/12 in 0:00:" in line for line in lines) == 2

"""A run's metrics in TensorBoard's and W&B's own files, read back by their own readers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from looper_trainer.cli import main
from looper_trainer.watch import figures

ROWS = [
    {"step": 0, "dev_accuracy": 0.25},
    {"step": 1, "reward_mean": -0.5, "s_path": None, "critic_only": False, "seconds": {"sample": 1.5}},
    {"step": 2, "reward_mean": 0.75, "scorer_id": "x", "seconds": {"sample": 2.5}},
]


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    (folder / "config.toml").write_text("[ppo]\nsteps = 2\n", encoding="utf-8")
    return folder


def test_what_is_not_a_number_is_left_out() -> None:
    row = {"step": 3, "a": 1, "b": None, "c": math.nan, "d": "text", "seconds": {"x": 2}}
    assert dict(figures(row)) == {"a": 1.0, "seconds/x": 2.0}


def test_tensorboard_reads_the_figures(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert main(["watch", str(run_folder), "--to", "tensorboard"]) == 0
    assert "watch: 3 rows to" in capsys.readouterr().out
    events = accumulator.EventAccumulator(str(run_folder / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward_mean")] == [(1, -0.5), (2, 0.75)]
    assert [(e.step, e.value) for e in events.Scalars("seconds/sample")] == [(1, 1.5), (2, 2.5)]
    assert [(e.step, e.value) for e in events.Scalars("dev_accuracy")] == [(0, 0.25)]


def test_a_line_that_is_no_row_is_skipped_and_said(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    with (run_folder / "metrics.jsonl").open("a", encoding="utf-8") as out:
        out.write('{"step": 2, "seconds": {"sample": "long"}}\n')
    assert main(["watch", str(run_folder), "--once"]) == 0
    assert "watch: 3 rows to" in (shown := capsys.readouterr().out)
    assert "watch: skipped 1 line of metrics.jsonl" in shown


@pytest.mark.slow
def test_wandb_writes_an_offline_run(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert main(["watch", str(run_folder), "--to", "wandb"]) == 0
    (log,) = run_folder.glob("wandb/wandb/offline-run-*/run-*.wandb")
    content = log.read_bytes()
    assert b"reward_mean" in content
    assert b"seconds/sample" in content


@pytest.mark.parametrize("library", ["tensorboard", "wandb"])
def test_a_missing_library_is_named(run_folder: Path, library: str) -> None:
    program = (
        f"import sys\nsys.modules[{library!r}] = None\nfrom looper_trainer.cli import main\n"
        f"sys.exit(main(['watch', sys.argv[1], '--to', {library!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(run_folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == f"error: this needs {library}; run: pip install {library}\n"

"""Every stage through the public commands, at the size of a test; every part is the real one."""

import json
import subprocess
import sys

import pytest

from looper_schemas.records import EvalRecord, RolloutRecord, read_records

from .conftest import ROOT, environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def demo(out, *extra):
    command = [
        sys.executable, ROOT / "scripts/demo/run.py", "--config", ROOT / "tests/e2e/short.toml", "--out", out,
        "--sums", "5", "--eval-limit", "24", *extra,
    ]  # fmt: skip
    return subprocess.run(
        [str(word) for word in command],
        cwd=out.parent,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_whole_journey_with_the_private_service(tmp_path):
    out = tmp_path / "demo"
    done = demo(out, "--service", f"{sys.executable} {ROOT / 'scripts/demo/private_service.py'}")
    assert done.returncode == 0, done.stdout + done.stderr

    rollouts = read_records(out / "data/ppo_rollouts.jsonl", RolloutRecord)
    assert len(rollouts) == 12
    assert {record.scorer_id for record in rollouts} == {rollouts[0].scorer_id}
    assert all(trajectory.reward is not None for record in rollouts for trajectory in record.trajectories)
    assert len({trajectory.seed for trajectory in rollouts[0].trajectories}) == 4

    steps = [json.loads(line) for line in (out / "checkpoints/ppo_rl/metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps][-1] == 3
    trained = [
        r
        for n in (1, 2, 3)
        for r in read_records(out / f"checkpoints/ppo_rl/trajectories/step_{n:05d}.jsonl", RolloutRecord)
    ]
    assert {record.scorer_id for record in trained} == {rollouts[0].scorer_id}

    summary = json.loads((out / "eval/summary.json").read_text())
    for model in summary["models"]:
        records = read_records(out / "eval" / f"{model['name']}.jsonl", EvalRecord)
        assert len(records) == 24
        assert model["accuracy"] == sum(record.correct for record in records) / 24
    assert "<html" in (out / "report.html").read_text()

    key = (out / "service/client.key").read_text().strip()
    written = [path for path in out.rglob("*") if path.is_file() and path != out / "service/client.key"]
    assert written
    assert not [path for path in written if key.encode() in path.read_bytes()]

    again = demo(out, "--service", "false")
    assert again.returncode == 0, again.stdout + again.stderr
    other = demo(out, "--service", "false", "--seed", "1")
    assert other.returncode == 2
    assert other.stderr.startswith("error: ")
    assert "other settings (seed 0)" in other.stderr


def test_the_journey_needs_nothing_private(tmp_path):
    done = demo(tmp_path / "demo", "--reward", "random")
    assert done.returncode == 0, done.stdout + done.stderr

"""A reward service that is killed in the middle of PPO delays training and changes nothing."""

import subprocess
import time

import pytest

from looper_schemas.records import RolloutRecord, read_records

from .conftest import BIN

STEPS = 4

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def ppo(base, out, service):
    # Random weights earn no correctness; mode `arm` still gives every completion a reward of its own.
    command = [
        BIN / "looper", "ppo", "--model", base, "--train-file", base.parent / "data/gsm8k_train.jsonl",
        "--dev-file", "none", "--output", out, "--steps", STEPS, "--batch-size", 4, "--mini-batch-size", 2,
        "--samples-per-question", 3, "--max-new-tokens", 24, "--lora-rank", 4, "--reward-mode", "arm",
        "--learning-rate", "1e-3", "--merge", "false", "--run-id", "kill-test",
    ]  # fmt: skip
    log = (out.parent / f"{out.name}.log").open("wb")
    return subprocess.Popen(
        [str(word) for word in command], env=service.client_environment(), stdout=log, stderr=log
    )


def wait_for(path, process, seconds=180):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, f"ended early with {process.returncode}"
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


def trajectories(out):
    return [
        (record.id, trajectory.output, trajectory.reward)
        for step in range(1, STEPS + 1)
        for record in read_records(out / f"trajectories/step_{step:05d}.jsonl", RolloutRecord)
        for trajectory in record.trajectories
    ]


def test_training_waits_for_a_killed_service_and_uses_the_same_rewards(service, base_model, tmp_path):
    service.start()
    calm = ppo(base_model, tmp_path / "calm", service)
    assert calm.wait(timeout=300) == 0, (tmp_path / "calm.log").read_text()

    stormy = ppo(base_model, tmp_path / "stormy", service)
    wait_for(tmp_path / "stormy/trajectories/step_00001.jsonl", stormy)
    service.kill()
    time.sleep(4)
    assert stormy.poll() is None, (tmp_path / "stormy.log").read_text()
    service.start()
    assert stormy.wait(timeout=300) == 0, (tmp_path / "stormy.log").read_text()

    assert "waiting for the reward service" in (tmp_path / "stormy.log").read_text()
    expected = trajectories(tmp_path / "calm")
    assert trajectories(tmp_path / "stormy") == expected
    assert len({reward for _, _, reward in expected}) > STEPS
    adapter = "adapter/adapter_model.safetensors"
    assert (tmp_path / "stormy" / adapter).read_bytes() == (tmp_path / "calm" / adapter).read_bytes()

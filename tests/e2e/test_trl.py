"""TRL's GRPO and RLOO trainers on the private service over HTTP, and a service killed in the middle."""

import json
import subprocess
import sys

import pytest

from .conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_trl_trains_on_the_private_service_and_logs_none_once_it_is_killed(
    algorithm, service, base_model, tmp_path
):
    service.start()
    out = tmp_path / "trl"
    command = [
        sys.executable, "-u", ROOT / "examples/trl_training.py", "--algorithm", algorithm,
        "--model", base_model,
        "--data", base_model.parent / "data/gsm8k_train.jsonl", "--out", out, "--steps", 4, "--questions", 2,
        "--samples", 4, "--max-new-tokens", 24, "--learning-rate", 1e-3, "--give-up-after-s", 1,
    ]  # fmt: skip
    log = (tmp_path / "trl.err").open("wb")
    process = subprocess.Popen(
        [str(word) for word in command],
        env=service.client_environment(),
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    assert process.stdout is not None
    seen = 0
    for line in process.stdout:
        seen += "'loss'" in line
        if seen == 2 and service.process.poll() is None:
            service.kill()
    assert process.wait(timeout=300) == 0, (tmp_path / "trl.err").read_text()
    rows = [r for r in json.loads((out / "trainer_state.json").read_text())["log_history"] if "loss" in r]
    assert len(rows) == 4
    first, last = rows[0], rows[-1]
    assert first["rewards/looper_reward/mean"] is not None
    assert 0.0 <= first["looper/s_wm"] <= 1.0
    assert first["looper/failed_share"] == 0.0
    assert last["rewards/looper_reward/mean"] is None
    assert last["reward"] is None
    assert last["looper/failed_share"] == 1.0

"""The stub says how to call the private service, and what it names exists."""

import subprocess
import sys
from pathlib import Path

import pytest

from looper_trainer.reward_client import RewardClient

FOLDER = Path(__file__).resolve().parents[2] / "coherence_service"
sys.path.insert(0, str(FOLDER))

import compute_reward as stub  # noqa: E402


@pytest.mark.parametrize("arguments", [(), (["a text"], "72"), ({"question": "2 + 2?"},)])
def test_every_call_is_answered_with_where_the_reward_comes_from(arguments):
    with pytest.raises(NotImplementedError, match="call the private coherence service"):
        stub.compute_reward(*arguments)


def test_what_it_names_exists():
    assert "RewardClient.from_environment" in stub.HOW
    assert callable(RewardClient.from_environment)
    assert (FOLDER.parent / "coherence_service/README.md").is_file()


def test_as_a_program_it_is_one_line_and_exit_code_2():
    done = subprocess.run(
        [sys.executable, FOLDER / "compute_reward.py"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: call the private coherence service")
    assert done.stderr.count("\n") == 1

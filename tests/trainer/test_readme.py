"""What the trainer's README shows works as shown."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from looper_trainer.cli import STAGES
from looper_trainer.testing import FakeRewardServer

README = Path(__file__).parents[2] / "trainer" / "README.md"


def test_the_client_example_scores_its_question() -> None:
    (program,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    with FakeRewardServer(key="readme") as server:
        done = subprocess.run(
            [sys.executable, "-c", program + "print(results['q1'].arms[0].reward)"],
            env=os.environ | {"LOOPER_REWARD_URL": server.url, "LOOPER_REWARD_KEY": "readme"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert (done.stdout, done.stderr) == ("1.0\n", "")


def test_the_table_lists_the_commands_that_exist() -> None:
    shown = re.findall(r"^\| `looper ([a-z-]+)`", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert shown == list(STAGES)

"""What the trainer's README shows works as shown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from looper_trainer.cli import STAGES
from looper_trainer.testing import FakeRewardServer

README = Path(__file__).parents[2] / "trainer" / "README.md"


def test_the_client_example_scores_its_question(monkeypatch: pytest.MonkeyPatch) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    with FakeRewardServer(key="readme") as server:
        monkeypatch.setenv("LOOPER_REWARD_URL", server.url)
        monkeypatch.setenv("LOOPER_REWARD_KEY", "readme")
        exec(compile(program, str(README), "exec"), names)
    (arm,) = names["results"]["q1"].arms
    assert arm.reward == 1.0


def test_the_table_lists_the_commands_that_exist() -> None:
    shown = re.findall(r"^\| `looper ([a-z-]+)`", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert shown == list(STAGES)

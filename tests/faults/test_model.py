"""A model that is damaged: the service does not start, and says why in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from regime_w.model_files import read_model_files
from reward_service import auth
from reward_service.auth import Scope

pytestmark = pytest.mark.slow


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100_000])


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize(
    ("name", "damage"),
    [("model.safetensors", cut_off), ("tokenizer.json", empty)],
)
def test_a_corrupt_model_stops_the_start_with_one_line(
    home: Path, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    model = tmp_path / "model"
    for file, content in read_model_files("sentence-transformers/all-MiniLM-L6-v2").items():
        (model / file).parent.mkdir(parents=True, exist_ok=True)
        (model / file).write_bytes(content)
    damage(model / name)
    auth.create_key(home, "k", [Scope.SCORE_REWARD])
    (home / "settings.toml").write_text(f'[scorer]\nembedding_model = "{model}"\n', encoding="utf-8")
    ran = subprocess.run(
        [sys.executable, "-m", "reward_service.cli", "serve", "--port", "0"],
        env={**os.environ, "REWARD_SERVICE_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 2, ran.stderr
    assert ran.stdout == "", "it never said that it was ready"
    assert ran.stderr.startswith("error: ")
    assert ran.stderr.count("\n") == 1
    assert "Traceback" not in ran.stderr

"""The proof of an exported tree sees a failing command, and an import of private code even if caught."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts/export"))

import prove  # noqa: E402


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "exported"
    folder.mkdir()
    (folder / "Makefile").write_text(f"test:\n\t{sys.executable} ok.py\ndemo:\n\t{sys.executable} ok.py\n")
    (folder / "ok.py").write_text("import os\nassert 'LOOPER_SECRET' not in os.environ\n")
    return folder


def test_a_tree_that_stands_alone_is_proved(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOPER_SECRET", "x")
    assert prove.prove(tree, ["test", "demo"]) == []


def test_a_failing_command_is_no_proof(tree: Path) -> None:
    (tree / "ok.py").write_text("raise SystemExit(3)\n")
    assert prove.prove(tree, ["test"]) == ["make test: exit code 2"]


@pytest.mark.parametrize("name", ["regime_w", "reward_service.app"])
def test_an_import_of_private_code_is_no_proof_even_where_it_is_caught(tree: Path, name: str) -> None:
    (tree / "ok.py").write_text(f"try:\n    import {name}\nexcept ImportError:\n    pass\n")
    assert prove.prove(tree, ["demo"]) == [f"{name.split('.')[0]}: was imported"]


def test_another_folder_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prove.main([str(tmp_path)]) == 2
    assert "run export_public.py first" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bwrap")
def test_the_copy_sees_nothing_of_a_hidden_folder_and_writes_nowhere_else(tree: Path, tmp_path: Path) -> None:
    hidden, outside = tmp_path / "private", tmp_path / "outside"
    hidden.mkdir()
    outside.mkdir()
    (hidden / "secret.py").write_text("x = 1\n")
    look = "import os, sys\nsys.exit(len(os.listdir({!r})) + os.access({!r}, os.W_OK))\n"
    (tree / "ok.py").write_text(look.format(str(hidden), str(outside)))
    assert prove.prove(tree, ["test"]) == ["make test: exit code 2"]
    assert prove.prove(tree, ["test"], hidden=[hidden]) == []

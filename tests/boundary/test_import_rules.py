"""The import rules hold, and the scan that enforces them sees planted violations."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import import_rules  # noqa: E402


def violations(source: str, package: str | None = "looper_trainer") -> list[str]:
    return [found.what for found in import_rules.scan_source(source, Path("planted.py"), package)]


def test_public_tree_has_no_violation():
    assert import_rules.scan(ROOT, (*import_rules.PUBLIC_PACKAGES, *import_rules.PUBLIC_TESTS)) == []


def test_scan_reads_every_public_package():
    for folder in import_rules.PUBLIC_PACKAGES:
        assert list((ROOT / folder).rglob("*.py")), folder


@pytest.mark.parametrize(
    "source",
    [
        "import regime_w",
        "from reward_service.app import create_app",
        "import importlib\nimportlib.import_module(name)",
        "from importlib import import_module\nimport_module('reg' + 'ime_w')",
        "__import__(name)",
        "exec(text)",
        "import runpy\nrunpy.run_module(name)",
        "x = 'regime_w.scoring'",
        "x = 'regime-w'.upper()  # noqa\ny = 'reward-service'",
        "# regime_w does this",
        "from . import data",
        "import looper_eval",
        "from looper_eval.grading import robust_match",
    ],
)
def test_scan_sees_a_planted_violation(source):
    assert violations(source)


@pytest.mark.parametrize(
    ("source", "clean"),
    [
        ("from looper_trainer.sampling.base import Sampler", True),
        ("from looper_trainer.reward_client import RewardClient", True),
        ("from looper_trainer.ppo.loop import run", False),
        ("from looper_schemas.answers import extract_answer", True),
    ],
)
def test_eval_may_import_the_sampler_and_the_client_only(source, clean):
    assert (violations(source, "looper_eval") == []) is clean


def test_schemas_may_import_nothing_of_the_workspace():
    assert violations("import looper_trainer", "looper_schemas")


def test_ordinary_code_is_clean():
    assert violations("import re\nmodel.eval()\npattern = re.compile(r'a')\nimport importlib.metadata") == []

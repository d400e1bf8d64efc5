"""Short forms of the fuzzers; their long ones are run by hand (see benchmarks/private/fuzz)."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parents[3] / "benchmarks/private/fuzz"
RESULTS = FUZZ.parents[1] / "results/private"

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("script", "arguments", "needs"),
    [
        ("fuzz_requests.py", ["--requests", "4000", "--seed", "7"], "fastapi"),
        ("fuzz_hypothesis.py", ["--cases", "300", "--seed", "7"], "hypothesis"),
        ("fuzz_openapi.py", ["--examples", "10", "--seed", "7"], "schemathesis"),
        ("fuzz_parser.py", ["--cpu-minutes", "0.05", "--seed", "7"], "atheris"),
    ],
)
def test_a_short_fuzz_finds_nothing(script: str, arguments: list[str], needs: str) -> None:
    if importlib.util.find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed")
    ran = subprocess.run(
        [sys.executable, str(FUZZ / script), *arguments], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-4000:]


@pytest.mark.parametrize(
    ("name", "count", "least"),
    [
        ("fuzz_openapi", "cases", 1_000),
        ("fuzz_requests", "requests", 1_000_000),
        ("fuzz_hypothesis", "cases", 50_000),
        ("fuzz_parser", "cpu_minutes", 30),
    ],
)
def test_the_long_run_that_is_kept_was_long_and_found_nothing(name: str, count: str, least: int) -> None:
    kept = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert kept[count] >= least
    assert kept.get("faults", 0) == kept.get("failures", 0) == 0
    assert not {status for status in kept.get("statuses", {}) if status >= "5"}

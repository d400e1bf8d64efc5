"""How the results of private benchmarks are kept: JSON under benchmarks/results/private, stamped."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/private"


def stamp() -> dict[str, str]:
    """When, where and on which commit a figure was measured."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "commit": commit,
    }


def keep(name: str, result: dict[str, Any], file: Path | None = None) -> None:
    """Write `result` to `file`, by default the kept one of `name`, and print it."""
    text = json.dumps(result, indent=1) + "\n"
    (file or RESULTS / f"{name}.json").write_text(text, encoding="utf-8")
    print(text, end="")

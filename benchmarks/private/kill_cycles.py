"""The long form of tests/faults/test_kill.py: 100 times kill -9 and restart under load.

    python benchmarks/private/kill_cycles.py

The counts of the last run are kept in benchmarks/results/private/kill_cycles.json. Exit code 1 when a reward
was lost or changed, anything charged twice, or the audit broken.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from kept import ROOT, keep, stamp


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cycles", type=int, default=100, help="how often (default 100)")
    options = parser.parse_args()
    stamped = stamp()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        environment = {
            **os.environ,
            "LOOPER_KILL_CYCLES": str(options.cycles),
            "LOOPER_KILL_REPORT": str(report),
        }
        test = [sys.executable, "-m", "pytest", "-q", "tests/faults/test_kill.py"]
        if subprocess.run(test, cwd=ROOT, env=environment, check=False).returncode:
            return 1
        keep("kill_cycles", {**stamped, **json.loads(report.read_text(encoding="utf-8"))})
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Prove that an exported tree is a project of its own: `make test` and `make demo` pass there.

    python scripts/export/prove.py OUT [--only test|demo] [--make ARGUMENT...]

The copy runs with an empty environment (PATH and a home of its own), its own virtual environment, and a hook
in every Python process that notes and refuses an import of private code. Exit code 1: something failed, or
private code was asked for.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

PRIVATE = ("regime_w", "reward_service")
BLOCKER = """\
import sys


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            with open({log!r}, "a") as log:
                log.write(name + "\\n")
            raise ImportError(name + " is private")


sys.meta_path.insert(0, Blocker())
"""


def prove(tree: Path, targets: Sequence[str], arguments: Sequence[str] = ()) -> list[str]:
    """What went wrong; an empty list is the proof."""
    with tempfile.TemporaryDirectory(prefix="looper-public-") as workplace:
        place = Path(workplace)
        copy, hook, asked = place / "looper", place / "hook", place / "asked"
        shutil.copytree(tree, copy, symlinks=True)
        for folder in (hook, place / "home"):
            folder.mkdir()
        (hook / "sitecustomize.py").write_text(BLOCKER.format(names=PRIVATE, log=str(asked)))
        kept = {
            name: os.environ[name]
            for name in ("PATH", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL")
            if name in os.environ
        }
        environment = {**kept, "HOME": str(place / "home"), "PYTHONPATH": str(hook), "LANG": "C.UTF-8"}
        failures = []
        for target in targets:
            done = subprocess.run(["make", target, *arguments], cwd=copy, env=environment, check=False)
            if done.returncode:
                failures.append(f"make {target}: exit code {done.returncode}")
        if asked.exists():
            failures += sorted({f"{name}: was imported" for name in asked.read_text().split()})
        return failures


def main(argv: Sequence[str] | None = None) -> int:
    """0: proved; 1: not; 2: there is no such tree."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tree", type=Path, metavar="OUT")
    parser.add_argument("--only", choices=("test", "demo"))
    parser.add_argument(
        "--make", nargs="*", default=[], metavar="ARGUMENT", help="for example OUT=runs/x SEED=1"
    )
    options = parser.parse_args(argv)
    if not (options.tree / "Makefile").is_file():
        print(f"error: {options.tree}: is no exported tree; run export_public.py first", file=sys.stderr)
        return 2
    failures = prove(options.tree, [options.only] if options.only else ["test", "demo"], options.make)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

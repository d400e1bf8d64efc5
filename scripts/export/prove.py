"""Prove that an exported tree is a project of its own: `make test` and `make demo` pass there.

    python scripts/export/prove.py OUT [--only test|demo] [--hide FOLDER...] [--make ARGUMENT...]

The copy runs with an empty environment (PATH, a home and a temporary folder of its own), its own virtual
environment, and a hook in every Python process that notes and refuses an import of private code. Under
bubblewrap (Debian's `bubblewrap`) this repository, its main checkout and every `--hide` FOLDER are empty
there, and nothing outside the copy's place can be written. Exit code 1: something failed, or private code
was asked for.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PRIVATE = ("regime_w", "reward_service")
KEPT = ("PATH", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_CERT")
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


def prove(
    tree: Path, targets: Sequence[str], arguments: Sequence[str] = (), hidden: Sequence[Path] | None = None
) -> list[str]:
    """What went wrong; an empty list is the proof. `hidden` None: there is no bubblewrap to hide anything."""
    with tempfile.TemporaryDirectory(prefix="looper-public-") as workplace:
        place = Path(workplace)
        copy, hook, asked = place / "looper", place / "hook", place / "asked"
        shutil.copytree(tree, copy, symlinks=True)
        for folder in (hook, place / "home", place / "tmp"):
            folder.mkdir()
        (hook / "sitecustomize.py").write_text(BLOCKER.format(names=PRIVATE, log=str(asked)))
        kept = {name: os.environ[name] for name in KEPT if name in os.environ}
        environment = {
            **kept, "HOME": str(place / "home"), "TMPDIR": str(place / "tmp"), "PYTHONPATH": str(hook),
            "LANG": "C.UTF-8",
        }  # fmt: skip
        around = [] if hidden is None else confinement(place, hidden)
        failures = []
        for folder in hidden or ():
            seen = subprocess.run([*around, "ls", "-A", folder], capture_output=True, text=True, check=False)
            if seen.returncode or seen.stdout.strip():
                failures.append(f"{folder}: can be seen from the copy: {(seen.stdout + seen.stderr).strip()}")
        for target in [] if failures else targets:
            began = time.monotonic()
            command = [*around, "make", target, *arguments]
            done = subprocess.run(command, cwd=copy, env=environment, check=False)
            print(f"make {target}: exit code {done.returncode} after {time.monotonic() - began:.0f} s")
            if done.returncode:
                failures.append(f"make {target}: exit code {done.returncode}")
        if asked.exists():
            failures += sorted({f"{name}: was imported" for name in asked.read_text().split()})
        return failures


def confinement(place: Path, hidden: Sequence[Path]) -> list[str]:
    """The words before a command that run it able to write below `place` only, each `hidden` folder empty."""
    words = ["bwrap", "--die-with-parent", "--unshare-pid", "--unshare-ipc", "--ro-bind", "/", "/"]
    words += ["--dev", "/dev", "--proc", "/proc"]
    for folder in hidden:
        words += ["--tmpfs", str(folder)]
    return [*words, "--bind", str(place), str(place), "--chdir", str(place / "looper"), "--"]


def private_places() -> list[Path]:
    """This checkout, and the one that its git folder belongs to."""
    asked = ["git", "-C", str(ROOT), "rev-parse", "--path-format=absolute", "--git-common-dir"]
    common = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    return sorted({ROOT, Path(common).parent})


def main(argv: Sequence[str] | None = None) -> int:
    """0: proved; 1: not; 2: there is no such tree."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tree", type=Path, metavar="OUT")
    parser.add_argument("--only", choices=("test", "demo"))
    parser.add_argument("--hide", nargs="*", type=Path, default=[], metavar="FOLDER")
    parser.add_argument(
        "--make", nargs="*", default=[], metavar="ARGUMENT", help="for example OUT=runs/x SEED=1"
    )
    options = parser.parse_args(argv)
    if not (options.tree / "Makefile").is_file():
        print(f"error: {options.tree}: is no exported tree; run export_public.py first", file=sys.stderr)
        return 2
    hidden = None
    if shutil.which("bwrap"):
        every = {*private_places(), *(folder.resolve() for folder in options.hide)}
        hidden = sorted(folder for folder in every if not every & set(folder.parents))
    else:
        print("bwrap is missing: the private repository stays visible to the copy", file=sys.stderr)
    targets = [options.only] if options.only else ["test", "demo"]
    failures = prove(options.tree, targets, options.make, hidden)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

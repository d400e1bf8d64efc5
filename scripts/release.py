"""Wheels and sdists of every distribution, each tried alone, with a bill of materials.

    python scripts/release.py OUT [--python python3.12 ...] [--only shared_schemas] [--sbom]

Builds into OUT/dist, then installs each wheel (and each sdist, on the first interpreter) into an environment
of its own with nothing but what it asks for; the other distributions come from OUT/dist, everything else from
the package index. There it runs `pip check`, imports the packages, looks for `py.typed`, asks each command
for its help. `--sbom` writes OUT/sbom/<distribution>.cdx.json (CycloneDX 1.6) of what was installed.

Prints a line for each, and exits 1 if one failed. `--result FILE.md` adds a row of a table for each.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]

# Run in the new environment: imports, marker, and that the code comes from the wheel.
LOOK = """
import importlib, importlib.metadata, importlib.resources, pathlib, sys
for name in sys.argv[1:]:
    module = importlib.import_module(name)
    place = pathlib.Path(module.__file__).resolve()
    assert "site-packages" in place.parts, f"{name} does not come from the wheel: {place}"
    assert (place.parent / "py.typed").is_file(), f"{name} has no py.typed"
"""


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every distribution works alone on every interpreter."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--python", action="append", help="interpreter to try (repeat); default: this one")
    parser.add_argument("--only", action="append", help="folder of a distribution (repeat); default: all")
    parser.add_argument("--sbom", action="store_true", help="write bills of materials too")
    parser.add_argument("--result", type=Path, help="Markdown file that gets a row for each; new or to go on")
    parser.add_argument("--built", action="store_true", help="OUT/dist holds the files already")
    options = parser.parse_args(argv)
    folders = [path.parent for path in sorted(ROOT.glob("*/pyproject.toml"))]
    chosen = [folder for folder in folders if not options.only or folder.name in options.only]
    dist = options.out.resolve() / "dist"
    if not options.built:
        for folder in folders:
            build(folder, dist)
    failures = 0
    for number, python in enumerate(options.python or [sys.executable]):
        for folder in chosen:
            kinds = ("whl", "tar.gz") if number == 0 else ("whl",)
            for kind in kinds:
                sbom = options.out / "sbom" if options.sbom and kind == "whl" and number == 0 else None
                outcome = tried(folder, dist, kind, python, sbom)
                failures += not outcome.works
                if options.result:
                    write_row(options.result, outcome)
    return 1 if failures else 0


class Outcome(NamedTuple):
    """How one file did on one interpreter."""

    file: str
    python: str
    works: bool
    packages: int
    seconds: float


def build(folder: Path, dist: Path) -> None:
    """A wheel and an sdist of the distribution in `folder`, from a copy, so that nothing old gets in."""
    with tempfile.TemporaryDirectory() as copy:
        source = Path(copy) / folder.name
        shutil.copytree(folder, source, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
        run([sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, source])


def tried(folder: Path, dist: Path, kind: str, python: str, sbom: Path | None) -> Outcome:
    """Install one file alone and look at it; prints how it went."""
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    stem = f"{project['name'].replace('-', '_')}-{project['version']}"
    file = next(dist.glob(f"{stem}*.{kind}"))
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        interpreter = Path(place) / "venv/bin/python"
        try:
            # pip stays outside: the environment holds the distribution and what it asked for, nothing else.
            run([python, "-m", "venv", "--without-pip", Path(place) / "venv"])
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", interpreter]
            run([*pip, "install", "--quiet", "--no-compile", "--find-links", dist, file])
            run([*pip, "check"])
            packages = [path.parent.name for path in sorted((folder / "src").glob("*/__init__.py"))]
            run([interpreter, "-c", LOOK, *packages], cwd=Path(place))
            for command in project.get("scripts", {}):
                run([interpreter.parent / command, "--help"], cwd=Path(place))
            if sbom is not None:
                write_sbom(interpreter, folder, sbom / f"{project['name']}.cdx.json")
            packages_there = len(run([*pip, "list", "--format=freeze"]).split())
            version = run([interpreter, "--version"]).strip()
        except subprocess.CalledProcessError as error:
            words = " ".join(map(str, error.cmd[:6]))
            print(f"FAILED  {file.name} on {python}: {words}\n{error.output}{error.stderr}", flush=True)
            return Outcome(file.name, python, False, 0, time.monotonic() - began)
    seconds = time.monotonic() - began
    print(f"ok      {file.name} on {version}: pip check clean, {seconds:.0f} s", flush=True)
    return Outcome(file.name, version, True, packages_there, seconds)


def write_row(result: Path, outcome: Outcome) -> None:
    """Add `outcome` to the table in `result`, which is begun where there is none."""
    if not result.exists():
        result.parent.mkdir(parents=True, exist_ok=True)
        head = "| file | interpreter | alone | packages installed | seconds | when, at which commit |"
        result.write_text(f"# Each distribution, installed alone\n\n{head}\n|---|---|---|---:|---:|---|\n")
    commit = run(["git", "describe", "--always", "--dirty"], cwd=ROOT).strip()
    verdict = "works, `pip check` clean" if outcome.works else "**fails**"
    cells = [outcome.file, outcome.python, verdict, outcome.packages, f"{outcome.seconds:.0f}"]
    cells.append(f"{time.strftime('%Y-%m-%d')}, {commit}")
    with result.open("a", encoding="utf-8") as out:
        out.write(f"| {' | '.join(map(str, cells))} |\n")


def write_sbom(interpreter: Path, folder: Path, target: Path) -> None:
    """What the environment holds, as CycloneDX; the tool checks it against the standard's schema."""
    target.parent.mkdir(parents=True, exist_ok=True)
    tool = [sys.executable, "-m", "cyclonedx_py", "environment", "--pyproject", folder / "pyproject.toml"]
    written = ["--output-reproducible", "--spec-version", "1.6", "--output-file", target]
    run([*tool, *written, interpreter])


def run(command: Sequence[Any], cwd: Path | None = None) -> str:
    """Standard output of a command.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=True)
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())

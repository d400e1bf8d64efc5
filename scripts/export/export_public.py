"""Build the public repository from the allow-list, prove that it holds nothing private, then put it in place.

    python scripts/export/export_public.py OUT [--root FOLDER] [--no-distributions]
    python scripts/export/export_public.py --unlisted

What is exported is the commit that HEAD names, file by file as `manifest.txt` lists them; `public/` holds
the files that only the public tree has (README, Makefile, pyproject, CI, the stub of the service). OUT
appears when every gate of `gates.py` has passed, for the tree, its git repository (one commit), its wheels
and its sdists; otherwise nothing is written, each finding is one line `file:line: [gate] what`, and the
exit code is 1.

`--unlisted` prints the tracked files of public folders that the manifest neither lists nor withholds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from fingerprints import Fingerprints  # noqa: E402
from gates import DISTRIBUTIONS, Finding, Gates  # noqa: E402

MESSAGE = "Looper: reinforcement post-training with a reward that stays private\n"
_IDENTITY = {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (
        ("NAME", "Looper developers"),
        ("EMAIL", "looper@invalid"),
        ("DATE", "2026-01-01T00:00:00Z"),
    )
}


class ExportError(Exception):
    """The export cannot begin; the message says what to do."""


class Leak(Exception):
    """A gate found something; nothing was written."""

    def __init__(self, findings: list[Finding]) -> None:
        super().__init__(f"{len(findings)} findings")
        self.findings = findings


class Manifest(NamedTuple):
    """`copied` are files of the source, `own` those of `public/`, `withheld` files beside them that stay."""

    copied: frozenset[str]
    own: frozenset[str]
    filtered: dict[str, tuple[str, ...]]  # requirement files, and the packages left out of each
    withheld: frozenset[str]

    @property
    def files(self) -> frozenset[str]:
        """Every file of the public tree."""
        return self.copied | self.own | frozenset(self.filtered)


def read_manifest(file: Path) -> Manifest:
    """Parse the allow-list: `PATH`, `own PATH`, `filter PATH: PACKAGE...`, `withhold PATH`, one a line.

    Raises:
        ExportError: a path is absolute, leaves the tree, or stands there twice.
    """
    copied, own, withheld = set[str](), set[str](), set[str]()
    filtered: dict[str, tuple[str, ...]] = {}
    for number, row in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        row = row.partition("#")[0].strip()
        if not row:
            continue
        word, _, rest = row.partition(" ")
        path = rest.strip() if word in ("own", "withhold", "filter") else row
        packages: tuple[str, ...] = ()
        if word == "filter":
            path, _, left_out = path.partition(":")
            packages = tuple(left_out.split())
        if path.startswith(("/", "~")) or ".." in Path(path).parts or any(c in path for c in "*?["):
            raise ExportError(f"{file}:{number}: {path!r} is not a plain path inside the tree")
        if path in copied | own | withheld | set(filtered):
            raise ExportError(f"{file}:{number}: {path} is listed twice")
        match word:
            case "own":
                own.add(path)
            case "withhold":
                withheld.add(path)
            case "filter":
                filtered[path] = packages
            case _:
                copied.add(path)
    return Manifest(frozenset(copied), frozenset(own), filtered, frozenset(withheld))


def export(
    source: Path,
    out: Path,
    manifest: Manifest,
    gates: Gates,
    *,
    own: Path = HERE / "public",
    message: str = MESSAGE,
    distributions: bool = True,
) -> None:
    """Make the public repository `out` from the folder `source`.

    Raises:
        ExportError: `out` exists, or a listed file is missing.
        Leak: a gate found something. `out` does not exist then.
    """
    if out.exists():
        raise ExportError(f"{out}: exists; name a folder that does not, or remove it")
    for name, folder in [(n, source) for n in (*manifest.copied, *manifest.filtered)] + [
        (n, own) for n in manifest.own
    ]:
        if not (folder / name).is_file() or (folder / name).is_symlink():
            raise ExportError(
                f"{name}: is in the manifest but is no file of {folder.name}; mend manifest.txt"
            )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as workplace:
        tree = Path(workplace) / "tree"
        for name in sorted(manifest.copied):
            _copy(source / name, tree / name)
        for name in sorted(manifest.own):
            _copy(own / name, tree / name)
        for name, left_out in manifest.filtered.items():
            _filter(source / name, tree / name, left_out)
        _fresh_history(tree, message)
        findings = gates.tree(tree, manifest.files) + gates.repository(tree, manifest.files)
        if distributions and not findings:
            for built in _distributions(tree, Path(workplace) / "distributions"):
                findings += gates.distribution(built, manifest.files)
        if findings:
            raise Leak(findings)
        tree.rename(out)


def _copy(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, target)
    target.chmod(0o755 if os.access(file, os.X_OK) else 0o644)


def _filter(file: Path, target: Path, left_out: tuple[str, ...]) -> None:
    """Copy a requirements file without some packages, each of which it must have."""
    rows = file.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [row for row in rows if row.strip().partition("==")[0] not in left_out]
    if len(rows) - len(kept) != len(left_out):
        raise ExportError(f"{file.name}: does not have each of {', '.join(left_out)} once; mend manifest.txt")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(kept), encoding="utf-8")


def _fresh_history(tree: Path, message: str) -> None:
    """One commit of the whole tree in a new repository that no setting of this user reaches."""
    environment = {
        "PATH": os.environ["PATH"],
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_SYSTEM": os.devnull,
        **_IDENTITY,
    }

    def git(*words: str) -> None:
        subprocess.run(["git", *words], cwd=tree, env=environment, check=True, capture_output=True)

    git("init", "--quiet", "--initial-branch=main", "--template=")
    git("add", "--all", "--force")
    git("commit", "--quiet", "--no-gpg-sign", "-m", message)


def _distributions(tree: Path, out: Path) -> Iterator[Path]:
    """Wheel and sdist of each public package, built from a copy, so that the tree stays clean."""
    copy = out / "tree"
    shutil.copytree(tree, copy, ignore=shutil.ignore_patterns(".git"))
    for folder in DISTRIBUTIONS.values():
        command = [
            sys.executable,
            "-m",
            "build",
            "--no-isolation",
            "--outdir",
            str(out / "dist"),
            str(copy / folder),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ExportError(
                f"{folder}: does not build: {(done.stderr or done.stdout).strip().splitlines()[-1]}"
            )
    yield from sorted((out / "dist").iterdir())


def unlisted(root: Path, manifest: Manifest) -> list[str]:
    """Tracked files beside listed ones, in the same folder or below, that the manifest says nothing about."""
    known = manifest.copied | manifest.own | manifest.withheld | set(manifest.filtered)
    tops = {name.split("/")[0] + "/" for name in manifest.copied if "/" in name}
    tracked = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-z"], capture_output=True, text=True, check=True
    ).stdout
    withheld = tuple(name for name in manifest.withheld if name.endswith("/"))
    return sorted(
        name
        for name in tracked.split("\0")
        if name.startswith(tuple(tops)) and name not in known and not name.startswith(withheld)
    )


@contextmanager
def committed(root: Path) -> Iterator[Path]:
    """The files of HEAD in a temporary folder: what is not committed is not exported."""
    with tempfile.TemporaryDirectory() as workplace:
        archive, folder = Path(workplace) / "head.tar", Path(workplace) / "head"
        subprocess.run(["git", "-C", str(root), "archive", "--output", str(archive), "HEAD"], check=True)
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        yield folder


def main(argv: Sequence[str] | None = None) -> int:
    """0: exported; 1: a gate stopped it; 2: it could not begin."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help="folder to make; must not exist")
    parser.add_argument("--root", type=Path, default=HERE.parent.parent, help="the private repository")
    parser.add_argument(
        "--no-distributions", action="store_true", help="do not build and check wheels and sdists"
    )
    parser.add_argument("--unlisted", action="store_true", help="print what the manifest says nothing about")
    options = parser.parse_args(argv)
    try:
        manifest = read_manifest(HERE / "manifest.txt")
        forgotten = unlisted(options.root, manifest)
        if options.unlisted:
            print("\n".join(forgotten))
            return 0
        if options.out is None:
            parser.error("name the folder to make: OUT")
        if forgotten:
            raise ExportError(
                f"{forgotten[0]} and {len(forgotten) - 1} more: list or withhold them in manifest.txt"
            )
        with committed(options.root) as source:
            gates = Gates(Fingerprints.of(source))
            own = source / HERE.relative_to(options.root.resolve()) / "public"
            export(
                source,
                options.out.resolve(),
                manifest,
                gates,
                own=own,
                distributions=not options.no_distributions,
            )
    except ExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Leak as leak:
        for finding in leak.findings:
            print(finding)
        print(f"error: {len(leak.findings)} findings; nothing was exported", file=sys.stderr)
        return 1
    print(f"{options.out}: {len(manifest.files)} files, one commit, every gate passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The gates that a public artifact passes before it leaves: each reports file, line and what it found.

    python scripts/export/gates.py [--clone] PATH...    # folders, git repositories, wheels, sdists, files

`--clone`: the repositories are clones of what was published, to which others may have added commits; every
commit is searched, and having more than one is no finding.

| gate | finds |
|---|---|
| manifest | a file that the allow-list does not name, a file that is missing, a link |
| imports | private or computed imports and names spelled in strings (`scripts/import_rules.py`) |
| names, identifiers, numbers | private names, identifiers of private code, its constants, canaries |
| shingles | 20 words in a row of private sources, prompts or docstrings |
| unreadable | content that no gate can read |
| history | more than one commit, a commit that nothing refers to, a tree that is not the manifest |

All but the first two look at every text that a file carries (`unwrap.py`): inside archives, byte code and
notebooks, spelled in base64, hex and other alphabets (`spelled.py`), as a terminal, a browser or the program
shows it (`shown.py`); and at every object, reference and message of a git repository.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Set
from pathlib import Path, PurePosixPath
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import import_rules  # noqa: E402
from fingerprints import Fingerprints  # noqa: E402
from unwrap import Opaque, views  # noqa: E402

DISTRIBUTIONS = {"looper_schemas": "shared_schemas", "looper_trainer": "trainer", "looper_eval": "eval"}
_WHEEL_INFO = {"METADATA", "WHEEL", "RECORD", "top_level.txt", "entry_points.txt", "licenses/LICENSE"}
_SDIST_INFO = re.compile(r"PKG-INFO|setup\.cfg|src/\w+\.egg-info/[\w.-]+")


class Finding(NamedTuple):
    """One reason not to publish."""

    path: str
    line: int
    gate: str
    what: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: [{self.gate}] {self.what}"


class Gates:
    """All gates with one set of fingerprints; content that was seen before is not read again."""

    def __init__(self, fingerprints: Fingerprints) -> None:
        self.fingerprints = fingerprints
        self._clean: set[tuple[str, bytes]] = set()
        self._clean_texts: set[str] = set()  # the same text comes again in git objects, wheels and sdists

    def tree(self, folder: Path, manifest: Set[str] | None = None) -> list[Finding]:
        """Findings in a folder, its `.git` aside; `manifest` names exactly the files that must be there."""
        files = sorted(
            path
            for path in folder.rglob("*")
            if not path.is_dir() and path.relative_to(folder).parts[0] != ".git"
        )
        names = [path.relative_to(folder).as_posix() for path in files]
        found = [] if manifest is None else list(equality(names, manifest))
        for path, name in zip(files, names, strict=True):
            if path.is_symlink():
                found.append(
                    Finding(name, 1, "manifest", f"is a link to {path.readlink()}; publish the file itself")
                )
                continue
            found += self.content(path.read_bytes(), name)
            if path.suffix == ".py":
                found += imports(path, folder)
        return found

    def content(self, data: bytes, path: str) -> list[Finding]:
        """Findings in one file: its name, its text, and what is wrapped in it."""
        suffix = PurePosixPath(path).suffix
        found = [Finding(path, 1, gate, f"its name {what}") for _, gate, what in self.fingerprints.hits(path)]
        # Without a suffix, as git's objects are, less is looked for than with any but .pyc.
        if (suffix, data) in self._clean or (suffix == "" and ("any", data) in self._clean):
            return found
        inner: list[Finding] = []
        for view in views(data, path):
            if isinstance(view, Opaque):
                inner.append(Finding(view.path, view.line or 1, "unreadable", view.why))
                continue
            if view.text in self._clean_texts:
                continue
            hits = [
                Finding(view.path, view.line or line, gate, what)
                for line, gate, what in self.fingerprints.hits(view.text)
            ]
            inner += hits
            if not hits:
                self._clean_texts.add(view.text)
        if not inner:
            self._clean |= {(suffix, data)} if suffix == ".pyc" else {(suffix, data), ("any", data)}
        return found + list(dict.fromkeys(inner))

    def repository(
        self, folder: Path, manifest: Set[str] | None = None, *, fresh: bool = True
    ) -> list[Finding]:
        """Findings in everything that `folder/.git` holds, reachable or not; a `fresh` one has one commit."""
        found: list[Finding] = []
        commits = 0
        for kind, name, data in _objects(folder):
            label = f"git {kind} {name[:12]}"
            if kind == "tree":
                for entry in re.findall(rb"[0-7]{5,6} ([^\0]+)\0.{20}", data, re.DOTALL):
                    found += self.content(entry, label)
                continue
            commits += kind == "commit"
            found += self.content(data, label)
        if fresh and commits > 1:
            found.append(Finding(".git", 1, "history", f"holds {commits} commits; a fresh history has one"))
        reachable = set(_git(folder, "rev-list", "--all", "--objects", "--no-object-names").split())
        for kind, name, _ in _objects(folder):
            if kind != "tag" and name not in reachable:
                found.append(
                    Finding(f"git {kind} {name[:12]}", 1, "history", "is an object that nothing refers to")
                )
        if manifest is not None:
            committed = _git(folder, "ls-tree", "-r", "--name-only", "-z", "HEAD").split("\0")
            found += [f._replace(path=f"HEAD:{f.path}") for f in equality(filter(None, committed), manifest)]
        for path in sorted((folder / ".git").rglob("*")):
            inside = path.relative_to(folder / ".git")
            if path.is_file() and inside.parts[0] not in ("objects", "index"):
                name = f".git/{inside.as_posix()}"
                found += self.content(path.read_bytes(), name)
                # Git puts samples beside a clone's hooks, which it never runs.
                if inside.parts[0] == "hooks" and inside.suffix != ".sample":
                    found.append(Finding(name, 1, "history", "is a hook; a fresh repository has none"))
        return found

    def distribution(self, file: Path, manifest: Set[str] | None = None) -> list[Finding]:
        """Findings in a wheel or an sdist; its members must be the manifest's files and its own metadata."""
        found = self.content(file.read_bytes(), file.name)
        if manifest is not None:
            found += _members(file, manifest)
        return found


def equality(names: Iterable[str], manifest: Set[str]) -> Iterator[Finding]:
    """Differences between the files that are there and those that the allow-list names."""
    there = set(names)
    for name in sorted(there - manifest):
        yield Finding(name, 1, "manifest", "is not in the manifest")
    for name in sorted(manifest - there):
        yield Finding(name, 1, "manifest", "is in the manifest and missing")


def imports(file: Path, root: Path) -> Iterator[Finding]:
    """What the import rules say of one Python file."""
    relative = file.relative_to(root)
    package = next((part for part in relative.parts if part in import_rules.WORKSPACE), None)
    try:
        for violation in import_rules.scan_source(file.read_text(encoding="utf-8"), relative, package):
            yield Finding(relative.as_posix(), violation.line, "imports", violation.what)
    except SyntaxError as error:
        yield Finding(relative.as_posix(), error.lineno or 1, "imports", "is no Python that can be parsed")
    except UnicodeDecodeError:
        yield Finding(relative.as_posix(), 1, "imports", "is not UTF-8")


def _members(file: Path, manifest: Set[str]) -> Iterator[Finding]:
    package = file.name.split("-")[0].lower()
    folder = DISTRIBUTIONS.get(package)
    if folder is None:
        yield Finding(
            file.name, 1, "manifest", f"is no public distribution; they are {', '.join(DISTRIBUTIONS)}"
        )
        return
    own = {name.removeprefix(f"{folder}/") for name in manifest if name.startswith(f"{folder}/")}
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as archive:
            names = {name for name in archive.namelist() if not name.endswith("/")}
        info = {name for name in names if re.match(rf"{package}-[^/]+\.dist-info/", name)}
        names -= {name for name in info if name.partition("/")[2] in _WHEEL_INFO}
        expected = {name.removeprefix("src/") for name in own if name.startswith("src/")}
    else:
        with tarfile.open(file) as archive:
            names = {member.name.partition("/")[2] for member in archive if not member.isdir()}
        names = {name for name in names if not _SDIST_INFO.fullmatch(name)}
        expected = own
    for finding in equality(names, expected):
        yield finding._replace(path=f"{file.name}!{finding.path}")


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _objects(folder: Path) -> Iterator[tuple[str, str, bytes]]:
    """(kind, id, content) of every object in the repository's store, also of those that nothing refers to."""
    command = ["git", "-C", str(folder), "cat-file", "--batch-all-objects", "--batch"]
    stream = subprocess.run(command, capture_output=True, check=True).stdout
    place = 0
    while place < len(stream):
        end = stream.index(b"\n", place)
        name, kind, size = stream[place:end].decode("ascii").split()
        place = end + 1
        yield kind, name, stream[place : place + int(size)]
        place += int(size) + 1


def main(arguments: list[str]) -> int:
    """Check each path; 1 if anything was found, 2 if nothing was named."""
    fresh = "--clone" not in arguments
    arguments = [argument for argument in arguments if argument != "--clone"]
    if not arguments:
        print("error: name the folders, repositories or files to check", file=sys.stderr)
        return 2
    gates = Gates(Fingerprints.of(ROOT))
    found: list[Finding] = []
    for path in map(Path, arguments):
        if not path.exists():
            print(f"error: {path}: is not there", file=sys.stderr)
            return 2
        if path.is_dir():
            found += gates.tree(path)
            found += gates.repository(path, fresh=fresh) if (path / ".git").is_dir() else []
        else:
            found += gates.distribution(path)
    for finding in found:
        print(finding)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

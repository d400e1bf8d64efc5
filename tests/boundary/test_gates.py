"""Planted leaks: each one stops the export at its line, and a clean tree passes.

The tree is a small one with the real fingerprints, so every leak goes through the whole export.
"""

from __future__ import annotations

import codecs
import io
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from .disguised import DISGUISED
from .planted import CLEAN, COPIES, LEAKS, NOTES, PROMPT, README, SECRET, WIRE, Planted, b64

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts/export"))

import export_public  # noqa: E402
from export_public import ExportError, Leak, Manifest  # noqa: E402
from fingerprints import Fingerprints  # noqa: E402
from gates import Gates  # noqa: E402

EVERY = [*LEAKS, *DISGUISED]


@pytest.fixture(scope="session")
def fingerprints() -> Fingerprints:
    return Fingerprints.of(ROOT)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    for name, text in CLEAN.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def export(source: Path, out: Path, fingerprints: Fingerprints, message: str = "first\n") -> frozenset[str]:
    names = frozenset(p.relative_to(source).as_posix() for p in source.rglob("*") if not p.is_dir())
    manifest = Manifest(names, frozenset(), {}, frozenset())
    export_public.export(source, out, manifest, Gates(fingerprints), message=message, distributions=False)
    return names


def test_a_clean_tree_passes_and_has_one_commit(
    source: Path, tmp_path: Path, fingerprints: Fingerprints
) -> None:
    names = export(source, tmp_path / "out", fingerprints)
    log = subprocess.run(
        ["git", "log", "--format=%s"], cwd=tmp_path / "out", capture_output=True, text=True, check=True
    )
    assert log.stdout == "first\n"
    copied = {
        p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()
    }
    assert {name for name in copied if not name.startswith(".git/")} == names == set(CLEAN)
    for name, text in CLEAN.items():
        assert (tmp_path / "out" / name).read_text(encoding="utf-8") == text


def test_there_are_fifty_leaks_and_more() -> None:
    assert len({leak.title for leak in EVERY}) == len(EVERY) >= 50


@pytest.mark.parametrize("leak", EVERY, ids=lambda leak: leak.title)
def test_a_planted_leak_stops_the_export(
    leak: Planted, source: Path, tmp_path: Path, fingerprints: Fingerprints
) -> None:
    target = source / leak.file
    first_line = 1
    if isinstance(leak.content, str):
        before = target.read_text(encoding="utf-8") if not leak.file.endswith(".json") else ""
        first_line = before.count("\n") + 1
        target.write_text(before + leak.content, encoding="utf-8", newline="")
    else:
        target.write_bytes(leak.content(tmp_path) if callable(leak.content) else leak.content)
    with pytest.raises(Leak) as stopped:
        export(source, tmp_path / "out", fingerprints)
    in_tree = [f for f in stopped.value.findings if f.path.startswith(leak.file) and f.gate == leak.gate]
    assert in_tree, [str(f) for f in stopped.value.findings]
    assert any(f.line >= first_line for f in in_tree), [str(f) for f in in_tree]
    assert all(f.line >= first_line for f in stopped.value.findings if f.path.startswith(leak.file))
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".export-*"))


@pytest.mark.parametrize("message", ["Move regime_w away\n", f"Prompt\n\n{PROMPT}\n", f"{b64(SECRET)}\n"])
def test_a_leak_in_the_commit_message_stops_the_export(
    message: str, source: Path, tmp_path: Path, fingerprints: Fingerprints
) -> None:
    with pytest.raises(Leak) as stopped:
        export(source, tmp_path / "out", fingerprints, message)
    assert all(f.path.startswith(("git commit", ".git/")) for f in stopped.value.findings)
    assert not (tmp_path / "out").exists()


# The published repository, after the export


def git(folder: Path, *words: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@invalid"]
    subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)


def removed_again(folder: Path) -> None:
    (folder / "secret.py").write_text(COPIES)
    git(folder, "add", "secret.py")
    git(folder, "commit", "-m", "more")
    git(folder, "rm", "-q", "secret.py")
    git(folder, "commit", "-m", "less")


def unreachable(folder: Path) -> None:
    removed_again(folder)
    git(folder, "reset", "-q", "--hard", "HEAD~2")


def on_a_branch(folder: Path) -> None:
    git(folder, "checkout", "-q", "-b", "other")
    removed_again(folder)
    git(folder, "checkout", "-q", "main")


REPOSITORY_LEAKS: list[tuple[str, str, Callable[[Path], None]]] = [
    ("history only", "shingles", removed_again),
    ("an object that nothing refers to", "history", unreachable),
    ("another branch", "shingles", on_a_branch),
    ("a tag's message", "names", lambda folder: git(folder, "tag", "-a", "v1", "-m", "before regime_w")),
    ("a branch's name", "names", lambda folder: git(folder, "branch", "regime_w-fix")),
    ("a note", "names", lambda folder: git(folder, "notes", "add", "-m", "uses reward_service")),
    ("a remote's address", "names", lambda f: git(f, "remote", "add", "o", "https://host.invalid/regime_w")),
    ("a second commit", "history", lambda folder: git(folder, "commit", "--allow-empty", "-m", "harmless")),
    (
        "a hook",
        "history",
        lambda f: ((f / ".git/hooks").mkdir(), (f / ".git/hooks/pre-push").write_text("true"))[0],
    ),
    ("a description", "names", lambda folder: (folder / ".git/description").write_text("regime_w") and None),
]


@pytest.mark.parametrize(
    ("title", "gate", "plant"), REPOSITORY_LEAKS, ids=[leak[0] for leak in REPOSITORY_LEAKS]
)
def test_a_leak_in_the_repository_is_found(
    title: str,
    gate: str,
    plant: Callable[[Path], None],
    source: Path,
    tmp_path: Path,
    fingerprints: Fingerprints,
) -> None:
    names = export(source, tmp_path / "out", fingerprints)
    gates = Gates(fingerprints)
    assert gates.repository(tmp_path / "out", names) == []
    plant(tmp_path / "out")
    assert gate in {finding.gate for finding in gates.repository(tmp_path / "out", names)}


def test_a_clone_may_have_more_commits_and_the_samples_of_its_hooks(
    source: Path, tmp_path: Path, fingerprints: Fingerprints
) -> None:
    export(source, tmp_path / "out", fingerprints)
    git(tmp_path, "clone", "-q", str(tmp_path / "out"), str(tmp_path / "clone"))
    (tmp_path / "clone/.git/hooks").mkdir(exist_ok=True)
    (tmp_path / "clone/.git/hooks/pre-push.sample").write_text("true\n")
    git(tmp_path / "clone", "commit", "--allow-empty", "-m", "harmless")
    gates = Gates(fingerprints)
    assert gates.repository(tmp_path / "clone", fresh=False) == []
    assert {finding.gate for finding in gates.repository(tmp_path / "clone")} == {"history"}
    removed_again(tmp_path / "clone")
    assert "shingles" in {f.gate for f in gates.repository(tmp_path / "clone", fresh=False)}


# The manifest


@pytest.mark.parametrize("name", ["extra.py", "docs/.hidden", "tests/schemas/__pycache__/x.txt"])
def test_a_file_that_nobody_listed_is_found(
    name: str, source: Path, tmp_path: Path, fingerprints: Fingerprints
) -> None:
    (source / name).parent.mkdir(parents=True, exist_ok=True)
    (source / name).write_text("")
    found = Gates(fingerprints).tree(source, set(CLEAN))
    assert [(f.path, f.gate, f.what) for f in found] == [(name, "manifest", "is not in the manifest")]


def test_a_missing_file_and_a_link_are_found(source: Path, fingerprints: Fingerprints) -> None:
    (source / README).unlink()
    (source / NOTES).unlink()
    (source / NOTES).symlink_to("/etc/hostname")
    found = {(f.path, f.what.split()[0:2][1]) for f in Gates(fingerprints).tree(source, set(CLEAN))}
    assert found == {(README, "in"), (NOTES, "a")}


def wheel(folder: Path, name: str, members: dict[str, str]) -> Path:
    file = folder / name
    with zipfile.ZipFile(file, "w") as archive:
        for member, text in members.items():
            archive.writestr(member, text)
    return file


WHEEL = "looper_schemas-0.1.0-py3-none-any.whl"
MEMBERS = {
    "looper_schemas/scoring.py": CLEAN[WIRE],
    "looper_schemas-0.1.0.dist-info/METADATA": "Name: looper-schemas\n",
    "looper_schemas-0.1.0.dist-info/RECORD": "",
}


def test_a_clean_wheel_passes(tmp_path: Path, fingerprints: Fingerprints) -> None:
    assert Gates(fingerprints).distribution(wheel(tmp_path, WHEEL, MEMBERS), set(CLEAN)) == []


@pytest.mark.parametrize(
    ("name", "change", "gate"),
    [
        (WHEEL, {"looper_schemas/extra.py": ""}, "manifest"),
        (WHEEL, {"other/x.py": ""}, "manifest"),
        (WHEEL, {"looper_schemas/scoring.py": COPIES}, "shingles"),
        (
            WHEEL,
            {"looper_schemas-0.1.0.dist-info/METADATA": "Requires-Dist: looper-reward-service\n"},
            "names",
        ),
        (WHEEL, {"looper_schemas-0.1.0.dist-info/notes.txt": ""}, "manifest"),
        ("looper_reward_service-0.1.0-py3-none-any.whl", {}, "manifest"),
    ],
)
def test_a_wheel_with_more_than_its_files_is_refused(
    name: str, change: dict[str, str], gate: str, tmp_path: Path, fingerprints: Fingerprints
) -> None:
    found = Gates(fingerprints).distribution(wheel(tmp_path, name, MEMBERS | change), set(CLEAN))
    assert gate in {finding.gate for finding in found}


def test_a_wheel_without_a_file_is_refused(tmp_path: Path, fingerprints: Fingerprints) -> None:
    members = {name: text for name, text in MEMBERS.items() if not name.endswith("scoring.py")}
    found = Gates(fingerprints).distribution(wheel(tmp_path, WHEEL, members), set(CLEAN))
    assert [f.path for f in found] == [f"{WHEEL}!looper_schemas/scoring.py"]


def test_an_sdist_is_its_folder_and_its_metadata(tmp_path: Path, fingerprints: Fingerprints) -> None:
    file = tmp_path / "looper_schemas-0.1.0.tar.gz"

    def build(*more: str) -> None:
        with tarfile.open(file, "w:gz") as archive:
            for name in ("PKG-INFO", "src/looper_schemas/scoring.py", *more):
                archive.addfile(tarfile.TarInfo(f"looper_schemas-0.1.0/{name}"), io.BytesIO())

    build()
    assert Gates(fingerprints).distribution(file, set(CLEAN)) == []
    build("tests/secret.py")
    assert [f.gate for f in Gates(fingerprints).distribution(file, set(CLEAN))] == ["manifest"]


@pytest.mark.parametrize("row", ["/etc/passwd", "../x", "trainer/*.py", "README.md\nREADME.md", "own ../x"])
def test_a_manifest_names_plain_paths_once(row: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.txt").write_text(row + "\n")
    with pytest.raises(ExportError):
        export_public.read_manifest(tmp_path / "manifest.txt")


def test_an_existing_folder_is_never_replaced(
    source: Path, tmp_path: Path, fingerprints: Fingerprints
) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ExportError, match="exists"):
        export(source, tmp_path / "out", fingerprints)


def test_a_moved_private_folder_is_an_error_and_no_silence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="matches no private source"):
        Fingerprints.of(tmp_path)


def test_the_real_tree_passes_every_gate(tmp_path: Path, fingerprints: Fingerprints) -> None:
    manifest = export_public.read_manifest(ROOT / "scripts/export/manifest.txt")
    export_public.export(ROOT, tmp_path / "out", manifest, Gates(fingerprints), distributions=False)
    assert (tmp_path / "out/coherence_service/compute_reward.py").is_file()
    assert not [
        p for p in (tmp_path / "out").rglob("*") if codecs.encode("erjneq_freivpr", "rot13") in p.name
    ]

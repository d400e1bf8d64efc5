"""What makes private code recognisable: names, identifiers, unusual numbers, and shingles of its texts.

All of it is computed here, from the private sources, each time; nothing of it is stored or published.

A shingle is 20 consecutive words of a text, letter case and punctuation aside, so that neither a formatter
nor a line break nor a comment sign hides it. Prompts and docstrings are taken as the program sees them,
joined and unescaped; a shorter string of 10 words or more is one shingle. Import lines and rows of few
different words are no fingerprints.
"""

from __future__ import annotations

import ast
import base64
import codecs
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from shown import constant_text

SHINGLE = 20
SHORTEST = 10
DISTINCT = 7  # different words that a shingle must have
_WORD = re.compile(r"\w+")
_NUMBER = re.compile(
    r"(?<![\w.])(?:(0[xX][0-9a-fA-F_]+)|((?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)[ ]?(%?))(?!\w)"
)
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{9,}")
_HYPHENATED = re.compile(r"[a-z]+(?:-[a-z0-9]+)+")
_CAPITAL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


class Shingle(NamedTuple):
    """Consecutive words: the hash of the first SHORTEST of them, how many there are, the hash of all."""

    opening: int
    length: int
    value: int


class NumberGroup(NamedTuple):
    """Numbers of which `at_least` so many close together give a private setting away."""

    what: str
    values: Counter[float]
    at_least: int
    within_lines: int


@dataclass(frozen=True)
class Sum:
    """Named numbers close together whose weighted sum is zero: few such records give the weights away."""

    what: str
    weights: Mapping[str, float]
    tolerance: float
    within_lines: int

    def hits(self, lines: Sequence[str]) -> Iterator[tuple[int, str, str]]:
        """(line, gate, what) of each record that the weights solve."""
        named = re.compile(
            rf"(?<![A-Za-z0-9])({'|'.join(map(re.escape, self.weights))})(?![A-Za-z0-9_])"
            r"[\"'`]?\s*(?::|=|\||,)?\s*(None|null|-?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(?!\w|\.\d)"
        )
        last: dict[str, tuple[int, float]] = {}
        for number, row in enumerate(lines, start=1):
            for name, literal in named.findall(row):
                last[name] = (number, float(literal) if literal[0] not in "Nn" else 0.0)
                near = {
                    key: value for key, (line, value) in last.items() if number - line < self.within_lines
                }
                if near.keys() != self.weights.keys() or len(set(near.values())) == 1:
                    continue
                if abs(sum(weight * near[key] for key, weight in self.weights.items())) <= self.tolerance:
                    yield number, "numbers", f"has {self.what}"
                    last.clear()


@dataclass(frozen=True)
class Fingerprints:
    """What to look for. `shingles` maps the hash of a shingle's first words to its length and its hash."""

    names: re.Pattern[str]
    disguised: tuple[str, ...] = ()
    identifiers: frozenset[str] = frozenset()
    numbers: frozenset[float] = frozenset()
    groups: tuple[NumberGroup, ...] = ()
    sums: tuple[Sum, ...] = ()
    shingles: Mapping[int, frozenset[tuple[int, int]]] = field(default_factory=dict)

    @classmethod
    def of(cls, root: Path, terms: Path | None = None) -> Fingerprints:
        """Fingerprints of the private code below `root`.

        Raises:
            FileNotFoundError: a glob of the terms matches nothing; a moved folder must not go unnoticed.
        """
        config: dict[str, Any] = tomllib.loads(
            (terms or Path(__file__).with_name("private_terms.toml")).read_text()
        )
        sources, vocabulary = (_files(root, config[key]) for key in ("sources", "vocabulary"))
        shingles: dict[int, set[tuple[int, int]]] = {}
        shared = {
            found
            for file in _files(root, config.get("shared_scripts", []))
            for found in _shingles_of_file(file)
        }
        for file in sources:
            script = file.is_relative_to(root / "benchmarks/private")
            for shingle in _shingles_of_file(file):
                if not (script and shingle in shared):
                    shingles.setdefault(shingle.opening, set()).add((shingle.length, shingle.value))
        trees = [ast.parse(file.read_text(encoding="utf-8")) for file in vocabulary]
        return cls(
            names=re.compile("|".join(config["names"]), re.IGNORECASE),
            disguised=tuple(d for name in config["disguised"] for d in disguises(name)),
            identifiers=frozenset(name for tree in trees for name in _own_identifiers(tree))
            - set(config["shared_identifiers"]),
            numbers=frozenset(value for tree in trees for value in _unusual_numbers(tree))
            - set(config["shared_numbers"]),
            groups=tuple(
                NumberGroup(g["what"], Counter(map(float, g["values"])), g["at_least"], g["within_lines"])
                for g in config["numbers"]
            ),
            sums=tuple(
                Sum(
                    one["what"],
                    dict(zip(one["names"], one["weights"], strict=True)),
                    one["tolerance"],
                    one["within_lines"],
                )
                for one in config.get("sums", [])
            ),
            shingles={opening: frozenset(found) for opening, found in shingles.items()},
        )

    def hits(self, text: str) -> Iterator[tuple[int, str, str]]:
        """(line, gate, what) of everything private in `text`."""
        lines = text.split("\n")
        lowered = text.lower()
        hidden = [name for name in self.disguised if name in lowered]
        named = self.names.search(text) is not None  # most texts have none: rows are asked only then
        for number, row in enumerate(lines, start=1):
            if named and (match := self.names.search(row)):
                yield number, "names", f"has {match[0]!r}"
            for name in hidden:
                if name in row.lower():
                    yield number, "names", f"has {name!r}, a private name in disguise"
            for word in _identifiers_in(row) & self.identifiers:
                yield number, "identifiers", f"has the private identifier {word}"
        yield from self._number_hits(lines)
        for each in self.sums:
            yield from each.hits(lines)
        yield from self._shingle_hits(text)

    def _number_hits(self, lines: list[str]) -> Iterator[tuple[int, str, str]]:
        found = [(number, value) for number, row in enumerate(lines, start=1) for value in numbers_in(row)]
        for number, value in found:
            if value in self.numbers:
                yield number, "numbers", f"has the private constant {value!r}"
        for group in self.groups:
            wanted = [(number, value) for number, value in found if value in group.values]
            for place, (number, _) in enumerate(wanted):
                near = Counter(v for line, v in wanted[place:] if line < number + group.within_lines)
                if (near & group.values).total() >= group.at_least:
                    yield number, "numbers", f"has {group.what}"
                    break

    def _shingle_hits(self, text: str) -> Iterator[tuple[int, str, str]]:
        words, places = [], []
        for match in _WORD.finditer(text):
            words.append(match[0].casefold())
            places.append(match.start())
        reported = -1
        for start in range(len(words)):
            if start <= reported:
                continue
            for length, value in self.shingles.get(hash(tuple(words[start : start + SHORTEST])), ()):
                if start + length <= len(words) and hash(tuple(words[start : start + length])) == value:
                    reported = start + length
                    yield (
                        text.count("\n", 0, places[start]) + 1,
                        "shingles",
                        f"repeats {length} words of a private text: {' '.join(words[start : start + 6])} ...",
                    )
                    break


def numbers_in(row: str) -> list[float]:
    """The numbers written in one line, without their signs; a percentage is also the share that it means."""
    found = []
    for hexadecimal, decimal, percent in _NUMBER.findall(row):
        found.append(float(int(hexadecimal, 16) if hexadecimal else decimal.replace("_", "")))
        if percent:
            found.append(found[-1] / 100)
    return found


def disguises(name: str) -> Iterator[str]:
    """`name` backwards, turned by 13 letters, in hex, and in base64 at its three places, in small letters."""
    yield name[::-1].lower()
    yield codecs.encode(name, "rot13").lower()
    yield name.encode().hex()
    for before in range(3):
        letters = base64.b64encode(b"\0" * before + name.encode()).decode()
        first, last = (0, 2, 3)[before], (len(name) + before) * 8 // 6  # what depends on no neighbour
        yield letters[first:last].lower()


def _identifiers_in(row: str) -> set[str]:
    """The words of one line that may be identifiers; with hyphens or capitals between their parts, too."""
    words = set(_IDENTIFIER.findall(row))
    others = {word.replace("-", "_") for word in _HYPHENATED.findall(row)}
    others |= {_CAPITAL.sub("_", word).lower() for word in words if word[0].islower()}
    return words | others


def _files(root: Path, globs: Iterable[str]) -> list[Path]:
    found: set[Path] = set()
    for glob in globs:
        matched = {path for path in root.glob(glob) if path.is_file() and not path.is_symlink()}
        if not matched:
            raise FileNotFoundError(f"{glob} matches no private source below {root}; mend private_terms.toml")
        found |= matched
    return sorted(found)


def _shingles_of_file(file: Path) -> Iterator[Shingle]:
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        lines = text.split("\n")
        strings = []
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                for number in range(node.lineno - 1, node.end_lineno or node.lineno):
                    lines[number] = ""
            elif isinstance(node, ast.Constant | ast.BinOp | ast.JoinedStr | ast.Call):
                strings.append(constant_text(node) or "")
        text = "\n".join(lines)
    else:
        strings = re.split(r"\n\s*\n", text)
    yield from shingles(text, whole=False)
    for string in strings:
        yield from shingles(string, whole=True)


def shingles(text: str, *, whole: bool) -> Iterator[Shingle]:
    """The shingles of `text`; a short `whole` text is one of its own length."""
    words = [word.casefold() for word in _WORD.findall(text)]
    if SHORTEST <= len(words) < SHINGLE and whole and len(set(words)) >= DISTINCT:
        yield Shingle(hash(tuple(words[:SHORTEST])), len(words), hash(tuple(words)))
    for start in range(len(words) - SHINGLE + 1):
        row = words[start : start + SHINGLE]
        if len(set(row)) >= DISTINCT:
            yield Shingle(hash(tuple(row[:SHORTEST])), SHINGLE, hash(tuple(row)))


def _own_identifiers(tree: ast.AST) -> Iterator[str]:
    """Names that the module defines, and strings that look like names, of two parts or more."""
    for node in ast.walk(tree):
        names: list[str] = []
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names = [name]
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                names = [name]
            case ast.Constant(value=str() as name):
                names = [name]
        for name in names:
            if _IDENTIFIER.fullmatch(name) and not name.startswith("__") and _compound(name):
                yield name


def _compound(name: str) -> bool:
    parts = [part for part in re.split(r"_|(?<=[a-z0-9])(?=[A-Z])", name) if part]
    return len(parts) >= 2


def _unusual_numbers(tree: ast.AST) -> Iterator[float]:
    """Constants of five significant digits or more: rare enough to be a fingerprint alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            digits = f"{node.value!r}".lower().split("e")[0].replace(".", "").strip("0")
            if len(digits) >= 5 and abs(node.value) < 1e30:
                yield float(node.value)

"""Scan public source for what import-linter cannot see: dynamic imports and private names in strings.

`python scripts/import_rules.py` prints `file:line: what` for each violation and exits 1 if there is one.
Public code may not load a module by a computed name, nor spell the name of a private package anywhere:
in an import, an identifier, a string or an attribute. Docstrings and comments count too.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PUBLIC_PACKAGES = (
    "shared_schemas/src/looper_schemas",
    "trainer/src/looper_trainer",
    "eval/src/looper_eval",
)
PUBLIC_TESTS = ("tests/schemas", "tests/trainer", "tests/eval")
PRIVATE_NAMES = re.compile(r"\b(regime_w|reward_service)\b")
DYNAMIC_IMPORTS = {
    "import_module",
    "__import__",
    "exec",
    "eval",
    "run_module",
    "run_path",
    "find_spec",
    "compile_command",
}
ALLOWED_IMPORTS = {
    "looper_schemas": {"looper_schemas"},
    "looper_trainer": {"looper_schemas", "looper_trainer"},
    "looper_eval": {"looper_schemas", "looper_eval", "looper_trainer"},
}
EVAL_MAY_USE = ("looper_trainer.sampling", "looper_trainer.reward_client", "looper_trainer.errors")
WORKSPACE = {"looper_schemas", "looper_trainer", "looper_eval"}


class Violation(NamedTuple):
    """One line of public source that breaks a rule."""

    file: Path
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}"


def scan_source(source: str, file: Path, package: str | None) -> Iterator[Violation]:
    """Violations in one file's text; `package` is the workspace package it belongs to, if any."""
    for number, line in enumerate(source.splitlines(), start=1):
        if match := PRIVATE_NAMES.search(line):
            yield Violation(file, number, f"names the private package {match[0]}")
    for node in ast.walk(ast.parse(source, filename=str(file))):
        if (
            isinstance(node, ast.Call)
            and _called_name(node) in DYNAMIC_IMPORTS
            and not _is_constant_call(node)
        ):
            yield Violation(file, node.lineno, f"calls {_called_name(node)}() with a computed name")
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            joined = node.value.replace("-", "_")
            if PRIVATE_NAMES.search(joined) and not PRIVATE_NAMES.search(
                source.splitlines()[node.lineno - 1]
            ):
                yield Violation(file, node.lineno, "spells a private package in a string")
        if package is not None:
            yield from _forbidden_imports(node, file, package)


def _called_name(node: ast.Call) -> str | None:
    if isinstance(node.func, ast.Name):
        return node.func.id
    if isinstance(node.func, ast.Attribute):
        # `model.eval()` and `re.compile()` are methods, not the builtins of the same name.
        return node.func.attr if node.func.attr not in {"eval", "exec"} else None
    return None


def _is_constant_call(node: ast.Call) -> bool:
    return bool(node.args) and isinstance(node.args[0], ast.Constant)


def _forbidden_imports(node: ast.AST, file: Path, package: str) -> Iterator[Violation]:
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        if node.level:
            yield Violation(file, node.lineno, "imports relatively; write the whole module name")
            return
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
        return
    for name in names:
        top = name.split(".")[0]
        if top not in WORKSPACE or top == package:
            continue
        allowed = top in ALLOWED_IMPORTS[package]
        if package == "looper_eval" and top == "looper_trainer":
            allowed = name.startswith(EVAL_MAY_USE)
        if not allowed:
            yield Violation(file, node.lineno, f"{package} may not import {name}")


def scan(root: Path, folders: Iterable[str]) -> list[Violation]:
    """Violations in every Python file below `folders` of `root`."""
    found: list[Violation] = []
    for folder in folders:
        package = Path(folder).name if "/src/" in folder else None
        for file in sorted((root / folder).rglob("*.py")):
            found += scan_source(file.read_text(encoding="utf-8"), file.relative_to(root), package)
    return found


def main() -> int:
    violations = scan(ROOT, (*PUBLIC_PACKAGES, *PUBLIC_TESTS))
    for violation in violations:
        print(violation)
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())

"""The table of hand-labelled grader cases."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_name("grader_cases.txt")
_CODE_POINT = re.compile("⟨([0-9A-F]{4})⟩")


class GraderCase(NamedTuple):
    """A text, the answer it states (None: no answer), a number it must not be credited for, and why."""

    category: str
    text: str
    answer: str | None
    trap: str | None
    reason: str
    line: int


def read_cases() -> list[GraderCase]:
    """Every case of the table, in its order."""
    cases: list[GraderCase] = []
    category = ""
    for number, line in enumerate(TABLE.read_text(encoding="utf-8").split("\n"), start=1):
        if line.startswith("## "):
            category = line.removeprefix("## ")
        elif category and line:
            text, answer, trap, reason = re.split(r" ?\| ", line)
            text = _CODE_POINT.sub(lambda found: chr(int(found[1], 16)), text.replace("⏎", "\n"))
            cases.append(
                GraderCase(category, text, _given(answer), _given(trap), reason, number),
            )
    return cases


def _given(field: str) -> str | None:
    return None if field == "—" else field

"""Evaluation questions: from a local JSONL file or from the hub, with the facts that breakdowns need.

Local lines are either GSM8K's own (`question`, `answer` ending in `#### 72`) or `looper_schemas` problems
(`id`, `question`, `answer`, `cot`). The digest covers every question of the source, before `limit`, so
that a run may be widened but never continued on other questions.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from looper_schemas.records import Record, RecordError, read_objects, what_is_wrong
from looper_schemas.scoring import MAX_ID_CHARS, MAX_TEXT_CHARS
from looper_trainer.errors import UserError

HUB_CONFIGS = {"openai/gsm8k": "main", "madrylab/gsm8k-platinum": "main"}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_CALCULATOR = re.compile(r"<<[^<>]*>>")
_EQUATION = re.compile(r"=\s*[^\s=\d]{0,2}\s*\d[\d.,]*+(?!\s*[-+*/×÷])")


class EvalQuestion(Record):
    """A question, its gold number, and its worked solution (without the final-answer line)."""

    id: Annotated[str, Field(max_length=MAX_ID_CHARS)]
    question: Annotated[str, Field(max_length=MAX_TEXT_CHARS)]
    answer: str
    solution: str = ""
    cleaning_status: str | None = None

    @property
    def solution_lines(self) -> int:
        """Non-empty lines of the worked solution: the natural difficulty of a GSM8K question."""
        return sum(1 for line in self.solution.splitlines() if line.strip())

    @property
    def calculator_steps(self) -> int:
        """Calculator annotations `<<a=b>>`; equations `... = number` where the solution carries none."""
        return len(_CALCULATOR.findall(self.solution)) or len(_EQUATION.findall(self.solution))


@dataclass(frozen=True)
class Dataset:
    """Questions to ask, where they come from, and the digest of all questions of that source."""

    source: str
    digest: str
    questions: tuple[EvalQuestion, ...]


def load_dataset(source: str, limit: int | None = None) -> Dataset:
    """The first `limit` questions of `source`: a JSONL file, or a hub name such as `openai/gsm8k`.

    Raises:
        UserError: no such source, no questions, or a row that holds no question or no answer.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit is {limit}; ask at least one question")
    path = Path(source)
    if path.is_file():
        rows, name = _read_jsonl(path), f"{path.stem}"
    elif path.suffix not in {".jsonl", ".json"} and _HUB_NAME.fullmatch(source):
        rows, name = _read_hub(source), f"{source.rpartition('/')[2]}/test"
    elif path.is_dir():
        raise UserError(f"{source}: is a folder; name a JSONL file in it")
    else:
        raise UserError(
            f"{source}: no such dataset file; give a JSONL file or a hub name such as openai/gsm8k"
        )
    questions = tuple(_question(row, f"{name}/{index}", where) for index, (where, row) in enumerate(rows))
    if not questions:
        raise UserError(f"{source}: holds no questions; name another dataset")
    _refuse_repeated_ids(source, questions)
    return Dataset(source=source, digest=questions_digest(questions), questions=questions[:limit])


def questions_digest(questions: Iterable[EvalQuestion]) -> str:
    """SHA-256 over ids, questions and gold answers, in order."""
    digest = hashlib.sha256()
    for item in questions:
        digest.update(json.dumps([item.id, item.question, item.answer]).encode())
    return digest.hexdigest()


def _read_jsonl(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    try:
        return [(f"{path}:{number}", row) for number, row in read_objects(path)]
    except RecordError as error:
        raise UserError(str(error)) from None


def _read_hub(name: str) -> list[tuple[str, Mapping[str, Any]]]:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"reading {name} from the hub needs `pip install 'looper-eval[local]'`; or give a JSONL file"
        ) from None
    try:
        table = datasets.load_dataset(name, HUB_CONFIGS.get(name), split="test")
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise UserError(
            f"cannot load {name} from the hub ({reason}); check the name or give a JSONL file"
        ) from None
    return [(f"{name} row {index}", row) for index, row in enumerate(table)]


def _question(row: Mapping[str, Any], fallback_id: str, where: str) -> EvalQuestion:
    question, answer = row.get("question"), row.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{where}: has no question; mend or remove this line")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, str) or not answer.strip():
        raise UserError(f"{where}: has no answer; mend or remove this line")
    solution, marker, gold = answer.rpartition("####")
    if not marker:
        solution = str(row.get("cot") or row.get("solution") or "")
    gold = gold.strip()
    if "\n" in gold or not any(character.isdigit() for character in gold):
        raise UserError(
            f"{where}: its answer states no number; end it with '#### 72' or give the number alone"
        )
    status = row.get("cleaning_status")
    try:
        return EvalQuestion(
            id=str(row.get("id") or fallback_id),
            question=question,
            answer=gold,
            solution=solution.strip(),
            cleaning_status=None if status is None else str(status),
        )
    except ValidationError as error:
        raise UserError(f"{where}: {what_is_wrong(error)}") from None


def _refuse_repeated_ids(source: str, questions: Iterable[EvalQuestion]) -> None:
    seen: set[str] = set()
    for item in questions:
        if item.id in seen:
            raise UserError(f"{source}: the id {item.id!r} is used twice; give each question its own")
        seen.add(item.id)

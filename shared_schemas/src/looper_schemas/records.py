"""Records of every JSONL file that Looper writes, and their reading and writing.

One line is one record. A reader names the file and the line of the first bad record and says what is
wrong with it; a writer flushes whole lines, so that an interrupted file loses at most its last one.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from looper_schemas.scoring import Scores


class Record(BaseModel):
    """Base of every record: immutable, closed, finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Problem(Record):
    """A question with its gold answer and worked solution (`cot`, without the final-answer line)."""

    id: Annotated[str, Field(min_length=1)]
    question: Annotated[str, Field(min_length=1)]
    answer: Annotated[str, Field(min_length=1)]
    cot: str = ""


class Trajectory(Record):
    """One sampled completion. `reward` is None when the service could not score it, never zero."""

    output: str
    final_answer: str | None
    reward: float | None
    finish_reason: str | None = None
    tokens_out: int | None = None
    seed: int | None = None


class RolloutRecord(Record):
    """All trajectories of one question, from one policy, scored by one scorer."""

    id: str
    question: str
    gold_answer: str
    trajectories: tuple[Trajectory, ...]
    scores: Scores | None = None
    policy: str
    scorer_id: str | None = None
    reward_mode: str | None = None
    contract: str = "1.0"


class EvalRecord(Record):
    """One model's answer to one evaluation question. An unparsed answer is wrong, and recorded as None.

    `sample` counts the answers of one model to one question from 0; accuracy takes one each by default.
    """

    id: str
    question: str
    gold_answer: str
    output: str
    final_answer: str | None
    correct: bool
    finish_reason: str | None = None
    tokens_out: int | None = None
    graders: dict[str, bool] = {}
    settings_digest: str
    sample: Annotated[int, Field(ge=0)] = 0


RecordT = TypeVar("RecordT", bound=Record)


class RecordError(ValueError):
    """A file that does not hold the records it should; the message is one line that says what to do."""


def read_records(path: Path, kind: type[RecordT]) -> list[RecordT]:
    """Every record of the JSONL file at `path`.

    Raises:
        RecordError: the file is missing, empty, or a line is not a `kind`.
    """
    if not path.is_file():
        raise RecordError(f"{path}: no such file")
    records = list(_parse_lines(path, kind))
    if not records:
        raise RecordError(f"{path}: holds no records; write at least one JSON line")
    return records


def _parse_lines(path: Path, kind: type[RecordT]) -> Iterator[RecordT]:
    with path.open("rb") as lines:  # bytes, so that a line that is no UTF-8 is named like any other bad line
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                yield kind.model_validate_json(line)
            except ValidationError as error:
                first = error.errors(include_url=False, include_input=False)[0]
                where = ".".join(str(part) for part in first["loc"]) or "line"
                message = f"{path}:{number}: {where}: {first['msg']}; mend or remove this line"
                raise RecordError(message) from None


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write `records` to `path` through a temporary file, so that a reader never sees half of them.

    When that fails, the file that was there before stays, and nothing else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as out:
            for record in records:
                out.write(to_line(record))
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def to_line(record: Record) -> str:
    """`record` as one JSON line with its newline."""
    payload: dict[str, Any] = record.model_dump(mode="json")
    return json.dumps(payload, ensure_ascii=False) + "\n"

"""Records of every JSONL file that Looper writes, and their reading and writing.

One line is one record. A reader names the file and the line of the first bad record and says what is
wrong with it; a writer flushes whole lines, so that an interrupted file loses at most its last one.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from looper_schemas.scoring import MAX_ANSWER_CHARS, MAX_ID_CHARS, MAX_TEXT_CHARS, Scores


class Record(BaseModel):
    """Base of every record: immutable, closed, finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Problem(Record):
    """A question with its gold answer and worked solution (`cot`, without the final-answer line).

    What goes over the wire has the wire's bounds.
    """

    id: Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS)]
    question: Annotated[str, Field(min_length=1, max_length=MAX_TEXT_CHARS)]
    answer: Annotated[str, Field(min_length=1, max_length=MAX_ANSWER_CHARS)]
    cot: str = ""

    @model_validator(mode="before")
    @classmethod
    def _is_prepared(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and "####" in str(fields.get("answer")):
            raise ValueError("GSM8K's own line, with '####' in the answer; run looper prepare-data first")
        return fields


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
LineT = TypeVar("LineT")
_OBJECT = TypeAdapter(dict[str, Any])


class RecordError(ValueError):
    """A file that does not hold the records it should; the message is one line that says what to do."""


def read_records(path: Path, kind: type[RecordT]) -> list[RecordT]:
    """Every record of the JSONL file at `path`.

    Raises:
        RecordError: the file is missing, empty, or a line is not a `kind`.
    """
    return [record for _, record in _parse_lines(path, kind.model_validate_json)]


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the line from 1, JSON object) of the JSONL file at `path`, one after the other.

    Raises:
        RecordError: the file is missing, empty, or a line is no JSON object.
    """
    return _parse_lines(path, _OBJECT.validate_json)


def _parse_lines(path: Path, parse: Callable[[bytes], LineT]) -> Iterator[tuple[int, LineT]]:
    if path.is_dir():
        raise RecordError(f"{path}: is a folder; name a JSONL file")
    if not path.is_file():
        raise RecordError(f"{path}: no such file")
    empty = True
    with path.open("rb") as lines:  # bytes, so that a line that is no UTF-8 is named like any other bad line
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            if empty and line.lstrip().startswith(b"["):
                raise RecordError(f"{path}: is a JSON array; write each object of it on a line of its own")
            empty = False
            try:
                yield number, parse(line)
            except ValidationError as error:
                raise RecordError(f"{path}:{number}: {what_is_wrong(error)}") from None
    if empty:
        raise RecordError(f"{path}: holds no records; write at least one JSON line")


def what_is_wrong(error: ValidationError) -> str:
    """The first of a line's errors: its field, what is wrong, what to do."""
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "value_error":  # one of ours, which says what to do
        return first["msg"].removeprefix("Value error, ")
    where = ".".join(str(part) for part in first["loc"]) or "line"
    message = first["msg"].replace(" at line 1 column ", " at column ")
    return f"{where}: {message}; mend or remove this line"


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

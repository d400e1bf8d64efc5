"""Ask each question once and append each answer as it comes.

A record is one line, written whole and flushed to disk; a line cut short by a kill is dropped on the next
start and its question asked again, no other. Batches are fixed slices of the dataset, so that a resumed
run asks in the same company as an uninterrupted one. Records of other settings are refused, never mixed.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pydantic import ValidationError

from looper_eval.dataset import EvalQuestion
from looper_eval.engines import Answer, Engine
from looper_eval.grading import platinum_match, robust_match
from looper_eval.settings import Settings
from looper_schemas.answers import extract_answer
from looper_schemas.records import EvalRecord, to_line
from looper_trainer.errors import UserError


class Unfinished(UserError):
    """A model has not answered every question yet."""


def grade(question: EvalQuestion, answer: Answer, settings_digest: str) -> EvalRecord:
    """The record of one answer.

    `graders` hold each grader's verdict on the text alone. `correct` is the robust grader's, and false for a
    truncated answer: what a model says before it is cut off is not its final answer.
    """
    robust = robust_match(answer.text, question.answer)
    return EvalRecord(
        id=question.id,
        question=question.question,
        gold_answer=question.answer,
        output=answer.text,
        final_answer=extract_answer(answer.text),
        correct=robust and answer.finish_reason == "stop",
        finish_reason=answer.finish_reason,
        tokens_out=answer.tokens_out,
        graders={"robust": robust, "platinum": platinum_match(answer.text, question.answer)},
        settings_digest=settings_digest,
    )


def answer_all(
    path: Path,
    questions: Sequence[EvalQuestion],
    settings: Settings,
    settings_digest: str,
    open_engine: Callable[[], Engine],
    *,
    batch_size: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Bring the record file at `path` to one record for each of `questions`.

    Args:
        open_engine: loads the model; called only when something is left to ask.
        on_progress: told how many of `questions` have a record, at the start and after each batch.

    Raises:
        UserError: the file holds records of other settings or questions, or another run is writing it.
    """
    with _opened_alone(path) as file:
        answered = set(_resumable(file, path, questions, settings_digest))
        on_progress(len(answered))
        batches = [questions[start : start + batch_size] for start in range(0, len(questions), batch_size)]
        batches = [[item for item in batch if item.id not in answered] for batch in batches]
        batches = [batch for batch in batches if batch]
        if not batches:
            return
        engine = open_engine()
        try:
            for batch in batches:
                seeds = [settings.question_seed(item.id) for item in batch]
                answers = engine.answer([item.question for item in batch], seeds)
                records = [
                    grade(item, one, settings_digest) for item, one in zip(batch, answers, strict=True)
                ]
                file.write("".join(map(to_line, records)).encode())
                file.flush()
                os.fsync(file.fileno())
                answered.update(item.id for item in batch)
                on_progress(len(answered))
        finally:
            engine.close()


def load_answers(path: Path, questions: Sequence[EvalQuestion], settings_digest: str) -> list[EvalRecord]:
    """The finished record of each of `questions`, in their order.

    Raises:
        Unfinished: a question has no record.
        UserError: the file holds records of other settings or questions.
    """
    if not path.is_file():
        raise Unfinished(f"{path}: no such file; run `looper-eval run` for this model first")
    with path.open("rb") as file:
        found = _resumable(file, path, questions, settings_digest)
    if missing := len(questions) - len(found):
        raise Unfinished(
            f"{path}: {missing} of {len(questions)} questions have no answer yet; run the same command again"
        )
    return [found[item.id] for item in questions]


def _resumable(
    file: BinaryIO, path: Path, questions: Sequence[EvalQuestion], settings_digest: str
) -> dict[str, EvalRecord]:
    """Records of `questions` by id; a last line without newline is cut off where `file` can be written."""
    asked = {item.id: item for item in questions}
    file.seek(0)
    content = file.read()
    whole = content.rfind(b"\n") + 1
    if whole < len(content) and file.writable():
        file.truncate(whole)
    found: dict[str, EvalRecord] = {}
    for number, line in enumerate(content[:whole].split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = EvalRecord.model_validate_json(line)
        except ValidationError:
            raise UserError(
                f"{path}:{number}: is no evaluation record; use another --out or remove the file"
            ) from None
        if record.settings_digest != settings_digest:
            raise UserError(
                f"{path}:{number}: was answered with other settings or by another model; use another --out"
            )
        item = asked.get(record.id)
        if item is None:
            continue  # asked by a run with a larger --limit
        if (record.question, record.gold_answer) != (item.question, item.answer):
            raise UserError(
                f"{path}:{number}: {record.id} is another question than in the dataset; use another --out"
            )
        if record.id in found:
            raise UserError(f"{path}:{number}: {record.id} is answered twice; remove one of the lines")
        found[record.id] = record
    return found


@contextmanager
def _opened_alone(path: Path) -> Iterator[BinaryIO]:
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{path}: another looper-eval run is writing it; wait for it or use another --out"
            ) from None
        yield file

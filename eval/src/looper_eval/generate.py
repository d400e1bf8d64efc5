"""Ask each question and append each answer as it comes.

A record is one line, written whole; a line cut short by a kill is dropped on the next start and its answer
asked for again, no other. What is written survives the death of the process at once, and that of the
machine after at most a second. Batches are fixed slices of the dataset, so that a resumed run asks in the
same company as an uninterrupted one. Records of other settings are refused, never mixed.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pydantic import ValidationError

from looper_eval.dataset import EvalQuestion
from looper_eval.engines import Answer, Ask, Engine
from looper_eval.grading import platinum_match, robust_match
from looper_eval.settings import Settings
from looper_schemas.answers import extract_answer
from looper_schemas.records import EvalRecord, to_line
from looper_trainer.errors import UserError

_SYNC_EVERY_S = 1.0
Key = tuple[str, int]
"""Question id and sample number of a record."""


class Unfinished(UserError):
    """A model has not answered every question yet."""


class _Wanted(NamedTuple):
    """A question and the numbers of the samples that have no record yet."""

    item: EvalQuestion
    samples: tuple[int, ...]


def grade(question: EvalQuestion, answer: Answer, settings_digest: str, sample: int = 0) -> EvalRecord:
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
        correct=robust and answer.finish_reason != "length",
        finish_reason=answer.finish_reason,
        tokens_out=answer.tokens_out,
        graders={"robust": robust, "platinum": platinum_match(answer.text, question.answer)},
        settings_digest=settings_digest,
        sample=sample,
    )


def answer_all(
    path: Path,
    questions: Sequence[EvalQuestion],
    settings: Settings,
    settings_digest: str,
    open_engine: Callable[[], Engine],
    *,
    batch_size: int,
    samples: int = 1,
    on_progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Bring the record file at `path` to `samples` records for each of `questions`.

    Args:
        open_engine: loads the model; called only when something is left to ask.
        on_progress: told how many of the records are there, at the start and whenever some are added.

    Raises:
        UserError: the file holds records of other settings or questions, or another run is writing it.
    """
    with _opened_alone(path) as file:
        answered = set(_resumable(file, path, questions, settings_digest, samples))
        on_progress(len(answered))
        batches = _missing(questions, answered, batch_size, samples)
        if not batches:
            return
        wanted = [one for batch in batches for one in batch]
        asks = [[_ask(one, settings) for one in batch] for batch in batches]
        engine = open_engine()
        try:
            synced = time.monotonic()
            for group in engine.answers(asks):
                records = [
                    grade(wanted[place].item, answer, settings_digest, sample)
                    for place, answers in group
                    for sample, answer in zip(wanted[place].samples, answers, strict=True)
                ]
                file.write("".join(map(to_line, records)).encode())
                file.flush()
                if time.monotonic() - synced > _SYNC_EVERY_S:
                    os.fsync(file.fileno())
                    synced = time.monotonic()
                answered.update((record.id, record.sample) for record in records)
                on_progress(len(answered))
        finally:
            os.fsync(file.fileno())
            engine.close()


def load_answers(
    path: Path, questions: Sequence[EvalQuestion], settings_digest: str, samples: int = 1
) -> list[EvalRecord]:
    """The finished records of `questions`, in their order, `samples` of each one after the other.

    Raises:
        Unfinished: an answer has no record.
        UserError: the file holds records of other settings or questions.
    """
    if not path.is_file():
        raise Unfinished(f"{path}: no such file; run `looper-eval run` for this model first")
    with path.open("rb") as file:
        found = _resumable(file, path, questions, settings_digest, samples)
    keys = [(item.id, sample) for item in questions for sample in range(samples)]
    if missing := len(keys) - len(found):
        what = "questions have no answer" if samples == 1 else "answers are missing"
        raise Unfinished(f"{path}: {missing} of {len(keys)} {what} yet; run the same command again")
    return [found[key] for key in keys]


def _missing(
    questions: Sequence[EvalQuestion], answered: set[Key], batch_size: int, samples: int
) -> list[list[_Wanted]]:
    batches = []
    for start in range(0, len(questions), batch_size):
        batch = [
            _Wanted(item, tuple(one for one in range(samples) if (item.id, one) not in answered))
            for item in questions[start : start + batch_size]
        ]
        if batch := [one for one in batch if one.samples]:
            batches.append(batch)
    return batches


def _ask(wanted: _Wanted, settings: Settings) -> Ask:
    item, samples = wanted
    return Ask(item.question, tuple(settings.question_seed(item.id, sample) for sample in samples))


def _resumable(
    file: BinaryIO, path: Path, questions: Sequence[EvalQuestion], settings_digest: str, samples: int
) -> dict[Key, EvalRecord]:
    """Records of `questions`; a last line without newline is cut off where `file` can be written."""
    asked = {item.id: item for item in questions}
    file.seek(0)
    content = file.read()
    whole = content.rfind(b"\n") + 1
    if whole < len(content) and file.writable():
        file.truncate(whole)
    found: dict[Key, EvalRecord] = {}
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
        if item is None or record.sample >= samples:
            continue  # asked by a run with a larger --limit or more --samples
        if (record.question, record.gold_answer) != (item.question, item.answer):
            raise UserError(
                f"{path}:{number}: {record.id} is another question than in the dataset; use another --out"
            )
        if (record.id, record.sample) in found:
            raise UserError(f"{path}:{number}: {record.id} is answered twice; remove one of the lines")
        found[record.id, record.sample] = record
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

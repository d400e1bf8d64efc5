"""Coherence diagnostics over HTTP: do a model's samples agree more where its answer is right?

k samples a question are drawn from the same model, appended to `<name>.samples.jsonl` like any other
answers, and sent to a reward service, which returns opaque scores; they are appended to
`<name>.coherence.jsonl`. The accuracy of a model is never taken from these samples. A question that could not
be scored has no score: it is counted, and asked again by the next run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from scipy.stats import rankdata

from looper_eval.dataset import EvalQuestion
from looper_eval.engines import Engine
from looper_eval.figures import votes
from looper_eval.generate import Unfinished, answer_all, load_answers
from looper_eval.settings import Settings
from looper_eval.summary_types import Coherence
from looper_schemas.answers import answers_match
from looper_schemas.records import EvalRecord, Record, RecordError, read_records, to_line
from looper_schemas.scoring import (
    Arm,
    FailedQuestion,
    FinishReason,
    Purpose,
    Question,
    ScoredQuestion,
    Scores,
)
from looper_trainer.errors import UserError

SHARES = tuple(step / 10 for step in range(1, 11))
_QUESTIONS_AT_ONCE = 32


class ScoreRecord(Record):
    """What the service made of one question's samples."""

    id: str
    scores: Scores
    degenerate: bool
    scorer_id: str
    samples: int
    settings_digest: str


class Scorer(Protocol):
    """The part of `RewardClient` that is used."""

    scorer_id: str | None

    def score(
        self, questions: Sequence[Question], *, step: int, purpose: Purpose
    ) -> dict[str, ScoredQuestion | FailedQuestion]:
        """The result of every question, by its id."""
        ...


def sampled_settings(settings: Settings, temperature: float) -> Settings:
    """Settings of the samples: those of the run, but never greedy."""
    return settings if settings.temperature > 0 else settings.model_copy(update={"temperature": temperature})


def draw_samples(
    out: Path,
    name: str,
    questions: Sequence[EvalQuestion],
    settings: Settings,
    identity: str,
    open_engine: Callable[[], Engine],
    *,
    samples: int,
    batch_size: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Bring `<name>.samples.jsonl` to `samples` answers to each question."""
    answer_all(
        out / f"{name}.samples.jsonl",
        questions,
        settings,
        settings.digest(identity),
        open_engine,
        batch_size=batch_size,
        samples=samples,
        on_progress=on_progress,
    )


def score_samples(
    out: Path,
    name: str,
    questions: Sequence[EvalQuestion],
    digest: str,
    samples: int,
    scorer: Scorer,
    *,
    on_progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Bring `<name>.coherence.jsonl` to a score for each question; returns how many have none.

    `on_progress` is told how many have one or were asked for, at the start and after each request.

    Raises:
        UserError: the service refuses or is away, or scores with another scorer than before.
    """
    path = out / f"{name}.coherence.jsonl"
    found = read_scores(path, digest, samples)
    known = {one.scorer_id for one in found.values()}
    if len(known) > 1 or (known and scorer.scorer_id not in (None, *known)):
        raise UserError(f"{path}: was scored by another scorer; remove the file to score all samples again")
    if known:
        scorer.scorer_id = next(iter(known))
    by_question = _by_question(out, name, questions, digest, samples)
    missing = [item for item in questions if item.id not in found]
    there = len(questions) - len(missing)
    on_progress(there)
    with path.open("a", encoding="utf-8") as file:
        for start in range(0, len(missing), _QUESTIONS_AT_ONCE):
            items = missing[start : start + _QUESTIONS_AT_ONCE]
            asked = [_question(item, by_question[item.id]) for item in items]
            results = scorer.score(asked, step=0, purpose=Purpose.EVAL)
            for item in items:
                result = results[item.id]
                if isinstance(result, FailedQuestion):
                    continue
                if result.scores is None or scorer.scorer_id is None:
                    raise UserError(
                        "the service returns no scores; use a key with the scope score:components"
                    )
                record = ScoreRecord(
                    id=item.id,
                    scores=result.scores,
                    degenerate=result.degenerate,
                    scorer_id=scorer.scorer_id,
                    samples=samples,
                    settings_digest=digest,
                )
                file.write(to_line(record))
                found[item.id] = record
            file.flush()
            on_progress(there + start + len(items))
    return len(questions) - len(found)


def all_scored(out: Path, name: str, questions: Sequence[EvalQuestion], digest: str, samples: int) -> bool:
    """Whether `score_samples` has nothing to ask; False too where it refuses the file of scores."""
    try:
        found = read_scores(out / f"{name}.coherence.jsonl", digest, samples)
    except UserError:
        return False
    return all(item.id in found for item in questions)


def read_scores(path: Path, digest: str, samples: int) -> dict[str, ScoreRecord]:
    """The scores in `path`, a last line that was cut short left out and off.

    Raises:
        UserError: they are of other samples.
    """
    if not path.is_file() or not path.stat().st_size:
        return {}
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        path.write_bytes(content[:whole])
    if not whole:
        return {}
    try:
        records = read_records(path, ScoreRecord)
    except RecordError as error:
        raise UserError(str(error)) from None
    if any((one.settings_digest, one.samples) != (digest, samples) for one in records):
        raise UserError(f"{path}: holds scores of other samples; use another --out or remove the file")
    return {one.id: one for one in records}


def diagnose(
    out: Path,
    name: str,
    questions: Sequence[EvalQuestion],
    digest: str,
    samples: int,
    correct: Sequence[bool],
) -> Coherence | None:
    """What the scores of the model `name` say; `correct` is of its recorded answers, in order of `questions`.

    None where nothing was sampled or scored.
    """
    try:
        by_question = _by_question(out, name, questions, digest, samples)
    except Unfinished:
        return None
    scores = read_scores(out / f"{name}.coherence.jsonl", digest, samples)
    rows = [
        (scores[item.id], bool(right), plurality_is_right(by_question[item.id], item.answer))
        for item, right in zip(questions, correct, strict=True)
        if item.id in scores
    ]
    if not rows:
        return None
    whole = [one.scores.s_wm for one, _, _ in rows]
    right, plural = [right for _, right, _ in rows], [plural for _, _, plural in rows]
    parts = {
        part: [getattr(one.scores, part) for one, _, _ in rows]
        for part in ("s_end", "s_path", "s_cf", "s_wm")
    }
    return Coherence(
        samples=samples,
        scored=len(rows),
        unscored=len(questions) - len(rows),
        degenerate=sum(one.degenerate for one, _, _ in rows),
        scorer_id=rows[0][0].scorer_id,
        mean=float(np.mean(whole)),
        auroc=auroc(whole, right),
        auroc_plurality=auroc(whole, plural),
        plurality_accuracy=float(np.mean(plural)),
        selective=tuple(zip(SHARES, selective_accuracy(whole, right, SHARES), strict=True)),
        components={
            part: auroc(values, right) if all(value is not None for value in values) else None
            for part, values in parts.items()
        },
    )


def auroc(scores: Sequence[float], positive: Sequence[bool]) -> float | None:
    """The chance that a positive outscores a negative, ties counting half; None unless both occur."""
    flags = np.asarray(positive, dtype=bool)
    positives, negatives = int(flags.sum()), int((~flags).sum())
    if not positives or not negatives:
        return None
    ranks = rankdata(np.asarray(scores, dtype=float))
    return float((ranks[flags].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def selective_accuracy(
    scores: Sequence[float], correct: Sequence[bool], shares: Sequence[float]
) -> list[float]:
    """Accuracy on the highest-scored share of the questions (at least one), for each of `shares`.

    Of questions with equal scores at the edge, each is as likely to be kept as the others.
    """
    values, flags = np.asarray(scores, dtype=float), np.asarray(correct, dtype=float)
    means = {value: flags[values == value].mean() for value in np.unique(values)}
    expected = np.cumsum([means[value] for value in np.sort(values)[::-1]])
    kept = [max(1, round(share * len(values))) for share in shares]
    return [float(expected[count - 1] / count) for count in kept]


def plurality_is_right(records: Sequence[EvalRecord], gold: str) -> bool:
    """Whether the most frequent answer of the samples is right; of several, the one that came first."""
    most = votes(records).most_common(1)
    return bool(most) and answers_match(most[0][0], gold)


def _by_question(
    out: Path, name: str, questions: Sequence[EvalQuestion], digest: str, samples: int
) -> dict[str, list[EvalRecord]]:
    flat = load_answers(out / f"{name}.samples.jsonl", questions, digest, samples)
    return {item.id: flat[index * samples : (index + 1) * samples] for index, item in enumerate(questions)}


def _question(item: EvalQuestion, records: Sequence[EvalRecord]) -> Question:
    """The samples as arms. The gold answer stays here: coherence does not need it."""
    return Question(
        id=item.id,
        question=item.question,
        arms=tuple(
            Arm(
                id=str(record.sample),
                full_text=record.output,
                tokens_out=record.tokens_out,
                finish_reason=FinishReason(record.finish_reason) if record.finish_reason else None,
            )
            for record in records
        ),
    )

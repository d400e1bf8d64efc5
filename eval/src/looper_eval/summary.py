"""What the records of a folder say: accuracy of each model, paired differences, breakdown by difficulty.

Everything is computed from the records; nothing is carried over from an earlier summary. An answer is
correct, wrong, unparsed (it ended without stating a number) or truncated (cut off at the token limit);
the last three count as wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean, median

from pydantic import BaseModel, ConfigDict

from looper_eval import statistics
from looper_eval.dataset import EvalQuestion
from looper_eval.generate import Unfinished, load_answers
from looper_eval.manifest import Manifest, read_manifest, read_questions, write_json
from looper_eval.regrade import GRADERS, verdict
from looper_schemas.records import EvalRecord
from looper_trainer.errors import UserError

SUMMARY = "summary.json"
CONFIDENCE = 0.95


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Share(_Frozen):
    """`correct` of `n`, with its Wilson interval."""

    n: int
    correct: int
    accuracy: float
    interval: tuple[float, float]


class ModelSummary(Share):
    """One model's result. correct + wrong + unparsed + truncated = n."""

    name: str
    place: str
    wrong: int
    unparsed: int
    truncated: int
    graders: dict[str, Share]
    tokens_mean: float | None
    tokens_median: float | None
    tokens_max: int | None
    settings_digest: str


class Table(_Frozen):
    """Questions by which of two models answers them correctly."""

    both: int
    only_a: int
    only_b: int
    neither: int


class PairSummary(_Frozen):
    """b minus a, question by question. `p` is exact McNemar's; `p_holm` corrects for all pairs here."""

    a: str
    b: str
    difference: float
    se: float
    interval: tuple[float, float]
    table: Table
    p: float
    p_holm: float
    minimum_detectable_difference: float


class BreakdownRow(_Frozen):
    """Results on the questions of one level, by model."""

    level: str
    n: int
    models: dict[str, Share]


class Summary(_Frozen):
    """Contents of `summary.json`."""

    dataset: str
    dataset_digest: str
    n: int
    grader: str
    confidence: float
    settings: dict[str, object]
    models: tuple[ModelSummary, ...]
    unfinished: tuple[str, ...]
    pairs: tuple[PairSummary, ...]
    breakdowns: dict[str, tuple[BreakdownRow, ...]]

    def model(self, name: str) -> ModelSummary:
        """The result of the model `name`."""
        return next(one for one in self.models if one.name == name)


class Results(_Frozen):
    """A folder's questions and the records of each finished model, in the same order."""

    manifest: Manifest
    questions: tuple[EvalQuestion, ...]
    records: dict[str, tuple[EvalRecord, ...]]
    unfinished: tuple[str, ...]


def read_results(out: Path) -> Results:
    """Records of every model in `out` that has answered every question.

    Raises:
        UserError: `out` holds no results, no finished model, or records of other settings.
    """
    manifest, questions = read_manifest(out), read_questions(out)
    records: dict[str, tuple[EvalRecord, ...]] = {}
    complaint: dict[str, UserError] = {}
    for name in manifest.models:
        try:
            records[name] = tuple(load_answers(out / f"{name}.jsonl", questions, manifest.digest(name)))
        except Unfinished as error:
            complaint[name] = error
    if not records:
        raise next(iter(complaint.values()))
    return Results(
        manifest=manifest, questions=tuple(questions), records=records, unfinished=tuple(complaint)
    )


def summarise(results: Results, grader: str = "robust") -> Summary:
    """Every figure of the folder, with answers judged by `grader`.

    Raises:
        UserError: an unknown grader.
    """
    if grader not in GRADERS:
        raise UserError(f"unknown grader {grader!r}; known: {', '.join(GRADERS)}")
    correct = {name: [verdict(one, grader) for one in records] for name, records in results.records.items()}
    return Summary(
        dataset=results.manifest.dataset,
        dataset_digest=results.manifest.dataset_digest,
        n=len(results.questions),
        grader=grader,
        confidence=CONFIDENCE,
        settings=results.manifest.settings.model_dump(mode="json"),
        models=tuple(_model(results, name, correct[name]) for name in results.records),
        unfinished=results.unfinished,
        pairs=_pairs(correct),
        breakdowns=_breakdowns(results.questions, correct),
    )


def compare(out: Path, grader: str = "robust") -> Summary:
    """Recompute `<out>/summary.json` from the records and return it."""
    summary = summarise(read_results(out), grader)
    write_json(out / SUMMARY, summary.model_dump(mode="json"))
    return summary


def share(flags: Sequence[bool]) -> Share:
    """How many of `flags` are true, with the Wilson interval."""
    n, correct = len(flags), sum(flags)
    interval = statistics.wilson_interval(correct, n, CONFIDENCE)
    return Share(n=n, correct=correct, accuracy=correct / n, interval=(interval.low, interval.high))


def _model(results: Results, name: str, correct: Sequence[bool]) -> ModelSummary:
    records = results.records[name]
    missed = [record for record, right in zip(records, correct, strict=True) if not right]
    truncated = sum(record.finish_reason == "length" for record in missed)
    unparsed = sum(record.finish_reason != "length" and record.final_answer is None for record in missed)
    lengths = [record.tokens_out for record in records if record.tokens_out is not None]
    return ModelSummary(
        name=name,
        place=results.manifest.models[name].place,
        **share(correct).model_dump(),
        wrong=len(missed) - truncated - unparsed,
        unparsed=unparsed,
        truncated=truncated,
        graders={
            grader: share([record.graders[grader] for record in records]) for grader in ("robust", "platinum")
        },
        tokens_mean=mean(lengths) if lengths else None,
        tokens_median=float(median(lengths)) if lengths else None,
        tokens_max=max(lengths, default=None),
        settings_digest=results.manifest.digest(name),
    )


def _pairs(correct: dict[str, list[bool]]) -> tuple[PairSummary, ...]:
    """Each model against every earlier one; nothing where a single question allows no standard error."""
    names = list(combinations(correct, 2))
    tables = [statistics.paired_table(correct[a], correct[b]) for a, b in names]
    if not tables or tables[0].total < 2:
        return ()
    p_values = [statistics.mcnemar_exact(table) for table in tables]
    return tuple(
        _pair(a, b, table, p, p_holm)
        for (a, b), table, p, p_holm in zip(names, tables, p_values, statistics.holm(p_values), strict=True)
    )


def _pair(a: str, b: str, table: statistics.PairedTable, p: float, p_holm: float) -> PairSummary:
    paired = statistics.paired_difference(table, CONFIDENCE)
    # As the standard error does: no discordant pair seen counts as one.
    discordant = max(table.only_first + table.only_second, 1) / table.total
    return PairSummary(
        a=a,
        b=b,
        difference=paired.difference,
        se=paired.standard_error,
        interval=(paired.low, paired.high),
        table=Table(
            both=table.both, only_a=table.only_first, only_b=table.only_second, neither=table.neither
        ),
        p=p,
        p_holm=p_holm,
        minimum_detectable_difference=statistics.minimum_detectable_difference(table.total, discordant),
    )


def _breakdowns(
    questions: Sequence[EvalQuestion], correct: dict[str, list[bool]]
) -> dict[str, tuple[BreakdownRow, ...]]:
    """Results by solution lines, calculator steps and cleaning status, for those that the dataset tells."""
    features: dict[str, Callable[[EvalQuestion], str | None]] = {
        "solution lines": lambda item: _level(item.solution_lines),
        "calculator steps": lambda item: _level(item.calculator_steps),
        "cleaning status": lambda item: item.cleaning_status,
    }
    found = {}
    for name, feature in features.items():
        levels: dict[str, list[int]] = {}
        for index, item in enumerate(questions):
            if (level := feature(item)) is not None:
                levels.setdefault(level, []).append(index)
        if levels:
            found[name] = tuple(
                BreakdownRow(
                    level=level,
                    n=len(indices),
                    models={model: share([flags[i] for i in indices]) for model, flags in correct.items()},
                )
                for level, indices in sorted(levels.items(), key=lambda pair: (len(pair[0]), pair[0]))
            )
    return found


def _level(count: int) -> str | None:
    return None if count == 0 else str(count) if count < 8 else "8+"

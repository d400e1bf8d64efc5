"""What the records of a folder say: accuracy of each model, paired differences, breakdown by difficulty.

Everything is computed from the records; nothing is carried over from an earlier summary. An answer is
correct, wrong, unparsed (it ended without stating a number) or truncated (cut off at the token limit);
the last three count as wrong. Where a model gave several answers to each question, the accuracy is the mean
over all of them and every standard error is clustered by question.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median

from looper_eval.coherence import diagnose
from looper_eval.dataset import EvalQuestion
from looper_eval.figures import breakdowns, groups, majority, pairs, pass_at, share, standard_error
from looper_eval.generate import Unfinished, load_answers
from looper_eval.manifest import IMPORTED, Manifest, read_manifest, read_questions, write_json
from looper_eval.regrade import GRADERS, verdict
from looper_eval.summary_types import (
    CONFIDENCE,
    BreakdownRow,
    Coherence,
    Contamination,
    Frozen,
    ModelSummary,
    PairSummary,
    Recorded,
    Share,
    Summary,
    Table,
    Verdicts,
)
from looper_eval.training_data import read_contamination
from looper_schemas.records import EvalRecord
from looper_trainer.errors import UserError

__all__ = [
    "CONFIDENCE",
    "SUMMARY",
    "BreakdownRow",
    "ModelSummary",
    "PairSummary",
    "Results",
    "Share",
    "Summary",
    "Table",
    "compare",
    "read_results",
    "summarise",
]

SUMMARY = "summary.json"
RECORDED = "recorded:"  # before the names of an imported file's own scores among a record's graders


class Results(Frozen):
    """A folder's questions and the records of each finished model, all samples of a question together."""

    manifest: Manifest
    questions: tuple[EvalQuestion, ...]
    records: dict[str, tuple[EvalRecord, ...]]
    unfinished: tuple[str, ...]
    contamination: dict[str, Contamination]
    out: Path

    @property
    def samples(self) -> int:
        """Answers of each model to each question."""
        return self.manifest.samples

    def verdicts(self, name: str, grader: str) -> Verdicts:
        """Which answers of the model `name` are right to `grader`."""
        return groups([verdict(record, grader) for record in self.records[name]], self.samples)


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
            records[name] = tuple(
                load_answers(out / f"{name}.jsonl", questions, manifest.digest(name), manifest.samples)
            )
        except Unfinished as error:
            complaint[name] = error
    if not records:
        raise next(iter(complaint.values()))
    return Results(
        manifest=manifest,
        questions=tuple(questions),
        records=records,
        unfinished=tuple(complaint),
        contamination=read_contamination(out),
        out=out,
    )


def summarise(results: Results, grader: str = "robust") -> Summary:
    """Every figure of the folder, with answers judged by `grader`.

    Raises:
        UserError: an unknown grader.
    """
    if grader not in GRADERS:
        raise UserError(f"unknown grader {grader!r}; known: {', '.join(GRADERS)}")
    correct = {name: results.verdicts(name, grader) for name in results.records}
    return Summary(
        dataset=results.manifest.dataset,
        dataset_digest=results.manifest.dataset_digest,
        n=len(results.questions),
        samples=results.samples,
        grader=grader,
        confidence=CONFIDENCE,
        settings=_how_asked(results.manifest),
        models=tuple(_model(results, name, correct[name]) for name in results.records),
        unfinished=results.unfinished,
        pairs=pairs(correct),
        breakdowns=breakdowns(results.questions, correct),
        contamination={name: one for name, one in results.contamination.items() if name in correct},
        coherence=_coherence(results, correct),
    )


def _how_asked(manifest: Manifest) -> dict[str, object]:
    if manifest.settings == IMPORTED:
        return {"preset": IMPORTED.preset, "note": "answers asked for elsewhere; how is not known here"}
    return manifest.settings.model_dump(mode="json")


def _recorded(records: Sequence[EvalRecord], flags: Sequence[bool]) -> dict[str, Recorded]:
    """The scores that came with imported answers, each over the answers that have it."""
    names = dict.fromkeys(name for record in records for name in record.graders if name.startswith(RECORDED))
    found = {}
    for name in names:
        pairs = [
            (record.graders[name], flag)
            for record, flag in zip(records, flags, strict=True)
            if name in record.graders
        ]
        found[name.removeprefix(RECORDED)] = Recorded(
            accuracy=mean(theirs for theirs, _ in pairs),
            differing=sum(theirs != ours for theirs, ours in pairs),
        )
    return found


def _coherence(results: Results, correct: dict[str, Verdicts]) -> dict[str, Coherence]:
    entry = results.manifest.coherence
    if entry is None:
        return {}
    found = {}
    for name, verdicts in correct.items():
        digest = entry.settings.digest(results.manifest.models[name].identity)
        first = [group[0] for group in verdicts]
        one = diagnose(results.out, name, results.questions, digest, entry.samples, first)
        if one is not None:
            found[name] = one
    return found


def compare(out: Path, grader: str = "robust") -> Summary:
    """Recompute `<out>/summary.json` from the records and return it."""
    summary = summarise(read_results(out), grader)
    write_json(out / SUMMARY, summary.model_dump(mode="json"))
    return summary


def _model(results: Results, name: str, correct: Verdicts) -> ModelSummary:
    records = results.records[name]
    flat = [flag for group in correct for flag in group]
    missed = [record for record, right in zip(records, flat, strict=True) if not right]
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
            grader: share(groups([record.graders[grader] for record in records], results.samples))
            for grader in ("robust", "platinum")
        },
        recorded=_recorded(records, flat),
        pass_at=pass_at(correct, results.samples),
        majority=majority(records, correct),
        standard_error=standard_error(correct),
        tokens_mean=mean(lengths) if lengths else None,
        tokens_median=float(median(lengths)) if lengths else None,
        tokens_max=max(lengths, default=None),
        settings_digest=results.manifest.digest(name),
    )

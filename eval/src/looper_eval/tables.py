"""The summary as text: cells shared by the terminal, Markdown and HTML, so that they cannot disagree."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from looper_eval.summary import ModelSummary, PairSummary, Share, Summary

MODEL_COLUMNS = (
    "model",
    "accuracy",
    "95% interval",
    "correct",
    "wrong",
    "unparsed",
    "truncated",
    "platinum rule",
    "tokens",
)
PAIR_COLUMNS = ("comparison", "difference", "SE", "95% interval", "fixed", "broken", "p", "Holm p")
CONTAMINATION_COLUMNS = ("model", "trained on", "exact", "only renumbered", "13 words shared", "of")
RECORDED_COLUMNS = ("model", "scorer", "recorded", "graded here", "answers judged otherwise")
COHERENCE_COLUMNS = (
    "model", "scored", "unscored", "mean s_wm", "AUROC", "AUROC of plurality", "plurality right",
)  # fmt: skip


# With fewer discordant pairs their share is too uncertain to say what a larger sample size would show.
FEW_DISCORDANT = 10


class BreakdownTable(NamedTuple):
    """One breakdown as cells."""

    name: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def model_cells(one: ModelSummary) -> tuple[str, ...]:
    """One model's row under `MODEL_COLUMNS`."""
    return (
        one.name,
        f"{100 * one.accuracy:.2f}%",
        interval_text(one),
        f"{one.correct}/{one.n}",
        str(one.wrong),
        str(one.unparsed),
        str(one.truncated),
        f"{100 * one.graders['platinum'].accuracy:.2f}%",
        "" if one.tokens_mean is None else f"{one.tokens_mean:.0f}",
    )


def pair_cells(one: PairSummary) -> tuple[str, ...]:
    """One comparison's row under `PAIR_COLUMNS`; differences are in percentage points."""
    low, high = one.interval
    return (
        f"{one.b} - {one.a}",
        f"{100 * one.difference:+.2f}",
        f"{100 * one.se:.2f}",
        f"[{100 * low:+.2f}, {100 * high:+.2f}]",
        str(one.table.only_b),
        str(one.table.only_a),
        p_text(one.p),
        p_text(one.p_holm),
    )


def test_name(summary: Summary) -> str:
    """The test behind the p-values of the summary's pairs."""
    return "exact McNemar" if summary.samples == 1 else "paired t-test"


def test_words(summary: Summary) -> str:
    """The same within a sentence."""
    return "exact McNemar test" if summary.samples == 1 else "paired t-test"


def calls(summary: Summary) -> str:
    """How often each question was asked, in words."""
    return "one call each" if summary.samples == 1 else f"{summary.samples} samples each"


def pass_table(summary: Summary) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows of the unbiased pass@k and of all samples' majority; no columns for single answers."""
    ks = tuple(summary.models[0].pass_at)
    if not ks:
        return (), []
    rows = [
        (one.name, *(f"{100 * share:.2f}%" for share in (*one.pass_at.values(), one.majority or 0.0)))
        for one in summary.models
    ]
    return ("model", *(f"pass@{k}" for k in ks), f"maj@{ks[-1]}"), rows


def recorded_rows(summary: Summary) -> list[tuple[str, ...]]:
    """The scores that came with imported answers beside ours, under `RECORDED_COLUMNS`."""
    return [
        (
            one.name,
            name,
            f"{100 * recorded.accuracy:.2f}%",
            f"{100 * one.accuracy:.2f}%",
            str(recorded.differing),
        )
        for one in summary.models
        for name, recorded in one.recorded.items()
    ]


def contamination_rows(summary: Summary) -> list[tuple[str, ...]]:
    """Evaluation questions found in the data of each model that records it, under `CONTAMINATION_COLUMNS`."""
    return [
        (
            name,
            ", ".join([*one.files, *(f"{file} (digests)" for file in one.digests_only)]),
            *(str(one.touched[kind]) for kind in ("exact", "masked", "ngram")),
            str(one.questions),
        )
        for name, one in summary.contamination.items()
    ]


def coherence_rows(summary: Summary) -> list[tuple[str, ...]]:
    """One row for each model with scores, under `COHERENCE_COLUMNS`."""
    return [
        (
            name,
            str(one.scored),
            str(one.unscored),
            f"{one.mean:.3f}",
            *("none" if value is None else f"{value:.3f}" for value in (one.auroc, one.auroc_plurality)),
            f"{100 * one.plurality_accuracy:.1f}%",
        )
        for name, one in summary.coherence.items()
    ]


def interval_text(one: Share) -> str:
    """A share's interval in percent."""
    return f"[{100 * one.interval[0]:.1f}, {100 * one.interval[1]:.1f}]"


def p_text(p: float) -> str:
    """A p-value with two significant digits."""
    return f"{p:.2g}" if p >= 1e-4 else f"{p:.0e}"


def dataset_name(summary: Summary) -> str:
    """The dataset as readers elsewhere know it: a hub name, or a file's name without its folder."""
    return Path(summary.dataset).name if summary.dataset.endswith((".jsonl", ".json")) else summary.dataset


def sentence(summary: Summary, a: str, b: str) -> str:
    """What the records say of b against a, and no more."""
    pair = next(one for one in summary.pairs if (one.a, one.b) == (a, b))
    points, low, high = (100 * value for value in (pair.difference, *pair.interval))
    figures = (
        f"{points:+.1f} points, 95% interval {low:+.1f} to {high:+.1f}, {test_name(summary)} "
        f"p = {p_text(pair.p)}, {p_text(pair.p_holm)} after Holm's correction, n = {summary.n}"
    )
    if pair.p_holm < 1 - summary.confidence:
        return f"{b} answers {'more' if points > 0 else 'fewer'} questions correctly than {a} ({figures})."
    verdict = f"{b} and {a} cannot be told apart on these questions ({figures})"
    if pair.table.only_a + pair.table.only_b < FEW_DISCORDANT:
        return f"{verdict}."
    smallest = 100 * pair.minimum_detectable_difference
    return f"{verdict}; a true difference below {smallest:.1f} points would often be missed."


def rich_tables(summary: Summary) -> list[Table]:
    """The terminal's tables: models, then comparisons where there are any."""
    models = Table(title=f"{dataset_name(summary)}: {summary.n} questions, graded by {summary.grader}")
    for index, column in enumerate(MODEL_COLUMNS):
        models.add_column(column, justify="left" if index == 0 else "right")
    for one in summary.models:
        models.add_row(*model_cells(one))
    if not summary.pairs:
        return [models, *_more_tables(summary)]
    pairs = Table(title=f"paired differences in percentage points, p of the {test_words(summary)}")
    for index, column in enumerate(PAIR_COLUMNS):
        pairs.add_column(column, justify="left" if index == 0 else "right")
    for pair in summary.pairs:
        pairs.add_row(*pair_cells(pair))
    return [models, *_more_tables(summary), pairs]


def _more_tables(summary: Summary) -> list[Table]:
    found = []
    for title, (columns, rows) in (
        ("scores that came with the answers", (RECORDED_COLUMNS, recorded_rows(summary))),
        ("unbiased pass@k, and the most frequent answer", pass_table(summary)),
        ("evaluation questions in the training data", (CONTAMINATION_COLUMNS, contamination_rows(summary))),
        ("coherence against correctness", (COHERENCE_COLUMNS, coherence_rows(summary))),
    ):
        if rows:
            table = Table(title=title)
            for index, column in enumerate(columns):
                table.add_column(column, justify="left" if index == 0 else "right")
            for row in rows:
                table.add_row(*row)
            found.append(table)
    return found


def markdown(summary: Summary) -> str:
    """The summary as Markdown."""
    parts = [
        f"# Evaluation on {dataset_name(summary)}",
        f"{summary.n} questions, {calls(summary)}, graded by `{summary.grader}`; intervals are "
        f"{intervals(summary)} at {summary.confidence:.0%}. Unparsed and truncated answers count as wrong.",
        markdown_table(MODEL_COLUMNS, [model_cells(one) for one in summary.models]),
    ]
    if rows := recorded_rows(summary):
        parts += ["## Scores that came with the answers", markdown_table(RECORDED_COLUMNS, rows)]
    columns, rows = pass_table(summary)
    if rows:
        parts += ["## Unbiased pass@k, and the most frequent answer", markdown_table(columns, rows)]
    if summary.pairs:
        parts += [
            "## Paired differences",
            "Percentage points, question by question; `fixed` and `broken` count the questions that changed. "
            f"p is of the {test_words(summary)}, and Holm's correction covers all comparisons here.",
            markdown_table(PAIR_COLUMNS, [pair_cells(one) for one in summary.pairs]),
        ]
    for name in summary.breakdowns:
        table = breakdown_table(summary, name)
        parts += [f"## By {name}", markdown_table(table.columns, table.rows)]
    if rows := contamination_rows(summary):
        parts += [
            "## Evaluation questions in the training data",
            CONTAMINATION_NOTE,
            markdown_table(CONTAMINATION_COLUMNS, rows),
        ]
    if rows := coherence_rows(summary):
        parts += [
            "## Coherence against correctness",
            coherence_note(summary),
            markdown_table(COHERENCE_COLUMNS, rows),
        ]
    return "\n\n".join(parts) + "\n"


def intervals(summary: Summary) -> str:
    """The kind of the intervals, in words."""
    return "Wilson's" if summary.samples == 1 else "clustered by question"


CONTAMINATION_NOTE = (
    "Counted once, by the most certain look: the same question; the same but for its numbers; 13 words in a "
    "row shared. Models that record no training data are not listed."
)


def coherence_note(summary: Summary) -> str:
    """What the coherence table shows."""
    samples = next(iter(summary.coherence.values())).samples
    return (
        f"{samples} samples a question were scored over HTTP, apart from the answers that are counted above. "
        "AUROC is the chance that a question answered correctly has a higher s_wm than one that is not."
    )


def breakdown_table(summary: Summary, name: str) -> BreakdownTable:
    """Accuracy with interval of each model at each level of the breakdown `name`."""
    rows = [
        (
            row.level,
            str(row.n),
            *(f"{100 * one.accuracy:.1f}% {interval_text(one)}" for one in row.models.values()),
        )
        for row in summary.breakdowns[name]
    ]
    return BreakdownTable(name, (name, "n", *(one.name for one in summary.models)), rows)


def markdown_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Cells as a Markdown table, first column left, others right."""
    lines = [columns, ("---",) + ("---:",) * (len(columns) - 1), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)

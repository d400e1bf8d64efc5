"""`looper-eval report`: one HTML file that needs no network, with Markdown and JSON beside it.

The page shows the figures of `summary.json`, charts of them, and every answer of every model side by side.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from markupsafe import Markup

from looper_eval import svg, tables
from looper_eval.figures import mostly
from looper_eval.manifest import write_json
from looper_eval.page import package_text, render_page, write_page
from looper_eval.regrade import verdict
from looper_eval.summary import SUMMARY, Results, Summary, compare, read_results
from looper_schemas.records import EvalRecord

EXAMPLES = 10
HISTOGRAM_BINS = 32
HITS = 50


def write_report(out: Path) -> Path:
    """Write `report.html`, `report.md` and `report.json` into `out`, and its `summary.json` anew.

    Returns:
        The page's path.

    Raises:
        UserError: `out` holds no finished results.
    """
    results = read_results(out)
    summary = compare(out, _last_grader(out))
    changes = [_change(results, summary, a, b) for a, b in pairwise(results.records)]
    write_json(out / "report.json", {"summary": summary.model_dump(mode="json"), "changes": changes})
    write_page(out / "report.md", markdown(summary, changes))
    write_page(out / "report.html", html(results, summary, changes))
    return out / "report.html"


def headline(summary: Summary) -> str:
    """What can be said of the last model against the one before it; nothing about a single model."""
    if not summary.pairs:
        return ""
    return tables.sentence(summary, summary.models[-2].name, summary.models[-1].name)


def markdown(summary: Summary, changes: Sequence[dict[str, Any]]) -> str:
    """The report without the answers."""
    parts = [tables.markdown(summary)]
    if sentence := headline(summary):
        parts.insert(0, f"**{sentence}**\n")
    for change in changes:
        parts.append(f"## What changed from {change['a']} to {change['b']}\n")
        for kind in ("fixed", "broken"):
            ids = ", ".join(f"`{one}`" for one in change[kind]) or "none"
            parts.append(f"{len(change[kind])} {kind}: {ids}\n")
    return "\n".join(parts)


def html(results: Results, summary: Summary, changes: Sequence[dict[str, Any]]) -> str:
    """The page."""
    items = [_item(results, summary.grader, index) for index in range(summary.n)]
    by_id = {item["id"]: item for item in items}
    for change in changes:
        for kind in ("fixed", "broken"):
            for question_id in change[kind]:
                by_id[question_id]["tags"] += f" {_tag(kind, change)}"
    names = [one.name for one in summary.models]
    return render_page(
        "report.html.j2",
        title=f"Evaluation on {tables.dataset_name(summary)}",
        dataset=tables.dataset_name(summary),
        script=package_text("report.js"),
        summary=summary,
        headline=headline(summary),
        names=names,
        model_columns=tables.MODEL_COLUMNS,
        model_rows=[tables.model_cells(one) for one in summary.models],
        pair_columns=tables.PAIR_COLUMNS,
        pair_rows=[tables.pair_cells(one) for one in summary.pairs],
        accuracy_chart=Markup(_accuracy_chart(summary)),
        difference_chart=Markup(_difference_chart(summary)),
        difficulty_charts=_difficulty_charts(summary),
        length_charts=_length_charts(results),
        passes=tables.pass_table(summary),
        recorded=(tables.RECORDED_COLUMNS, tables.recorded_rows(summary)),
        contamination=(tables.CONTAMINATION_COLUMNS, tables.contamination_rows(summary)),
        contamination_note=tables.CONTAMINATION_NOTE,
        contamination_hits=_contamination_hits(summary, by_id),
        coherence=(tables.COHERENCE_COLUMNS, tables.coherence_rows(summary)),
        coherence_note=tables.coherence_note(summary) if summary.coherence else "",
        coherence_chart=Markup(_coherence_chart(summary)),
        test=tables.test_words(summary),
        calls=tables.calls(summary),
        intervals=tables.intervals(summary),
        breakdowns=[tables.breakdown_table(summary, name) for name in summary.breakdowns],
        changes=[_change_section(change, by_id) for change in changes],
        filters=_filters(names, changes),
        items=items,
        settings=[(name, _setting(value)) for name, value in summary.settings.items()],
        version=version("looper-eval"),
    )


def _last_grader(out: Path) -> str:
    try:
        return str(json.loads((out / SUMMARY).read_text(encoding="utf-8"))["grader"])
    except (OSError, ValueError, KeyError, TypeError):
        return "robust"


def _change(results: Results, summary: Summary, a: str, b: str) -> dict[str, Any]:
    """Ids of the questions that b answers and a does not (fixed), and the other way round (broken).

    Of several samples, more than half must be right.
    """
    before, after = ([mostly(group) for group in results.verdicts(name, summary.grader)] for name in (a, b))
    verdicts = list(zip([item.id for item in results.questions], before, after, strict=True))
    return {
        "a": a,
        "b": b,
        "fixed": [one for one, was, is_now in verdicts if is_now and not was],
        "broken": [one for one, was, is_now in verdicts if was and not is_now],
    }


def _item(results: Results, grader: str, index: int) -> dict[str, Any]:
    question, samples = results.questions[index], results.samples
    place = slice(index * samples, (index + 1) * samples)
    groups = {
        name: [_answer(name, record, grader, samples) for record in records[place]]
        for name, records in results.records.items()
    }
    answers = [answer for group in groups.values() for answer in group]
    marks = [_mark(name, [one["correct"] for one in group]) for name, group in groups.items()]
    tags = {f"{'right' if one['correct'] else 'wrong'}:{one['model']}" for one in marks}
    tags |= {one["state"] for one in answers if one["state"] in {"truncated", "unparsed"}}
    if len({one["correct"] for one in marks}) > 1:
        tags.add("disagree")
    if not any(one["correct"] for one in answers):
        tags.add("none")
    return {
        "id": question.id,
        "anchor": f"q{index + 1}",
        "question": question.question,
        "gold": question.answer,
        "solution": question.solution,
        "status": question.cleaning_status,
        "marks": marks,
        "answers": answers,
        "tags": " ".join(sorted(tags)),
    }


def _mark(model: str, flags: Sequence[bool]) -> dict[str, Any]:
    """The badge of one model at one question."""
    right = mostly(flags)
    sign = ("✓" if right else "✗") if len(flags) == 1 else f"{sum(flags)}/{len(flags)}"
    return {"model": model, "correct": right, "sign": sign}


def _answer(model: str, record: EvalRecord, grader: str, samples: int) -> dict[str, Any]:
    correct = verdict(record, grader)
    if correct:
        state = "correct"
    elif record.finish_reason == "length":
        state = "truncated"
    else:
        state = "unparsed" if record.final_answer is None else "wrong"
    return {
        "model": model,
        "title": model if samples == 1 else f"{model} #{record.sample + 1}",
        "correct": correct,
        "state": state,
        "final": record.final_answer,
        "tokens": record.tokens_out,
        "output": record.output,
    }


def _tag(kind: str, change: dict[str, Any]) -> str:
    return f"{kind}:{change['a']}:{change['b']}"


def _filters(names: Sequence[str], changes: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    filters = [("", "all questions"), ("disagree", "models disagree"), ("none", "nobody is right")]
    for change in changes:
        filters += [
            (_tag(kind, change), f"{kind} from {change['a']} to {change['b']}")
            for kind in ("fixed", "broken")
        ]
    for name in names:
        filters += [(f"right:{name}", f"{name} is right"), (f"wrong:{name}", f"{name} is not right")]
    return [*filters, ("truncated", "an answer is truncated"), ("unparsed", "an answer is unparsed")]


def _change_section(change: dict[str, Any], by_id: dict[str, dict[str, Any]]) -> dict[str, Any]:
    examples = []
    for kind in ("fixed", "broken"):
        for question_id in change[kind][:EXAMPLES]:
            item = by_id[question_id]
            answers = [one for one in item["answers"] if one["model"] in (change["a"], change["b"])]
            examples.append({**item, "kind": kind, "answers": answers})
    return {
        "a": change["a"],
        "b": change["b"],
        "fixed_count": len(change["fixed"]),
        "broken_count": len(change["broken"]),
        "fixed_filter": _tag("fixed", change),
        "broken_filter": _tag("broken", change),
        "examples": examples,
    }


def _accuracy_chart(summary: Summary) -> str:
    rows = [
        svg.Interval(one.name, one.accuracy, *one.interval, colour=i % svg.COLOURS)
        for i, one in enumerate(summary.models)
    ]
    return svg.interval_chart(rows, label="Accuracy of each model")


def _difference_chart(summary: Summary) -> str:
    order = [one.name for one in summary.models]
    rows = [
        svg.Interval(
            f"{one.b} - {one.a}", one.difference, *one.interval, colour=order.index(one.b) % svg.COLOURS
        )
        for one in summary.pairs
    ]
    return svg.interval_chart(rows, label="Paired differences", show=svg.signed_points, zero=True)


def _difficulty_charts(summary: Summary) -> list[dict[str, Any]]:
    charts = []
    for name, rows in summary.breakdowns.items():
        if len(rows) < 2 or not rows[0].level[0].isdigit():
            continue
        series = []
        for index, model in enumerate(summary.models):
            shares = [row.models[model.name] for row in rows]
            # A small sideways shift keeps the models' whiskers apart.
            shift = 0.08 * (index - (len(summary.models) - 1) / 2)
            series.append(
                svg.Series(
                    model.name,
                    xs=[float(row.level.rstrip("+")) + shift for row in rows],
                    ys=[one.accuracy for one in shares],
                    low=[one.interval[0] for one in shares],
                    high=[one.interval[1] for one in shares],
                    colour=index % svg.COLOURS,
                    markers=True,
                )
            )
        x_label = f"{name} (8: 8 or more)" if rows[-1].level == "8+" else name
        chart = svg.line_chart(series, label=f"Accuracy by {name}", x_label=x_label, show=svg.percent)
        charts.append({"name": name, "chart": Markup(chart)})
    return charts


def _coherence_chart(summary: Summary) -> str:
    order = [one.name for one in summary.models]
    series = [
        svg.Series(
            name,
            xs=[100 * share for share, _ in one.selective],
            ys=[accuracy for _, accuracy in one.selective],
            colour=order.index(name) % svg.COLOURS,
            markers=True,
        )
        for name, one in summary.coherence.items()
    ]
    if not series:
        return ""
    label = "percent of questions kept, most coherent first"
    return svg.line_chart(series, label="Selective accuracy", x_label=label, show=svg.percent)


def _contamination_hits(summary: Summary, by_id: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The first hits of each model, each with the anchor of its question."""
    return [
        {
            "model": name,
            "total": len(one.hits),
            "hits": [
                (kind, question, train, shared, by_id[question]["anchor"])
                for kind, question, train, shared in one.hits[:HITS]
                if question in by_id
            ],
        }
        for name, one in summary.contamination.items()
        if one.hits
    ]


def _length_charts(results: Results) -> list[dict[str, Any]]:
    lengths = {
        name: [(r.tokens_out or 0, r.finish_reason == "length") for r in rs]
        for name, rs in results.records.items()
    }
    longest = max((length for pairs in lengths.values() for length, _ in pairs), default=0)
    if longest == 0:
        return []
    width = max(1, -(-(longest + 1) // HISTOGRAM_BINS))
    bins = longest // width + 1
    edges = [float(width * index) for index in range(bins + 1)]
    bars = []
    for colour, (name, pairs) in enumerate(lengths.items()):
        counts = {False: [0] * bins, True: [0] * bins}
        for length, cut in pairs:
            counts[cut][length // width] += 1
        bars.append(svg.Bars(name, counts[False], counts[True], colour=colour % svg.COLOURS))
    return [
        {
            "name": one.name,
            "chart": Markup(svg.histogram(edges, one, label=f"Length of {one.name}", x_label="tokens")),
        }
        for one in bars
    ]


def _setting(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

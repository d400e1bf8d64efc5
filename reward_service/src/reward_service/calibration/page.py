"""A calibration report as one HTML page that loads and runs nothing, and needs no network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from reward_service.calibration.charts import Line, histogram, interval_chart, line_chart

_COLOURS = ("--a", "--b", "--c", "--d")
_CSS = """
:root{color-scheme:light dark;--ink:#1e293b;--paper:#fff;--muted:#5b6779;--rule:#dbe1e8;
--a:#1d4ed8;--b:#c2410c;--c:#15803d;--d:#a21caf}
@media (prefers-color-scheme:dark){:root{--ink:#e2e8f0;--paper:#0f172a;--muted:#a3b0c2;--rule:#334155;
--a:#60a5fa;--b:#fb923c;--c:#4ade80;--d:#e879f9}}
body{background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif;max-width:60rem;
margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.2rem .8rem .2rem 0;text-align:right;
border-bottom:1px solid var(--rule)}th:first-child,td:first-child{text-align:left}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(20rem,1fr));gap:1rem}
figure{margin:0}svg{width:100%;height:auto;font:11px system-ui,sans-serif;stroke-width:2}
svg text{fill:var(--muted)}svg .ink{fill:var(--ink)}svg .rule{stroke:var(--rule);stroke-width:1}
figcaption{color:var(--muted);font-size:.85rem}figcaption i{display:inline-block;width:.7rem;height:.7rem;
margin-right:.3rem}p.note{color:var(--muted)}
"""


def render(report: dict[str, Any]) -> str:
    """The page of a report that `report.make_report` made and `cli` stamped."""
    sections = [
        _head(report),
        _discrimination(report),
        _modes(report),
        _reliability(report),
        _risk(report),
        _histograms(report),
        _weights(report),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Calibration</title>'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_CSS}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>"
    )


def _head(report: dict[str, Any]) -> str:
    rows = [
        (name.replace("_", " "), str(report[name]))
        for name in (
            "file",
            "scorer_id",
            "questions",
            "questions_failed",
            "questions_with_fewer_than_two_arms",
            "questions_whose_plurality_is_right",
            "arms",
            "arms_right",
        )
        if name in report
    ]
    return "<h1>Calibration of the coherence scores</h1>" + _table(("what", "value"), rows)


def _discrimination(report: dict[str, Any]) -> str:
    parts = ["<h2>Does a score tell right from wrong?</h2>"]
    for level, what in (
        ("arm", "An arm's share against whether the arm is right"),
        ("question", "A question's score against whether its plurality answer is right"),
    ):
        found = report["discrimination"][level]
        rows = [
            (name, _interval(found[name]["auroc"]), _interval(found[name]["average_precision"]))
            for name in found
        ]
        parts.append(f"<h3>{what}</h3>" + _table(("score", "AUROC", "average precision"), rows))
        charted = [
            (name, one["value"], one["low"], one["high"])
            for name in found
            if (one := found[name]["auroc"])["value"] is not None and one["low"] is not None
        ]
        parts.append(interval_chart(charted, title=what, x="AUROC (.5: no better than chance)"))
    parts.append(
        f'<p class="note">Intervals: the middle 95% of {report["resamples"]} resamples of questions.</p>'
    )
    return "".join(parts)


def _modes(report: dict[str, Any]) -> str:
    rows = [
        (
            mode,
            _number(one["auroc_within_questions"]),
            _number(one["auroc_within_questions_without_gold"]),
            _number(one["wrong_arms_with_positive_reward"]),
            _number(one["mean_reward_of_right_arms"]),
            _number(one["mean_reward_of_wrong_arms"]),
        )
        for mode, one in report["reward_modes"].items()
    ]
    mixed = next(iter(report["reward_modes"].values()))["questions_with_right_and_wrong_arms"]
    return (
        "<h2>What does each reward mode pay?</h2>"
        + _table(
            (
                "mode",
                "AUROC within questions",
                "the same without gold answers",
                "wrong arms with a positive reward",
                "mean reward, right arms",
                "wrong arms",
            ),
            rows,
        )
        + f'<p class="note">Within questions: the mean over the {mixed} with right and wrong arms.</p>'
    )


def _reliability(report: dict[str, Any]) -> str:
    figures, rows = [], []
    for level, one in report["reliability"].items():
        scaled = one.get("after_logistic_scaling")
        lines = [Line("perfect", (0.0, 1.0), (0.0, 1.0), "--muted", dashed=True)]
        for name, colour, source in (("s_wm", "--a", one), ("after logistic scaling", "--b", scaled)):
            if source is not None:
                bins = source["bins"]
                columns = {key: [b[key] for b in bins] for key in ("score", "share", "low", "high")}
                lines.append(
                    Line(name, columns["score"], columns["share"], colour, columns["low"], columns["high"])
                )
                rows.append(
                    (
                        f"{name}, {level}s",
                        _number(source["expected_calibration_error"]),
                        _number(source["brier"]),
                    )
                )
        figures.append(line_chart(lines, title=f"Reliability of s_wm, {level}s", x="score", y="share right"))
    return (
        "<h2>Is s_wm a probability?</h2>"
        + f'<div class="grid">{"".join(figures)}</div>'
        + _table(("score", "expected calibration error", "Brier score"), rows)
    )


def _risk(report: dict[str, Any]) -> str:
    curves = report["risk_coverage"]
    lines = [
        Line(name, one["coverage"], one["risk"], colour)
        for (name, one), colour in zip(curves.items(), _COLOURS, strict=True)
    ]
    first = next(iter(curves.values()))
    rows = [(name, _number(one["area"])) for name, one in curves.items()]
    rows += [
        ("no score", _number(first["area_of_no_score"])),
        ("a perfect score", _number(first["area_of_a_perfect_score"])),
    ]
    top = max([0.05, *(risk for one in curves.values() for risk in one["risk"])])
    return (
        "<h2>Is the plurality answer right where the score is high?</h2>"
        + line_chart(
            lines,
            title="Risk and coverage",
            x="share of questions answered",
            y="share of these wrong",
            top=top,
        )
        + _table(("score", "area under the curve"), rows)
    )


def _histograms(report: dict[str, Any]) -> str:
    figures = [
        histogram(one["edges"], (("wrong", one["wrong"], "--b"), ("right", one["right"], "--a")), title=name)
        for name, one in report["histograms"].items()
    ]
    return f'<h2>How are the arms\' shares spread?</h2><div class="grid">{"".join(figures)}</div>'


def _weights(report: dict[str, Any]) -> str:
    weights = report["weights"]
    rows = []
    for name, one in weights["auroc"].items():
        fit = weights["fits"].get(name)
        shown = weights["as_set"] if name == "as set" else (fit or {}).get("as_weights")
        text = ", ".join(f"{part} {value:.2f}" for part, value in (shown or {}).items())
        rows.append((name, _interval(one), text))
    return (
        "<h2>Would other weights do better?</h2>"
        + _table(("blend", "AUROC of arms", "weights"), rows)
        + '<p class="note">Fitted: a logistic regression of the arms, scored out of fold (no question is in '
        "two folds). Its weights are the positive coefficients, as shares.</p>"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _interval(one: dict[str, Any]) -> str:
    if one["value"] is None:
        return "–"
    return f"{one['value']:.3f} [{_number(one['low'])}, {_number(one['high'])}]"

"""The demo's report: the table base / SFT / PPO, the curves of training, five scored trajectories.

    python scripts/demo/report.py RUN_DIR

Reads what the stages wrote (`eval/summary.json`, `checkpoints/ppo_rl/metrics.jsonl` and `trajectories/`) and
writes `RUN_DIR/report.html`, one file that needs no network. A figure that was not logged is left out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from looper_eval import svg, tables
from looper_eval.page import render_page, write_page
from looper_eval.summary import SUMMARY, Summary
from looper_schemas.records import RecordError, RolloutRecord, Trajectory, read_records
from looper_trainer.errors import UserError

EXAMPLES = 5
COLOURS = (2, 1, 3, 4)


@dataclass(frozen=True)
class Curve:
    """A panel of the page: keys of `metrics.jsonl` with the names they are shown under."""

    title: str
    note: str
    keys: dict[str, str]
    show: Callable[[float], str] = svg.number
    zero: bool = False


CURVES = (
    Curve("Reward", "mean reward of the step's completions", {"reward_mean": "reward"}),
    Curve("KL to the SFT model", "k1 estimate, nats a completion", {"kl_k1_per_completion": "KL"}, zero=True),
    Curve(
        "Accuracy", "of sampled training completions, and greedy on the dev set",
        {"correct_rate": "training samples", "dev_accuracy": "dev, greedy"}, svg.percent,
    ),
    Curve(
        "Coherence scores", "mean over the step's questions, as the service returned them",
        {"s_wm": "s_wm", "s_end": "s_end", "s_path": "s_path", "s_cf": "s_cf"},
    ),
    Curve("Entropy", "nats a token", {"entropy": "entropy"}),
    Curve("Completion length", "mean tokens", {"length_mean": "tokens"}),
)  # fmt: skip


def write_demo_report(run_dir: Path) -> Path:
    """Write `<run_dir>/report.html` and return its path.

    Raises:
        UserError: the evaluation or the PPO metrics are missing; run the demo to its end first.
    """
    summary = _read_summary(run_dir / "eval" / SUMMARY)
    metrics = _read_metrics(run_dir / "checkpoints/ppo_rl/metrics.jsonl")
    step, examples = example_trajectories(run_dir / "checkpoints/ppo_rl/trajectories")
    names = [one.name for one in summary.models]
    page = render_page(
        "demo.html.j2",
        templates=Path(__file__).resolve().parent,
        title="Looper demo: " + ", ".join(names),
        sentence=tables.sentence(summary, names[-2], names[-1]) if len(names) > 1 else "",
        facts=_facts(run_dir, summary, metrics),
        model_columns=tables.MODEL_COLUMNS,
        model_rows=[tables.model_cells(one) for one in summary.models],
        pair_columns=tables.PAIR_COLUMNS,
        pair_rows=[tables.pair_cells(one) for one in summary.pairs],
        panels=[panel for curve in CURVES if (panel := draw(curve, metrics))],
        example_step=step,
        examples=examples,
    )
    write_page(run_dir / "report.html", page)
    return run_dir / "report.html"


def draw(curve: Curve, metrics: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The panel of one curve, or None where no step logged any of its keys."""
    series = []
    for key, name in curve.keys.items():
        points = [(row["step"], row[key]) for row in metrics if isinstance(row.get(key), int | float)]
        if points:
            xs, ys = zip(*points, strict=True)
            # Few points are evaluations, not steps: mark each of them.
            series.append(
                svg.Series(name, xs, ys, colour=COLOURS[len(series)], markers=2 * len(points) < len(metrics))
            )
    if not series:
        return None
    chart = svg.line_chart(series, label=curve.title, x_label="PPO step", show=curve.show, zero=curve.zero)
    return {
        "title": curve.title,
        "note": curve.note,
        "names": [one.name for one in series],
        "colours": COLOURS,
        "chart": Markup(chart),
    }


def example_trajectories(folder: Path) -> tuple[int | None, list[dict[str, Any]]]:
    """The last step with trajectories, and five of its scored ones, spread from lowest to highest reward.

    Trajectories of one question appear once, so that five questions are shown where there are five.
    """
    files = sorted(folder.glob("step_*.jsonl"))
    if not files:
        return None, []
    try:
        records = read_records(files[-1], RolloutRecord)
    except RecordError as error:
        raise UserError(str(error)) from None
    scored = [(r, t) for r in records for t in r.trajectories if t.reward is not None]
    scored.sort(key=lambda pair: pair[1].reward or 0.0)
    wanted = min(EXAMPLES, len({record.id for record, _ in scored}))
    chosen: list[tuple[RolloutRecord, Trajectory]] = []
    for index in range(wanted):
        target = round(index * (len(scored) - 1) / max(wanted - 1, 1))
        fresh = [i for i, (r, _) in enumerate(scored) if all(r.id != seen.id for seen, _ in chosen)]
        chosen.append(scored[min(fresh, key=lambda i: abs(i - target))])
    chosen.sort(key=lambda pair: pair[1].reward or 0.0, reverse=True)
    return int(files[-1].stem.removeprefix("step_")), [_example(*pair) for pair in chosen]


def _example(record: RolloutRecord, trajectory: Trajectory) -> dict[str, Any]:
    scores = record.scores.model_dump() if record.scores else {}
    return {
        "question": record.question,
        "gold": record.gold_answer,
        "final": trajectory.final_answer,
        "output": trajectory.output,
        "reward": f"{trajectory.reward:+.3f}",
        "tokens": trajectory.tokens_out,
        "scores": [(name, "none" if value is None else f"{value:.3f}") for name, value in scores.items()],
    }


def _facts(run_dir: Path, summary: Summary, metrics: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    facts = [
        (
            "test questions",
            f"{summary.n} from {tables.dataset_name(summary)}, greedy, graded by {summary.grader}",
        )
    ]
    steps = [row for row in metrics if row["step"] > 0]
    facts.append(("PPO steps", str(len(steps))))
    completions = [row["completions"] for row in steps if isinstance(row.get("completions"), int)]
    if completions:
        facts.append(("scored completions", f"{sum(completions):,}"))
    scorers = sorted({str(row["scorer_id"]) for row in steps if row.get("scorer_id")})
    if scorers:
        facts.append(("scorer", ", ".join(scorers)))
    try:
        demo = json.loads((run_dir / "demo.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        demo = {}
    facts += [(key, str(demo[key])) for key in ("model", "reward", "seed") if key in demo]
    return facts


def _read_summary(path: Path) -> Summary:
    try:
        return Summary.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        raise UserError(f"{path}: no evaluation summary; run the demo to its end first") from None


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError):
        raise UserError(f"{path}: no PPO metrics; run the demo to its end first") from None
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        print(write_demo_report(Path(sys.argv[1])))
    except UserError as failure:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(2)

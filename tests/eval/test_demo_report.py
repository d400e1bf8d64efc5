"""The demo's report from hand-made results: table, curves and five trajectories."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

from looper_trainer.errors import UserError


def test_page_shows_the_summarys_table_the_curves_and_the_facts(
    demo_report: ModuleType, demo_run: Path
) -> None:
    page = demo_report.write_demo_report(demo_run)
    assert page == demo_run / "report.html"
    text = page.read_text(encoding="utf-8")
    gain = '<th scope="row">ppo - sft</th><td>+50.00</td>'
    for cell in ("<td>0.00%</td>", "<td>30.00%</td>", "<td>80.00%</td>", gain):
        assert cell in text
    assert "ppo answers more questions correctly than sft" in text
    for title in ("Reward", "KL to the SFT model", "Accuracy"):
        assert f"<h3>{title}</h3>" in text
    assert "Coherence scores" not in text  # logged as null only: left out, not drawn as zero
    assert "<td>1,280</td>" not in text
    assert ">1,280<" in text  # 20 steps of 64 completions
    assert "http" not in text.replace("http-equiv", "")


def test_evaluations_are_marked_points_and_steps_are_lines(demo_report: ModuleType, demo_run: Path) -> None:
    text = demo_report.write_demo_report(demo_run).read_text(encoding="utf-8")
    chart = re.search(r'aria-label="Accuracy">.*?</svg>', text, re.S)
    assert chart
    assert re.findall(r"<title>dev, greedy: (\S+) at (\d+)</title>", chart[0]) == [
        ("25%", "0"),
        ("33.3%", "10"),
        ("66.7%", "20"),
    ]


def test_five_scored_trajectories_of_the_last_step_run_from_highest_to_lowest(
    demo_report: ModuleType, demo_run: Path
) -> None:
    step, examples = demo_report.example_trajectories(demo_run / "checkpoints/ppo_rl/trajectories")
    rewards = [float(one["reward"]) for one in examples]
    assert step == 20
    assert (rewards[0], rewards[-1]) == (7.3, 0.0)
    assert rewards == sorted(rewards, reverse=True)
    assert len({one["question"] for one in examples}) == 5
    assert examples[0]["scores"] == [
        ("s_end", "0.500"),
        ("s_path", "0.250"),
        ("s_cf", "none"),
        ("s_wm", "0.125"),
    ]
    text = demo_report.write_demo_report(demo_run).read_text(encoding="utf-8")
    assert "&lt;b&gt;7/3&lt;/b&gt;" in text
    assert "not scored" not in text


def test_missing_results_are_one_line_and_no_page(demo_report: ModuleType, demo_run: Path) -> None:
    (demo_run / "checkpoints/ppo_rl/metrics.jsonl").unlink()
    with pytest.raises(UserError, match="no PPO metrics; run the demo to its end"):
        demo_report.write_demo_report(demo_run)
    (demo_run / "eval/summary.json").write_text("{}")
    with pytest.raises(UserError, match="no evaluation summary"):
        demo_report.write_demo_report(demo_run)
    assert not (demo_run / "report.html").exists()


def test_few_or_no_trajectories_are_enough_for_a_page(demo_report: ModuleType, demo_run: Path) -> None:
    folder = demo_run / "checkpoints/ppo_rl/trajectories"
    for path in folder.iterdir():
        path.unlink()
    assert demo_report.example_trajectories(folder) == (None, [])
    assert "trajectories of step" not in demo_report.write_demo_report(demo_run).read_text(encoding="utf-8")

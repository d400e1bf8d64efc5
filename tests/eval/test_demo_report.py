"""The demo's report from hand-made results: table, curves and five trajectories."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from looper_eval.summary import compare
from looper_schemas.records import RolloutRecord, Trajectory, write_records
from looper_schemas.scoring import Scores
from looper_trainer.errors import UserError

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "demo"
RIGHT, WRONG = ("Answer: #### 5", "stop"), ("Answer: #### 4", "stop")
MakeResults = Callable[..., Path]


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.delitem(sys.modules, "report", raising=False)
    import report

    return report


@pytest.fixture
def run_dir(make_results: MakeResults, tmp_path: Path) -> Path:
    answers = {"base": [WRONG] * 20, "sft": [RIGHT] * 6 + [WRONG] * 14, "ppo": [RIGHT] * 16 + [WRONG] * 4}
    compare(make_results(answers, ["5"] * 20))
    (tmp_path / "results").rename(tmp_path / "eval")
    ppo = tmp_path / "checkpoints" / "ppo_rl"
    (ppo / "trajectories").mkdir(parents=True)
    rows = [{"step": 0, "policy_version": 0, "dev_accuracy": 0.25}]
    for step in range(1, 21):
        row = {"step": step, "reward_mean": step / 20, "kl_k1_per_completion": step / 100, "completions": 64}
        row |= {"correct_rate": step / 40, "s_wm": None, "scorer_id": "scorer-1"}
        rows.append(row | ({"dev_accuracy": step / 30} if step % 10 == 0 else {}))
    (ppo / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in (1, 20):
        records = [
            RolloutRecord(
                id=f"t/{question}",
                question=f"Training question {question} of step {step}?",
                gold_answer="5",
                trajectories=(
                    Trajectory(output="not scored", final_answer=None, reward=None),
                    *(
                        Trajectory(
                            output=f"<b>{question}/{arm}</b>", final_answer=None, reward=question + arm / 10
                        )
                        for arm in range(4)
                    ),
                ),
                scores=Scores(s_end=0.5, s_path=0.25, s_cf=None, s_wm=0.125),
                policy="ppo@0",
            )
            for question in range(8)
        ]
        write_records(ppo / "trajectories" / f"step_{step:05d}.jsonl", records)
    return tmp_path


def test_page_shows_the_summarys_table_the_curves_and_the_facts(report: ModuleType, run_dir: Path) -> None:
    page = report.write_demo_report(run_dir)
    assert page == run_dir / "report.html"
    text = page.read_text(encoding="utf-8")
    for cell in ("<td>0.00%</td>", "<td>30.00%</td>", "<td>80.00%</td>", "<td>ppo - sft</td><td>+50.00</td>"):
        assert cell in text
    assert "ppo answers more questions correctly than sft" in text
    for title in ("Reward", "KL to the SFT model", "Accuracy"):
        assert f"<h3>{title}</h3>" in text
    assert "Coherence scores" not in text  # logged as null only: left out, not drawn as zero
    assert "<td>1,280</td>" not in text
    assert ">1,280<" in text  # 20 steps of 64 completions
    assert "http" not in text.replace("http-equiv", "")


def test_evaluations_are_marked_points_and_steps_are_lines(report: ModuleType, run_dir: Path) -> None:
    text = report.write_demo_report(run_dir).read_text(encoding="utf-8")
    chart = re.search(r'aria-label="Accuracy">.*?</svg>', text, re.S)
    assert chart
    assert re.findall(r"<title>dev, greedy: (\S+) at (\d+)</title>", chart[0]) == [
        ("25%", "0"),
        ("33.3%", "10"),
        ("66.7%", "20"),
    ]


def test_five_scored_trajectories_of_the_last_step_run_from_highest_to_lowest(
    report: ModuleType, run_dir: Path
) -> None:
    step, examples = report.example_trajectories(run_dir / "checkpoints/ppo_rl/trajectories")
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
    text = report.write_demo_report(run_dir).read_text(encoding="utf-8")
    assert "&lt;b&gt;7/3&lt;/b&gt;" in text
    assert "not scored" not in text


def test_missing_results_are_one_line_and_no_page(report: ModuleType, run_dir: Path) -> None:
    (run_dir / "checkpoints/ppo_rl/metrics.jsonl").unlink()
    with pytest.raises(UserError, match="no PPO metrics; run the demo to its end"):
        report.write_demo_report(run_dir)
    (run_dir / "eval/summary.json").write_text("{}")
    with pytest.raises(UserError, match="no evaluation summary"):
        report.write_demo_report(run_dir)
    assert not (run_dir / "report.html").exists()


def test_few_or_no_trajectories_are_enough_for_a_page(report: ModuleType, run_dir: Path) -> None:
    folder = run_dir / "checkpoints/ppo_rl/trajectories"
    for path in folder.iterdir():
        path.unlink()
    assert report.example_trajectories(folder) == (None, [])
    assert "trajectories of step" not in report.write_demo_report(run_dir).read_text(encoding="utf-8")

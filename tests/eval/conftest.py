"""Two tiny random Llamas, a small dataset in GSM8K's format, hand-made results, a demo's folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest

from looper_eval.dataset import Dataset, EvalQuestion, questions_digest
from looper_eval.engines import Answer
from looper_eval.generate import grade
from looper_eval.manifest import ModelEntry, open_folder
from looper_eval.settings import resolve_settings
from looper_eval.summary import compare
from looper_schemas.records import RolloutRecord, Trajectory, to_line, write_records
from looper_schemas.scoring import Scores

MakeResults = Callable[..., Path]
SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "demo"
RIGHT, WRONG = ("Answer: #### 5", "stop"), ("Answer: #### 4", "stop")


@pytest.fixture(scope="session")
def gsm8k_lines() -> list[dict[str, str]]:
    return [
        {
            "question": f"Ann has {n} apples and buys {n + 2} more. How many apples does she have?",
            "answer": f"Ann has {n} + {n + 2} = <<{n}+{n + 2}={2 * n + 2}>>{2 * n + 2}.\n#### {2 * n + 2}",
        }
        for n in range(1, 13)
    ]


@pytest.fixture(scope="session")
def dataset_file(tmp_path_factory: pytest.TempPathFactory, gsm8k_lines: list[dict[str, str]]) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in gsm8k_lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory, dataset_file: Path) -> tuple[Path, Path]:
    """Folders of two random Llamas that differ in their weights alone."""
    from looper_trainer.demo.model import Shape, build_small_llama

    folder = tmp_path_factory.mktemp("models")
    shape = Shape(vocabulary=400, width=32, layers=2, heads=4, feed_forward=48, positions=256)
    for seed in (0, 1):
        build_small_llama(folder / f"m{seed}", dataset_file.parent, seed, shape)
    return folder / "m0", folder / "m1"


@pytest.fixture
def make_results(tmp_path: Path) -> MakeResults:
    """Writes a results folder from each model's answers: (text, finish reason) for each gold answer."""

    def make(
        answers: dict[str, Sequence[tuple[str, str]]],
        golds: Sequence[str],
        solutions: Sequence[str] | None = None,
        questions: Sequence[str] | None = None,
    ) -> Path:
        out = tmp_path / "results"
        items = tuple(
            EvalQuestion(
                id=f"q/{index}",
                question=questions[index] if questions else f"Question number {index}?",
                answer=gold,
                solution=solutions[index] if solutions else "",
            )
            for index, gold in enumerate(golds)
        )
        entries = {name: ModelEntry(place=f"models/{name}", identity=f"folder:{name}") for name in answers}
        dataset = Dataset("hand-made.jsonl", questions_digest(items), items)
        manifest = open_folder(out, dataset, resolve_settings("looper"), entries)
        for name, texts in answers.items():
            records = [
                grade(item, Answer(text, reason, len(text.split())), manifest.digest(name))  # type: ignore[arg-type]
                for item, (text, reason) in zip(items, texts, strict=True)
            ]
            (out / f"{name}.jsonl").write_text("".join(map(to_line, records)), encoding="utf-8")
        return out

    return make


@pytest.fixture
def demo_report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that writes the demo's page."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.delitem(sys.modules, "report", raising=False)
    import report

    return report


@pytest.fixture
def demo_run(make_results: MakeResults, tmp_path: Path) -> Path:
    """What a demo leaves behind, by hand: accuracies 0, 30 and 80%, 20 steps, trajectories of two of them."""
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

"""Two tiny random Llamas, a small dataset in GSM8K's format, and folders of hand-made results."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from looper_eval.dataset import Dataset, EvalQuestion, questions_digest
from looper_eval.engines import Answer
from looper_eval.generate import grade
from looper_eval.manifest import ModelEntry, open_folder
from looper_eval.settings import resolve_settings
from looper_schemas.records import to_line

MakeResults = Callable[..., Path]


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

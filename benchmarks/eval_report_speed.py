"""Seconds to grade and report 1,209 questions x 3 models on a CPU.

    python benchmarks/eval_report_speed.py --questions gsm8k_test.jsonl --solutions half.jsonl --out FILE.json

Questions are the first --count of a GSM8K file; answers are real model solutions of MIT-licensed records
(`arms` with `text`), for the third model inside a `<think>` of eight solutions, as reasoning models write.
`grade` is all verdicts and the writing of the record files; `report` is the command `looper-eval report` with
its start-up: records read and checked, figures, report.html, report.md, report.json. No GPU, no network.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from looper_eval.dataset import Dataset, load_dataset
from looper_eval.engines import Answer
from looper_eval.generate import grade
from looper_eval.manifest import ModelEntry, open_folder
from looper_eval.settings import Settings
from looper_schemas.records import to_line

LIMIT_S = 10.0


def answers(solutions: list[str], model: int) -> Iterator[Answer]:
    """Answers of model 0, 1 or 2, without end."""
    texts = itertools.cycle(solutions[model::3])
    for number in itertools.count():
        text = next(texts)
        if model == 2:
            thought = "\n\n".join(itertools.islice(texts, 8))
            text = f"<think>\n{thought}\n</think>\n\n{text}"
        yield Answer(text, "length" if number % 50 == 7 else "stop", len(text) // 4)


def one_round(dataset: Dataset, solutions: list[str], folder: Path) -> dict[str, float]:
    """Seconds of one whole grading and report."""
    settings = Settings()
    names = ("base", "sft", "ppo")
    entries = {name: ModelEntry(place=name, identity=name) for name in names}
    manifest = open_folder(folder, dataset, settings, entries)
    began = time.perf_counter()
    for model, name in enumerate(names):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for item, answer in zip(dataset.questions, answers(solutions, model), strict=False):
                file.write(to_line(grade(item, answer, manifest.digest(name))))
    grade_s = time.perf_counter() - began
    began = time.perf_counter()
    command = [sys.executable, "-m", "looper_eval.cli", "report", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    report_s = time.perf_counter() - began
    size = (folder / "report.html").stat().st_size
    return {"grade_s": grade_s, "report_s": report_s, "total_s": grade_s + report_s, "html_bytes": size}


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--questions", required=True)
    parser.add_argument("--solutions", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1209)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    dataset = load_dataset(options.questions, options.count)
    lines = options.solutions.read_text(encoding="utf-8").splitlines()
    solutions = [arm["text"] for line in lines for arm in json.loads(line)["arms"]]
    rounds = []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as scratch:
            rounds.append(one_round(dataset, solutions, Path(scratch, "results")))
    document = {
        "benchmark": "eval_report_speed", "date": time.strftime("%Y-%m-%d"), "commit": options.commit,
        "cpu": cpu_name(), "python": platform.python_version(), "questions": len(dataset.questions),
        "models": 3, "limit_s": LIMIT_S,
        "median": {key: statistics.median(one[key] for one in rounds) for key in rounds[0]},
        "rounds": rounds,
    }  # fmt: skip
    text = json.dumps(document, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    return 0 if document["median"]["total_s"] < LIMIT_S else 1


if __name__ == "__main__":
    sys.exit(main())

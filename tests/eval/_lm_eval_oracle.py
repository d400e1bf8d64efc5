"""Runs lm-evaluation-harness on given generations: `python _lm_eval_oracle.py JOB.json RESULT.json`.

A script of its own, for an interpreter that has lm-eval and need not have anything of this project.
JOB: {"tasks": [names of YAML files], "docs": [{"question", "answer"}], "outputs": [...]}. The tasks are
lm-eval's own, with their filters and metrics as shipped; only where documents come from is replaced.
RESULT: {"scores": {task: {filter: [exact_match of each document]}}, "samples": what lm-eval would log}.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    import lm_eval.tasks
    import yaml
    from lm_eval.api.model import LM
    from lm_eval.evaluator import simple_evaluate

    class Given(LM):
        """Answers each document with its given output."""

        def generate_until(self, requests, disable_tqdm=False):
            return [job["outputs"][request.doc_id] for request in requests]

        def loglikelihood(self, requests):
            raise NotImplementedError

        def loglikelihood_rolling(self, requests):
            raise NotImplementedError

    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch, "docs.jsonl")
        data.write_text("".join(json.dumps(doc) + "\n" for doc in job["docs"]), encoding="utf-8")
        files = {"train": str(data), "test": str(data)}
        shipped = Path(lm_eval.tasks.__file__).parent / "gsm8k"
        tasks = [
            yaml.safe_load((shipped / f"{name}.yaml").read_text(encoding="utf-8"))
            | {
                "dataset_path": "json",
                "dataset_name": None,
                "dataset_kwargs": {"data_files": files, "cache_dir": scratch},
                "num_fewshot": 0,
            }
            for name in job["tasks"]
        ]
        found = simple_evaluate(model=Given(), tasks=tasks, log_samples=True, bootstrap_iters=0)
    scores: dict[str, dict[str, list[float]]] = {}
    for name, samples in found["samples"].items():
        for sample in sorted(samples, key=lambda one: one["doc_id"]):
            scores.setdefault(name, {}).setdefault(sample["filter"], []).append(sample["exact_match"])
    Path(sys.argv[2]).write_text(json.dumps({"scores": scores, "samples": found["samples"]}, default=str))


if __name__ == "__main__":
    main()

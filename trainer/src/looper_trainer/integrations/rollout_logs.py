"""`looper export-rollouts`: scored rollouts as the logs of lm-eval or inspect, for the viewers people have.

- `lm-eval` (0.4): `samples_<task>_<date>.jsonl`, one line a question, as `--log_samples` writes it;
- `inspect` (0.3): one `.json` log that `inspect view` opens, one sample for each completion.

Rewards and components go along as metrics and metadata. A completion without a score has no reward there
either: the key is left out, and the sample's metadata says `unscored`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

from pydantic import Field

from looper_schemas.answers import answers_match
from looper_schemas.prompt import format_prompt
from looper_schemas.records import RolloutRecord, Trajectory, read_records
from looper_trainer.config import StageConfig
from looper_trainer.integrations.groups import COMPONENTS


class ExportRolloutsConfig(StageConfig):
    """Write rollouts as logs of lm-eval or inspect."""

    rollouts: Annotated[Path, Field(description="file of the records")] = Path("data/ppo_rollouts.jsonl")
    to: Annotated[Literal["lm-eval", "inspect"], Field(description="whose format")] = "inspect"
    output: Annotated[Path, Field(description="folder of the log")] = Path("runs/rollout-logs")
    task: Annotated[str, Field(pattern=r"^[\w.-]+$", description="name of the task in it")] = "rollouts"


def run(config: ExportRolloutsConfig) -> None:
    """Write the log.

    Raises:
        RecordError: the rollouts are missing or unusable.
    """
    records = read_records(config.rollouts, RolloutRecord)
    now = datetime.fromtimestamp(config.rollouts.stat().st_mtime, UTC)
    config.output.mkdir(parents=True, exist_ok=True)
    stamp = now.strftime("%Y-%m-%dT%H-%M-%S")
    if config.to == "lm-eval":
        file = config.output / f"samples_{config.task}_{stamp}.jsonl"
        lines = [
            json.dumps(lm_eval_sample(record, n), ensure_ascii=False) for n, record in enumerate(records)
        ]
        text = "".join(f"{line}\n" for line in lines)
    else:
        file = config.output / f"{stamp}_{config.task}.json"
        text = json.dumps(inspect_log(records, config.task, now), ensure_ascii=False, indent=1) + "\n"
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
    print(f"export-rollouts: {len(records)} questions to {file}")


def lm_eval_sample(record: RolloutRecord, number: int) -> dict[str, Any]:
    """One question as a line of lm-eval's sample log; `exact_match` is the share of right completions."""
    doc = {"id": record.id, "question": record.question, "answer": record.gold_answer}
    prompt = format_prompt(record.question)
    outputs = [trajectory.output for trajectory in record.trajectories]
    rewards = [t.reward for t in record.trajectories if t.reward is not None]
    metrics: dict[str, float] = {}
    if outputs:
        metrics["exact_match"] = fmean(answers_match(output, record.gold_answer) for output in outputs)
    if rewards:
        metrics["reward"] = fmean(rewards)
    metrics |= _components(record)
    return {
        "doc_id": number,
        "doc": doc,
        "target": record.gold_answer,
        "arguments": {"gen_args_0": {"arg_0": prompt, "arg_1": {}}},
        "resps": [outputs],
        "filtered_resps": [[t.final_answer or "" for t in record.trajectories]],
        "filter": "none",
        "metrics": list(metrics),
        "doc_hash": _hash(json.dumps(doc, indent=2, ensure_ascii=False)),
        "prompt_hash": _hash(prompt),
        "target_hash": _hash(record.gold_answer),
        **metrics,
    }


def inspect_log(records: Sequence[RolloutRecord], task: str, created: datetime) -> dict[str, Any]:
    """All records as one log of inspect; a completion is a sample, its place is its epoch."""
    first = records[0]
    when = created.isoformat()
    samples = [
        _inspect_sample(record, trajectory, epoch)
        for record in records
        for epoch, trajectory in enumerate(record.trajectories, start=1)
    ]
    right = [sample["scores"]["correct"]["value"] == "C" for sample in samples]
    accuracy = {"accuracy": {"name": "accuracy", "value": fmean(right) if right else 0.0}}
    return {
        "version": 2,
        "status": "success",
        "eval": {
            "created": when,
            "task": task,
            "task_id": _hash(task)[:22],
            "run_id": _hash(f"{first.policy}{when}")[:22],
            "task_version": 0,
            "dataset": {"name": task, "samples": len(records), "sample_ids": [r.id for r in records]},
            "model": f"looper/{first.policy}",
            "config": {"epochs": max(len(record.trajectories) for record in records)},
            "metadata": {"scorer_id": first.scorer_id, "reward_mode": first.reward_mode},
        },
        "plan": {"name": "plan", "steps": []},
        "results": {
            "total_samples": len(samples),
            "completed_samples": len(samples),
            "scores": [{"name": "correct", "scorer": "correct", "metrics": accuracy}],
        },
        "stats": {"started_at": when, "completed_at": when, "model_usage": {}},
        "samples": samples,
    }


def _inspect_sample(record: RolloutRecord, trajectory: Trajectory, epoch: int) -> dict[str, Any]:
    prompt = format_prompt(record.question)
    model = f"looper/{record.policy}"
    message = {"role": "assistant", "content": trajectory.output, "source": "generate", "model": model}
    stop = "max_tokens" if trajectory.finish_reason == "length" else "stop"
    right = answers_match(trajectory.output, record.gold_answer)
    scores: dict[str, Any] = {
        "correct": {"value": "C" if right else "I", "answer": trajectory.final_answer or ""},
    }
    if trajectory.reward is not None:
        scores["reward"] = {"value": trajectory.reward}
    scores |= {name: {"value": value} for name, value in _components(record).items()}
    return {
        "id": record.id,
        "epoch": epoch,
        "input": prompt,
        "target": record.gold_answer,
        "messages": [{"role": "user", "content": prompt, "source": "input"}, message],
        "output": {
            "model": model,
            "choices": [{"message": message, "stop_reason": stop}],
            "completion": trajectory.output,
        },
        "scores": scores,
        "metadata": {
            "question": record.question,
            "seed": trajectory.seed,
            "tokens_out": trajectory.tokens_out,
            "unscored": trajectory.reward is None,
        },
        "store": {},
        "events": [],
        "model_usage": {},
        "attachments": {},
    }


def _components(record: RolloutRecord) -> dict[str, float]:
    found = {} if record.scores is None else {name: getattr(record.scores, name) for name in COMPONENTS}
    return {name: value for name, value in found.items() if value is not None}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

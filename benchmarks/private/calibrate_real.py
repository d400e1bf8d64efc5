"""`reward-service calibrate` on real solutions: 657 questions with four labelled solutions each.

    python benchmarks/private/calibrate_real.py --data FOLDER [--out FOLDER] [--rollouts FILE]

turns model_solutions/half.jsonl of FOLDER into a file of rollouts, has the command read it (it must refuse it
first: the questions are of a test split, and nothing here is tuned on them), checks the labels that the
service found against those of the file, and keeps the report's main figures. An arm whose answer the file
leaves out is one without an answer, so its text is left out too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from kept import ROOT, keep, stamp

from looper_schemas.records import RolloutRecord, Trajectory, write_records
from reward_service.calibration.command import calibrate
from reward_service.calibration.rollouts import read_rollouts
from reward_service.errors import StartError
from reward_service.settings import Settings


def as_record(row: dict[str, Any]) -> RolloutRecord:
    """One line of half.jsonl as our record. The service finds the answers in the texts itself."""
    return RolloutRecord(
        id=row["qid"],
        question=row["question"],
        gold_answer=row["gold"],
        trajectories=tuple(
            Trajectory(
                output=arm["text"] if arm["answer"] is not None else "", final_answer=None, reward=None
            )
            for arm in row["arms"]
        ),
        policy="four models",
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("LOOPER_DATA") or (ROOT.parent / "shared" / "data"))
    )
    parser.add_argument("--out", type=Path, help="folder of the whole report (default: none is kept)")
    parser.add_argument("--rollouts", type=Path, help="keep the file of rollouts here")
    parser.add_argument("--resamples", type=int, default=1000)
    options = parser.parse_args()
    source = options.data / "model_solutions" / "half.jsonl"
    if not source.is_file():
        print(f"error: {source}: no such file; pass --data or set LOOPER_DATA", file=sys.stderr)
        return 2
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rollouts = options.rollouts or folder / "rollouts.jsonl"
        write_records(rollouts, map(as_record, rows))
        try:
            read_rollouts(rollouts)
        except StartError as error:
            print(f"refused, as it should be: {error}")
        else:
            print("error: questions of a test split were not refused", file=sys.stderr)
            return 1
        out = options.out or folder / "report"
        print(calibrate(rollouts, out, Settings(home=folder), allow_test=True, resamples=options.resamples))
        report = json.loads((out / "calibration.json").read_text(encoding="utf-8"))
    right = sum(arm["correct"] for row in rows for arm in row["arms"])
    if report["arms_right"] != right:
        print(f"error: {report['arms_right']} arms are right, the file says {right}", file=sys.stderr)
        return 1
    for one in report["risk_coverage"].values():  # long, and in the report
        del one["coverage"], one["risk"]
    del report["histograms"], report["file"]
    for one in report["reliability"].values():
        for table in (one, one.get("after_logistic_scaling", {})):
            table.pop("bins", None)
    keep("calibrate_real", {**stamp(), **report})
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Whether a recorded answer is correct to a grader named on the command line."""

from __future__ import annotations

from looper_eval import grading
from looper_schemas.records import EvalRecord

# Names as users write them; lm-evaluation-harness hyphenates its own.
GRADERS = {name.replace("_", "-"): grader for name, grader in grading.GRADERS.items()}


def verdict(record: EvalRecord, grader: str) -> bool:
    """Whether `record` is correct to `grader`.

    Our own rule (`robust`) holds a truncated answer to be wrong; the published rules look at the text alone.
    """
    if grader == "robust":
        return record.correct
    return GRADERS[grader](record.output, record.gold_answer)

"""How many wrong answers of a model hold a slip of arithmetic: its equations, read by Regime W's reader.

    python benchmarks/private/equation_errors.py sft=eval/sft.jsonl ppo=eval/ppo.jsonl

Reads `looper-eval`'s answer files. Prints, for each: equations stated, the share of them that is true, and
of the right and of the wrong answers the share whose equations are all true. A wrong answer without a false
equation was set up wrongly, or reasoned without equations.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from regime_w.equations import equations


def errors(path: Path) -> dict[str, Any]:
    """The figures of one file."""
    stated = true = 0
    answers = {True: 0, False: 0}
    sound = {True: 0, False: 0}
    for line in path.read_text(encoding="utf-8").splitlines():
        answer = json.loads(line)
        holds = [equation.holds for equation in equations(answer["output"])]
        stated += len(holds)
        true += sum(holds)
        answers[answer["correct"]] += 1
        sound[answer["correct"]] += all(holds)
    return {
        "equations": stated, "true": true / stated,
        "right_answers": answers[True], "of_them_all_true": sound[True] / answers[True],
        "wrong_answers": answers[False], "of_these_all_true": sound[False] / answers[False],
    }  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    """One JSON document on standard output."""
    found = {name: errors(Path(path)) for name, _, path in (given.partition("=") for given in arguments)}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])

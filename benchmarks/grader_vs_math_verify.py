"""Our grader beside math-verify on the hand-labelled cases of tests/schemas, category by category.

    python benchmarks/grader_vs_math_verify.py --out benchmarks/results/grader_vs_math_verify.md

A verdict is right when the stated answer is credited, or when the trap beside it is not. Both graders see the
same texts and numbers in one run; math-verify without its timeouts, and not the exponent bombs, which it
would compute. Exit code 1 when it is ahead in a category.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import time
import warnings
from collections import Counter
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import math_verify

from looper_schemas.answers import answers_match

CASES = Path(__file__).parents[1] / "tests" / "schemas" / "_cases.py"


def their_match(text: str, gold: str) -> bool:
    predicted = math_verify.parse(text, parsing_timeout=None)
    expected = math_verify.parse(gold, parsing_timeout=None)
    return bool(math_verify.verify(expected, predicted, timeout_seconds=None))


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    spec = spec_from_file_location("grader_cases", CASES)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    verdicts: Counter[str] = Counter()
    ours: Counter[str] = Counter()
    theirs: Counter[str] = Counter()
    cases = [case for case in module.read_cases() if "999999999" not in case.text]
    for case in cases:
        for gold, credit in ((case.answer, True), (case.trap, False)):
            if gold is not None:
                verdicts[case.category] += 1
                ours[case.category] += answers_match(case.text, gold) == credit
                theirs[case.category] += their_match(case.text, gold) == credit
    version = importlib.metadata.version("math-verify")
    lines = [
        "# The robust grader beside math-verify",
        "",
        f"{len(cases)} hand-labelled texts, {verdicts.total()} verdicts; math-verify {version}; "
        f"{time.strftime('%Y-%m-%d')}, commit {options.commit}.",
        "",
        "| category | verdicts | robust | math-verify |",
        "|---|---:|---:|---:|",
        *(f"| {name} | {count} | {ours[name]} | {theirs[name]} |" for name, count in verdicts.items()),
        f"| **all** | {verdicts.total()} | {ours.total()} | {theirs.total()} |",
    ]
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    return 0 if all(ours[name] >= theirs[name] for name in verdicts) else 1


if __name__ == "__main__":
    raise SystemExit(main())

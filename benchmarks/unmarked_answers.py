"""What graders make of solutions that never mark their answer, finished and cut off.

    python benchmarks/unmarked_answers.py --solutions half.jsonl --out FILE.md

Solutions are real ones of MIT-licensed records (`arms` with `text`, and the final `A: n` that labels them);
the label's line is taken away. *Finished* is what is left. *Cut after a line* is each proper prefix of whole
lines, as a model leaves it that ends too early; *cut within a line* is one prefix of each solution that ends
at a random character, as a token limit leaves it. A rule *credits* a text in which it reads the gold answer.
Of a finished text whose label is right, credit is due; of one whose label is wrong it is not; a cut text
never reached its answer, so that credit is luck (its last number may happen to be the gold one).
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from looper_eval.grading import lm_eval_flexible
from looper_schemas.answers import answers_match, extract_answer

Rule = Callable[[str, str], tuple[bool, bool]]
"""(text, gold) -> whether an answer is read, whether it is the gold one."""


def robust(text: str, gold: str) -> tuple[bool, bool]:
    """Ours."""
    return extract_answer(text) is not None, answers_match(text, gold)


def last_number(text: str, gold: str) -> tuple[bool, bool]:
    """lm-eval's flexible rule."""
    return any(char.isdigit() for char in text), lm_eval_flexible(text, f"#### {gold}")


def marked_only(text: str, gold: str) -> tuple[bool, bool]:
    """Nothing without a marker: here it never reads anything."""
    return False, False


RULES: dict[str, Rule] = {"robust": robust, "last number": last_number, "marker only": marked_only}


def unlabelled(text: str) -> list[str]:
    """The solution's lines without annotations and without the label."""
    lines = [line for line in text.splitlines() if line.strip()]
    if lines and lines[-1].startswith("A:"):
        lines.pop()
    return [re.sub(r"<<[^>]*>>", "", line) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--solutions", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rng = random.Random(0)
    texts: dict[str, list[tuple[str, str]]] = {name: [] for name in
             ("finished, right", "finished, wrong", "cut after a line", "cut within a line")}  # fmt: skip
    for row in map(json.loads, options.solutions.read_text(encoding="utf-8").splitlines()):
        for arm in row["arms"]:
            lines = unlabelled(arm["text"])
            if not lines:
                continue
            whole = "\n".join(lines)
            texts[f"finished, {'right' if arm['correct'] else 'wrong'}"].append((whole, row["gold"]))
            for end in range(1, len(lines)):
                texts["cut after a line"].append(("\n".join(lines[:end]), row["gold"]))
            if len(whole) > 2:
                texts["cut within a line"].append((whole[: rng.randrange(1, len(whole) - 1)], row["gold"]))
    rows = [f"| texts | n | {' | '.join(f'{rule}: read | credited' for rule in RULES)} |"]
    rows.append("|---|---:|" + "---:|" * 2 * len(RULES))
    for name, group in texts.items():
        cells = []
        for rule in RULES.values():
            verdicts = [rule(text, gold) for text, gold in group]
            cells += [f"{100 * sum(one[place] for one in verdicts) / len(group):.1f}%" for place in (0, 1)]
        rows.append(f"| {name} | {len(group):,} | {' | '.join(cells)} |")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    )
    made = f"{time.strftime('%Y-%m-%d')}, commit {commit.stdout.strip()}"
    page = f"# Solutions that do not mark their answer\n\n{made}.\n\n" + "\n".join(rows) + "\n"
    print(page)
    if options.out:
        options.out.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()

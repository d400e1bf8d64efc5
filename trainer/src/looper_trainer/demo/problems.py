"""The demo's problem set: grade-school word problems of our own with worked solutions, in GSM8K's format.

`python -m looper_trainer.demo.problems OUT --seed S` writes `OUT/train.jsonl` and `OUT/test.jsonl`, each line
`{"question": ..., "answer": "<worked solution>\\n#### <n>"}`. An instance is a template with its numbers; no
instance is ever written twice, so neither the test file nor any split of the train file shares one.

Worked solutions come from two hands, as they do in collections that people wrote. One author does all in
one line, `Left: 5 * 12 - 7 = 53`; the other writes every step, `Bought: 5 * 12 = 60` and `Left: 60 - 7 = 53`.
They shared the work unevenly: the first wrote most solutions of one half of the templates, the second of the
other half. For a small model the second habit is surer. Imitation learns the mixture; a reward for right
answers can find out which habit pays.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from looper_trainer.demo.templates import PEOPLE, TEMPLATES, WORDS, Template
from looper_trainer.errors import DataError

ONE_LINE_SHARES = (0.65, 0.3)  # of even and of odd templates
SMALLEST, LARGEST = 2, 999
_STEP = re.compile(r"(?P<label>.+): (?P<result>[a-z]) = (?P<left>\w+) (?P<op>[-+*/]) (?P<right>\w+)")
_DRAWS = 200


@dataclass(frozen=True)
class WordProblem:
    """One instance. `key` is its template with its numbers; `cot` ends before the final-answer line."""

    key: tuple[str, tuple[int, ...]]
    question: str
    cot: str
    answer: int

    def to_line(self) -> str:
        """The instance as one line of a GSM8K file."""
        return json.dumps({"question": self.question, "answer": f"{self.cot}\n#### {self.answer}"}) + "\n"


class TemplateExhausted(DataError):
    """A template has no unused instance left: ask for fewer problems or widen its ranges."""


def make_problems(count: int, seed: int) -> list[WordProblem]:
    """`count` different instances in random order, every template used equally often (to within one).

    Raises:
        TemplateExhausted: `count` is more than the templates' ranges hold.
    """
    rng = random.Random(f"looper-demo-{seed}")
    taken: set[tuple[str, tuple[int, ...]]] = set()
    problems = []
    for index in range(count):
        problem = _draw(TEMPLATES[index % len(TEMPLATES)], rng, taken)
        taken.add(problem.key)
        problems.append(problem)
    rng.shuffle(problems)
    return problems


def _draw(template: Template, rng: random.Random, taken: set[tuple[str, tuple[int, ...]]]) -> WordProblem:
    for _ in range(_DRAWS):
        numbers = {letter: rng.randint(low, high) for letter, (low, high) in template.ranges.items()}
        if (template.name, tuple(numbers.values())) in taken:
            continue
        problem = build(template, numbers, rng)
        if problem is not None:
            return problem
    raise TemplateExhausted(f"template {template.name}: no unused instance left; ask for fewer problems")


def build(template: Template, numbers: dict[str, int], rng: random.Random) -> WordProblem | None:
    """`template` with `numbers`; names, words and hand come from `rng`. None if a result is inadmissible."""
    people = rng.sample(PEOPLE, 3)
    name, he, his, him = people[0]
    words: dict[str, str] = {kind: rng.choice(choices) for kind, choices in WORDS.items()}
    words |= {"name": name, "name2": people[1][0], "name3": people[2][0]}
    words |= {"he": he, "He": he.capitalize(), "his": his, "him": him}
    steps = [_parsed(template, step) for step in template.steps]
    values = dict(numbers)
    for step in steps:
        result = step.applied_to(values)
        if result is None or not SMALLEST <= result <= LARGEST:
            return None
        values[step.result] = result
    one_line_share = ONE_LINE_SHARES[TEMPLATES.index(template) % 2]
    cot = (_in_one_line if rng.random() < one_line_share else _step_by_step)(steps, values).format(**words)
    question = template.question.format(**words, **numbers)
    return WordProblem((template.name, tuple(numbers.values())), question, cot, values[steps[-1].result])


@dataclass(frozen=True)
class _Step:
    """A parsed step; its operands are letters of `values` or constants."""

    label: str
    result: str
    left: str
    op: str
    right: str

    def applied_to(self, values: Mapping[str, int]) -> int | None:
        """The step's result, or None where a division leaves a remainder."""
        left, right = (values.get(operand) or int(operand) for operand in (self.left, self.right))
        if self.op == "/":
            return None if left % right else left // right
        return {"+": left + right, "-": left - right, "*": left * right}[self.op]


def _parsed(template: Template, step: str) -> _Step:
    match = _STEP.fullmatch(step)
    if match is None:
        raise ValueError(f"template {template.name}: {step!r} is not `label: result = left op right`")
    return _Step(**match.groupdict())


def _step_by_step(steps: Sequence[_Step], values: Mapping[str, int]) -> str:
    return "\n".join(
        f"{step.label}: {values.get(step.left, step.left)} {step.op} {values.get(step.right, step.right)}"
        f" = {values[step.result]}"
        for step in steps
    )


def _in_one_line(steps: Sequence[_Step], values: Mapping[str, int]) -> str:
    """The last step with every earlier result written out, with no more brackets than needed."""
    written = {letter: (str(value), 3) for letter, value in values.items()}  # text and how tightly it binds
    for step in steps:
        tightness = 1 if step.op in "+-" else 2
        left, left_tightness = written.get(step.left, (step.left, 3))
        right, right_tightness = written.get(step.right, (step.right, 3))
        left = f"({left})" if left_tightness < tightness else left
        loose_right = right_tightness < tightness or (right_tightness == tightness and step.op in "-/")
        right = f"({right})" if loose_right else right
        written[step.result] = (f"{left} {step.op} {right}", tightness)
    last = steps[-1]
    return f"{last.label}: {written[last.result][0]} = {values[last.result]}"


def write_problem_set(folder: Path, seed: int, train: int, test: int) -> None:
    """Write `train.jsonl` and `test.jsonl` into `folder`, which is made if it is missing."""
    problems = make_problems(train + test, seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train.jsonl", problems[:train]), ("test.jsonl", problems[train:])):
        (folder / name).write_text("".join(problem.to_line() for problem in part), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit code 2 with one line when the request cannot be met."""
    parser = argparse.ArgumentParser("looper_trainer.demo.problems", description="Write the problem set.")
    parser.add_argument("out", type=Path, help="folder for train.jsonl and test.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=20_000, help="problems in train.jsonl")
    parser.add_argument("--test", type=int, default=800, help="problems in test.jsonl")
    options = parser.parse_args(arguments)
    if options.train < 1 or options.test < 1:
        parser.error("--train and --test must be at least 1")
    try:
        write_problem_set(options.out, options.seed, options.train, options.test)
    except (TemplateExhausted, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

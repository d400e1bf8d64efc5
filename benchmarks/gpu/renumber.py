"""Training questions with new numbers, and the answers to them, from GSM8K's worked solutions.

    python benchmarks/gpu/renumber.py --solutions train.jsonl --input gsm8k_train.jsonl --output new.jsonl

A solution's steps between `<<` and `>>` are a program: each operand is a number of the question, the result
of an earlier step, or a constant. Where that reading is the only one, and the program gives the recorded
results, numbers of the question are drawn anew (half to double, round ones stay round) and the program run
again; kept is what leaves whole numbers whole and positive ones positive. PPO on such questions cannot be
paid for remembering a solution (decision 0068).

`--solutions` is the dataset's own file (question, answer with the steps), `--input` the problems of the
training split that `looper prepare-data` made of it; others are left out. Writes problems.
"""

from __future__ import annotations

import argparse
import ast
import json
import operator
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from looper_schemas.records import Problem, read_records, to_line

_STEP = re.compile(r"<<([^<>=]+)=([^<>]+)>>")
_NUMBER = re.compile(r"(?<![\w.,/:])\d{1,3}(?:,\d{3})+(?![\w,]|\.\d)|(?<![\w.,/:])\d+(?![\w/:]|[.,]\d)")
_OPERATIONS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip
# Halves and doubles, weeks, months, hours, minutes, percents: such an operand may not be the question's.
_CONSTANTS = frozenset({0, 1, 2, 7, 10, 12, 24, 30, 52, 60, 100, 365, 1000})
_TRIES = 60


@dataclass(frozen=True)
class Program:
    """The steps of a solution, with their results, and the numbers of its question that may change."""

    steps: Sequence[tuple[ast.expr, Fraction]]
    numbers: Mapping[Fraction, re.Match[str]]


def read_program(problem: Problem, solution: str) -> Program | None:
    """The one way to read the `solution` of `problem` as a program, or None: none, or more than one."""
    found = [(_parse(formula), _value(result)) for formula, result in _STEP.findall(solution)]
    steps = [(tree, result) for tree, result in found if tree is not None and result is not None]
    if not steps or len(steps) < len(found) or steps[-1][1] != _value(problem.answer):
        return None
    places: dict[Fraction, list[re.Match[str]]] = {}
    for match in _NUMBER.finditer(problem.question):
        places.setdefault(Fraction(match[0].replace(",", "")), []).append(match)
    results: list[Fraction] = []
    used: set[Fraction] = set()
    for tree, result in steps:
        operands = set(_operands(tree))
        used |= operands
        if operands & set(results) & set(places) or len(set(results)) < len(results):
            return None  # the question's number, or the step's result?
        try:
            if _run(tree, {}) != result:
                return None  # rounded
        except ZeroDivisionError:
            return None
        results.append(result)
    numbers = {
        value: found[0] for value, found in places.items()
        if len(found) == 1 and value in used and value not in _CONSTANTS and value not in results
    }  # fmt: skip
    return Program(steps, numbers) if numbers else None


def renumbered(problem: Problem, program: Program, rng: random.Random) -> Problem | None:
    """`problem` with other numbers and their answer; None if the draw gives no proper question."""
    drawn = {value: _draw(value, match, problem.question, rng) for value, match in program.numbers.items()}
    if len(set(drawn.values())) < len(drawn) or all(old == new for old, new in drawn.items()):
        return None
    values: dict[Fraction, Fraction] = dict(drawn)
    for tree, before in program.steps:
        try:
            after = _run(tree, values)
        except ZeroDivisionError:
            return None
        whole = after.denominator == 1 if before.denominator == 1 else (after * 100).denominator == 1
        if not whole or (before > 0) != (after > 0) or abs(after) > 10 * abs(before):
            return None
        values[before] = after
    question = problem.question
    for value, match in sorted(program.numbers.items(), key=lambda pair: -pair[1].start()):
        text = f"{int(drawn[value]):,}" if "," in match[0] else str(int(drawn[value]))
        question = question[: match.start()] + text + question[match.end() :]
    answer = values[program.steps[-1][1]]
    return (
        Problem(id=problem.id, question=question, answer=str(int(answer)))
        if answer.denominator == 1
        else None
    )


def _draw(value: Fraction, match: re.Match[str], question: str, rng: random.Random) -> Fraction:
    number = int(value)
    unit = next(unit for unit in (100, 10, 5, 1) if number % unit == 0 and number >= 2 * unit)
    most = 2 * number // unit
    if question[match.end() : match.end() + 1] == "%" or question[match.end() :].startswith(" percent"):
        most = min(most, 95 // unit)
    return Fraction(unit * rng.randint(max(1, number // (2 * unit)), max(1, most)))


def _parse(formula: str) -> ast.expr | None:
    """The formula's tree, of numbers and four operations; None if it is anything else."""
    text = formula.replace(",", "").replace("x", "*").replace("$", "").strip()
    try:
        tree = ast.parse(re.sub(r"(?<![\d.])0+(?=\d)", "", text), mode="eval").body
    except SyntaxError:
        return None
    return tree if all(_allowed(node) for node in ast.walk(tree)) else None


def _allowed(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return type(node.value) in (int, float)
    kinds = (ast.BinOp, ast.UnaryOp, ast.USub, ast.Add, ast.Sub, ast.Mult, ast.Div)
    return isinstance(node, kinds)


def _operands(tree: ast.expr) -> Iterator[Fraction]:
    return (Fraction(str(node.value)) for node in ast.walk(tree) if isinstance(node, ast.Constant))


def _run(tree: ast.expr, values: Mapping[Fraction, Fraction]) -> Fraction:
    if isinstance(tree, ast.Constant):
        number = Fraction(str(tree.value))
        return values.get(number, number)
    if isinstance(tree, ast.UnaryOp):
        return -_run(tree.operand, values)
    assert isinstance(tree, ast.BinOp)
    return _OPERATIONS[type(tree.op)](_run(tree.left, values), _run(tree.right, values))


def _value(text: str) -> Fraction | None:
    try:
        return Fraction(text.replace(",", "").replace("$", "").strip())
    except (ValueError, ZeroDivisionError):
        return None


def main(argv: Sequence[str] | None = None) -> int:
    """Write the questions, and say how many solutions could be read."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--solutions", type=Path, required=True)
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--copies", type=int, default=8, help="of each question, at most")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    rng = random.Random(options.seed)
    with options.solutions.open(encoding="utf-8") as file:
        solutions = {line["question"].strip(): line["answer"] for line in map(json.loads, file)}
    problems = read_records(options.input, Problem)
    read, lines = 0, []
    for problem in problems:
        program = read_program(problem, solutions[problem.question.strip()])
        if program is None:
            continue
        read += 1
        seen = {problem.question}
        for _ in range(_TRIES):
            new = renumbered(problem, program, rng)
            if new is None or new.question in seen:
                continue
            lines.append(to_line(new.model_copy(update={"id": f"{problem.id}-n{len(seen)}"})))
            seen.add(new.question)
            if len(seen) > options.copies:
                break
    rng.shuffle(lines)
    options.output.write_text("".join(line.rstrip("\n") + "\n" for line in lines), encoding="utf-8")
    print(f"{read} of {len(problems)} solutions are programs; {len(lines)} questions to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

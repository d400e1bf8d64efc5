"""The demo's problem set: true solutions, honest splits, readable text."""

from __future__ import annotations

import ast
import json
import operator
import random
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from looper_trainer.demo.problems import (
    TemplateExhausted,
    WordProblem,
    build,
    main,
    make_problems,
    write_problem_set,
)
from looper_trainer.demo.templates import TEMPLATES, WORDS

EQUATION = re.compile(r"([\d(][-+*/() \d]*) = (\d+)")
BY_NAME = {template.name: template for template in TEMPLATES}
BOTH_HANDS = make_problems(20 * len(TEMPLATES), seed=7)
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def exact(expression: str) -> Fraction:
    """The value of an arithmetic expression, read by Python's own parser and worked out in rationals."""

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant):
            return Fraction(str(node.value))
        assert isinstance(node, ast.BinOp), ast.dump(node)
        result: Fraction = OPERATORS[type(node.op)](value(node.left), value(node.right))
        return result

    return value(ast.parse(expression, mode="eval").body)


def in_one_line(problem: WordProblem) -> bool:
    return "\n" not in problem.cot


def lines_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_there_are_at_least_forty_templates_with_different_names_and_questions() -> None:
    assert len(TEMPLATES) >= 40
    assert len({template.name for template in TEMPLATES}) == len(TEMPLATES)
    assert len({template.question for template in TEMPLATES}) == len(TEMPLATES)


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_every_equation_of_every_template_holds_and_the_last_is_the_answer(name: str) -> None:
    problems = [problem for problem in BOTH_HANDS if problem.key[0] == name]
    assert len(problems) == 20
    for problem in problems:
        for line in problem.cot.splitlines():
            expression, result = EQUATION.fullmatch(line.split(": ", 1)[1]).groups()
            assert exact(expression) == int(result), line
        assert EQUATION.findall(problem.cot)[-1][1] == str(problem.answer)


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_solutions_use_every_given_number_and_else_only_implied_or_computed_ones(name: str) -> None:
    implied = {"2", "7", "12"}  # twice, half and both people of a pair; a week; a dozen
    for problem in (problem for problem in BOTH_HANDS if problem.key[0] == name):
        given = {str(number) for number in problem.key[1]}
        assert given == set(re.findall(r"\d+", problem.question))
        known, used = given | implied, set()
        for expression, result in EQUATION.findall(problem.cot):
            operands = set(re.findall(r"\d+", expression))
            assert operands <= known, problem
            used |= operands
            known.add(result)
        assert given <= used, problem


def hands_of(name: str, numbers: dict[str, int]) -> tuple[str, str]:
    """The one-line and the step-by-step solution of one instance."""
    drawn = [build(BY_NAME[name], numbers, random.Random(seed)) for seed in range(40)]
    problems = [problem for problem in drawn if problem is not None]
    one_line = next(problem for problem in problems if in_one_line(problem))
    return one_line.cot, next(problem for problem in problems if not in_one_line(problem)).cot


def test_the_two_hands_solve_the_same_instance_in_one_line_or_step_by_step() -> None:
    assert hands_of("share_after_loss", {"a": 54, "b": 14, "c": 4}) == (
        "Each friend: (54 - 14) / 4 = 10",
        "Rest: 54 - 14 = 40\nEach friend: 40 / 4 = 10",
    )
    assert hands_of("change_from_bill", {"a": 4, "b": 9, "c": 50}) == (
        "Change: 50 - 4 * 9 = 14",
        "Cost: 4 * 9 = 36\nChange: 50 - 36 = 14",
    )
    assert hands_of("saving_for_bike", {"a": 90, "b": 10, "c": 5, "d": 4}) == (
        "Needs: 90 - (10 + 5 * 4) = 60",
        "Earned: 5 * 4 = 20\nHas: 10 + 20 = 30\nNeeds: 90 - 30 = 60",
    )


@pytest.mark.parametrize(("parity", "low", "high"), [(0, 0.55, 0.75), (1, 0.2, 0.4)])
def test_each_hand_wrote_most_solutions_of_one_half_of_the_templates(
    parity: int, low: float, high: float
) -> None:
    half = {template.name for template in TEMPLATES[parity::2]}
    solutions = [in_one_line(problem) for problem in BOTH_HANDS if problem.key[0] in half]
    assert low < sum(solutions) / len(solutions) < high


@pytest.mark.parametrize(
    ("numbers", "why"),
    [
        ({"a": 54, "b": 14, "c": 3}, "40 is not divisible by 3"),
        ({"a": 20, "b": 18, "c": 2}, "each friend would get 1"),
        ({"a": 20, "b": 30, "c": 2}, "more lost than there were"),
    ],
)
def test_a_draw_without_whole_results_from_2_up_is_refused(numbers: dict[str, int], why: str) -> None:
    assert build(BY_NAME["share_after_loss"], numbers, random.Random(0)) is None, why


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**9), count=st.integers(1, 300))
def test_no_instance_occurs_twice_and_templates_are_used_evenly(seed: int, count: int) -> None:
    problems = make_problems(count, seed)
    assert len({problem.key for problem in problems}) == count
    uses = Counter(problem.key[0] for problem in problems)
    assert max(uses.values()) - min(uses.get(name, 0) for name in BY_NAME) <= 1


def instance_of(question: str) -> tuple[str, tuple[str, ...]]:
    """The instance of a written question, told from its text alone: its wording without names and words."""
    words = {word for choices in WORDS.values() for word in choices}
    kept = [
        word for word in re.findall(r"[A-Za-z]+", question) if word not in words and not word[0].isupper()
    ]
    shape = " ".join(word for word in kept if word not in {"he", "she", "his", "her", "him"})
    return shape, tuple(re.findall(r"\d+", question))


def test_train_and_test_files_share_no_instance_and_neither_do_parts_of_train(tmp_path: Path) -> None:
    write_problem_set(tmp_path, seed=3, train=4000, test=800)
    train = [instance_of(line["question"]) for line in lines_of(tmp_path / "train.jsonl")]
    test = [instance_of(line["question"]) for line in lines_of(tmp_path / "test.jsonl")]
    assert (len(train), len(test)) == (4000, 800)
    assert len({shape for shape, _ in train}) == len(TEMPLATES)
    assert len(set(train) | set(test)) == 4800


def test_files_are_gsm8k_lines_and_a_seed_decides_every_byte(tmp_path: Path) -> None:
    for folder, seed in (("a", 5), ("b", 5), ("c", 6)):
        write_problem_set(tmp_path / folder, seed=seed, train=300, test=100)
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert (tmp_path / "a" / name).read_bytes() != (tmp_path / "c" / name).read_bytes()
        for line in lines_of(tmp_path / "a" / name):
            assert line.keys() == {"question", "answer"}
            cot, answer = line["answer"].rsplit("\n#### ", 1)
            assert EQUATION.findall(cot)[-1][1] == answer


def test_texts_are_clean_english_sentences() -> None:
    for problem in BOTH_HANDS:
        assert not re.search(r"[{}]|\s\s|\b1 [a-z]+s\b|\bNone\b", problem.question + problem.cot), problem
        sentences = re.split(r"(?<=[.?]) ", problem.question)
        assert all(sentence[0].isupper() or sentence[0].isdigit() for sentence in sentences), problem
        assert problem.question.endswith("?")
        assert len(problem.question) < 260


def test_too_many_problems_are_refused_with_one_line_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(TemplateExhausted, match="ask for fewer problems"):
        make_problems(2_000_000, seed=0)


def test_the_command_exits_with_2_and_one_line_when_the_ranges_hold_too_few(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "out"), "--train", "2000000"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: template ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_command_runs_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "looper_trainer.demo.problems", str(tmp_path), "--seed", "4"]
    subprocess.run([*command, "--train", "50", "--test", "10"], check=True)
    assert len(lines_of(tmp_path / "train.jsonl")) == 50
    assert len(lines_of(tmp_path / "test.jsonl")) == 10

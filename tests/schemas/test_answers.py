"""The grader against hand-labelled cases, properties, adversarial input and real solutions."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from looper_schemas.answers import (
    MAX_ANSWER_CHARS,
    answers_match,
    extract_answer,
    normalise_answer,
    split_final_answer,
)

_spec = spec_from_file_location("grader_cases", Path(__file__).with_name("_cases.py"))
assert _spec is not None
assert _spec.loader is not None
_cases = module_from_spec(_spec)
_spec.loader.exec_module(_cases)
CASES = _cases.read_cases()
CASE_IDS = [f"{case.category}:{case.line}" for case in CASES]


def test_the_table_is_large_and_every_case_has_a_reason() -> None:
    assert len(CASES) >= 200
    assert all(case.reason for case in CASES)
    assert len({case.text for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_the_stated_answer_is_read(case: _cases.GraderCase) -> None:
    assert extract_answer(case.text) == case.answer, case.reason


@pytest.mark.parametrize("case", [case for case in CASES if case.answer], ids=str)
def test_the_stated_answer_matches_its_value_and_no_other(case: _cases.GraderCase) -> None:
    assert answers_match(case.text, case.answer)
    assert not answers_match(case.text, str(Fraction(case.answer) + 1))


@pytest.mark.parametrize("case", [case for case in CASES if case.trap], ids=str)
def test_the_trap_is_not_credited(case: _cases.GraderCase) -> None:
    assert normalise_answer(case.trap) is not None
    assert not answers_match(case.text, case.trap), case.reason


@pytest.mark.parametrize(
    ("gold", "value"),
    [("72", "72"), ("1,000", "1000"), ("-5", "-5"), ("$5.00", "5"), ("0.5", "1/2"), (" 72 ", "72"),
     ("72.0", "72"),
     ("-3,500", "-3500"), ("50%", "50"), ("7/2", "7/2"), ("She has 72.\n#### 72", "72")],
)  # fmt: skip
def test_gold_answers_are_read_like_predictions(gold: str, value: str) -> None:
    assert answers_match(f"Answer: #### {value}", gold)
    assert not answers_match("Answer: #### 123456", gold)


@pytest.mark.parametrize("gold", ["", "Paris", "5 or 6", "many"])
def test_a_gold_that_is_no_number_matches_nothing(gold: str) -> None:
    assert not answers_match("#### 5", gold)
    assert not answers_match("", gold)
    assert not answers_match(gold, gold)


# Splitting ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("48 + 24 = 72.\nAnswer: #### 72", "48 + 24 = 72.", "72"),
        ("48 + 24 = 72.\n#### 72", "48 + 24 = 72.", "72"),
        ("48 + 24 = 72.\nA: 72", "48 + 24 = 72.", "72"),
        ("48 + 24 = 72. The answer is 72.", "48 + 24 = 72.", "72"),
        ("48 + 24 = 72.\nThe answer is \\boxed{72}.\nAnswer: #### 72", "48 + 24 = 72.", "72"),
        ("First 48.\nTherefore, she has 72 clips.", "First 48.", "72"),
        ("<think>48 + 24</think>\nIt is 72 now.\n\\boxed{72}", "48 + 24\nIt is 72 now.", "72"),
        ("<think>48 + 24 = 72", "48 + 24 = 72", None),
        ("48 + 24 = 72", "48 + 24 = 72", "72"),
        ("First 48.\nSo she sold 48 + 24 = 72 clips.", "First 48.\nSo she sold 48 + 24 = 72 clips.", "72"),
        (
            "48 + 24 = 72.\n#### 72\nQuestion: What is 1 + 2?\n#### 3",
            "48 + 24 = 72.\n\nQuestion: What is 1 + 2?\n#### 3",
            "72",
        ),
        ("48 + 24 = 72\nAnswer: ####", "48 + 24 = 72", None),
        ("The answer is 5. No.\nAnswer: 6", "The answer is 5. No.", "6"),
        ("72", "", "72"),
        ("", "", None),
    ],
)
def test_split_takes_the_final_statement_off_the_reasoning(
    text: str, reasoning: str, answer: str | None
) -> None:
    assert split_final_answer(text) == (reasoning, answer)


@given(st.text(alphabet="ab 12.\n#:=$\\{}<>", max_size=80))
def test_split_and_extract_agree(text: str) -> None:
    for whole in (text, f"{text}\nAnswer: #### 7", f"<think>{text}</think>{text}", f"\\boxed{{{text}}}"):
        assert split_final_answer(whole)[1] == extract_answer(whole)


@given(st.text(alphabet="abc 123.+\n", max_size=60), st.integers(-(10**6), 10**6))
def test_split_keeps_the_rest_of_the_text(work: str, value: int) -> None:
    reasoning, answer = split_final_answer(f"{work}\nAnswer: #### {value}")
    assert answer == str(value)
    assert reasoning == work.strip()


# Properties -----------------------------------------------------------------------------------------------

WRAPPERS = [
    "{}", "#### {}", "Answer: {}", "Answer: #### {}", "A: {}", "The answer is {}.", "\\boxed{{{}}}",
    "**Answer:** {}", "Final answer: **{}**", "Answer: ${}$", "$\\boxed{{{}}}$", "<answer>{}</answer>",
    "#### {}.", "Answer: {} apples.", "We have 3 and 4.\n#### {}", "<think>#### 1</think>\nAnswer: {}",
    "Answer: x = {}", "Answer: {}\n\nHope it helps!", "Answer: $ {}", "Answer:\n{}",
]  # fmt: skip
WRAPPER = st.sampled_from(WRAPPERS)


@given(
    st.integers(-(10**40), 10**40), WRAPPER, st.sampled_from(["", ",", "{,}", "\u2009", "\u202f", "\\,", "_"])
)
def test_integers_survive_separators_signs_and_wrapping(value: int, wrapper: str, separator: str) -> None:
    written = f"{value:,}".replace(",", separator)
    assert extract_answer(wrapper.format(written)) == str(value)
    assert extract_answer(wrapper.format(written.replace("-", "−"))) == str(value)


@given(st.integers(-(10**9), 10**9), st.integers(0, 8), st.integers(0, 3), WRAPPER)
def test_decimals_are_exact(digits: int, places: int, zeros: int, wrapper: str) -> None:
    value = Fraction(digits, 10**places)
    whole, rest = divmod(abs(digits), 10**places)
    text = ("-" if digits < 0 else "") + str(whole)
    if places:
        text += f".{rest:0{places}d}" + "0" * zeros
    assert extract_answer(wrapper.format(text)) == str(value)


@given(st.fractions(min_value=-1000, max_value=1000, max_denominator=999), WRAPPER)
def test_fractions_are_reduced(value: Fraction, wrapper: str) -> None:
    assert extract_answer(wrapper.format(f"{2 * value.numerator}/{2 * value.denominator}")) == str(value)
    latex = f"\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"
    assert extract_answer(wrapper.format("-" * (value < 0) + latex)) == str(value)


@given(st.integers(1, 999), st.integers(1, 99), st.integers(2, 99), WRAPPER)
def test_mixed_numbers_are_sums(whole: int, above: int, below: int, wrapper: str) -> None:
    above = above % below or 1
    expected = str(whole + Fraction(above, below))
    assert extract_answer(wrapper.format(f"{whole} {above}/{below}")) == expected
    assert extract_answer(wrapper.format(f"{whole}\\frac{{{above}}}{{{below}}}")) == expected


@given(st.one_of(st.integers().map(str), st.fractions().map(str)), WRAPPER)
def test_extraction_is_idempotent(answer: str, wrapper: str) -> None:
    once = extract_answer(wrapper.format(answer))
    assert once is not None
    assert extract_answer(once) == once
    assert Fraction(once) == Fraction(answer)


PIECES = st.sampled_from([
    "####", "Answer:", "the answer is ", "\\boxed{", "}", "{", "<think>", "</think>", "\\frac", "$", "5",
    "1,000",
    "/", "-", "^", "10", " ", "\n", ".", "½", "e9", "A:", "×", "=", "(", ")", "and", "million", "seven",
    "\\text{",
    "#", "*", "<answer>", "or", "%", ":", "_",
])  # fmt: skip


@settings(max_examples=300)
@given(st.one_of(st.text(), st.lists(PIECES).map("".join)))
def test_no_text_raises_and_every_answer_is_normalised(text: str) -> None:
    answer = extract_answer(text)
    split_final_answer(text)
    if answer is not None:
        assert str(Fraction(answer)) == answer
        assert extract_answer(answer) == answer
        assert answers_match(text, answer)


@given(st.lists(PIECES, max_size=8).map("".join), st.integers(0, 10**6))
def test_a_last_statement_wins_over_anything_before_it(before: str, value: int) -> None:
    before = before.replace("<think>", "").replace("</think>", "")
    assert extract_answer(f"{before}\n#### {value}") == str(value)


# Size, time, threads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("digits", [639, 641, 4_299, 4_301, MAX_ANSWER_CHARS])
def test_huge_integers_are_exact_beyond_pythons_digit_limit(digits: int) -> None:
    number = "7" * digits
    assert extract_answer(f"#### {number}") == number
    assert not answers_match(f"#### {number}", number[:-1] + "8")


def test_huge_integers_do_not_depend_on_the_process_limit() -> None:
    code = (
        "import sys; sys.set_int_max_str_digits(640)\n"
        "from looper_schemas.answers import extract_answer\n"
        "number = '9' * 5000\n"
        "assert extract_answer('#### ' + number) == number\n"
        "assert extract_answer('#### 1/' + number) == '1/' + number\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    "number", ["7" * (MAX_ANSWER_CHARS + 1), "1e10001", "9^99999", "1/" + "7" * MAX_ANSWER_CHARS, "1e-10000"]
)
def test_a_number_too_long_for_the_wire_is_no_answer(number: str) -> None:
    assert extract_answer(f"#### {number}") is None


UNITS = [
    "#", "####", "\\boxed{", "}", "{", "Answer:", "the answer is ", "answer ", "<think>", "</think>",
    "9", "9,",
    "9.", "1 000 ", "1/", "$", "-", "*", "1 ", "\n", "A:\n", "A: 1\n", "(", ")", "<<", "\\frac{",
    "\\frac{1}{",
    "1e1", "^", "⁹", "~", "\\,", "1*", "1x", "1 and 1/", "one ", "one-", "=5", ". 5", "Therefore, 5. ",
    "#### 1 a\n", "\\", " ", "<answer>", "a'", "\t", "*_", "answer: *", "Answer: (a", "½", "１", ".",
    "e1", "1:",
    "|", ", ", "9(", "9(9", "9x", "half of 9 ", "9% of ",
]  # fmt: skip
# No measure of speed: anything that backtracks takes minutes for a megabyte, anything linear about a second.
HANG_S = 20.0
FRAMES = [("", ""), ("Answer: ", ""), ("\\boxed{", "}"), ("", "\n#### "), ("#### 5\n", "\nAnswer: 5")]


@pytest.mark.parametrize("unit", ["9,", "answer ", "#### 1 a\n", "\\boxed{", "\n", "=5", "<think>", "1 000 "])
def test_a_megabyte_in_one_statement_is_read_without_blowing_up(unit: str) -> None:
    text = "Answer: " + unit * (1_000_000 // len(unit))
    started = time.thread_time()
    extract_answer(text)
    assert time.thread_time() - started < HANG_S


@pytest.mark.slow
@pytest.mark.parametrize("frame", FRAMES, ids=str)
def test_a_megabyte_of_anything_is_read_without_blowing_up(frame: tuple[str, str]) -> None:
    for unit in UNITS:
        text = frame[0] + unit * (1_000_000 // len(unit)) + frame[1]
        started = time.thread_time()
        extract_answer(text)
        assert time.thread_time() - started < HANG_S, unit


@pytest.mark.slow
@pytest.mark.parametrize("unit", UNITS, ids=repr)
def test_time_grows_no_faster_than_the_text(unit: str) -> None:
    def seconds(size: int) -> float:
        text = "Answer: 1\n" + unit * (size // len(unit)) + "\n5"
        started = time.thread_time()
        split_final_answer(text)
        return time.thread_time() - started

    gc.disable()  # its pauses depend on everything else in this process
    try:
        small = min(seconds(100_000) for _ in range(3))
        large = min(seconds(800_000) for _ in range(3))
    finally:
        gc.enable()
    assert large < 24 * small + 0.1  # linear growth is 8 times, quadratic 64 times


def test_many_threads_get_the_answers_of_one() -> None:
    texts = [case.text for case in CASES] * 3
    assert threading.current_thread() is threading.main_thread()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(extract_answer, texts)) == [case.answer for case in CASES] * 3


# Real solutions -------------------------------------------------------------------------------------------


def test_labels_and_agreement_of_real_solutions_are_reproduced(data_folder: Path) -> None:
    lines = (data_folder / "model_solutions" / "half.jsonl").read_text(encoding="utf-8").splitlines()
    arms = 0
    for question in map(json.loads, lines):
        texts = ["" if arm["answer"] is None else arm["text"] for arm in question["arms"]]
        labels = [arm["correct"] for arm in question["arms"]]
        assert [answers_match(text, question["gold"]) for text in texts] == labels, question["qid"]
        answers = [extract_answer(text) for text in texts]
        assert answers == [arm["answer"] for arm in question["arms"]], question["qid"]
        arms += len(texts)
    assert arms == 2628


@pytest.mark.parametrize(("split", "count"), [("train", 7473), ("test", 1319)])
def test_every_gsm8k_solution_states_its_own_gold(data_folder: Path, split: str, count: int) -> None:
    lines = (data_folder / "gsm8k" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == count
    for line in lines:
        solution = json.loads(line)["answer"]
        work, gold = solution.split("\n#### ")
        assert extract_answer(solution) == gold.replace(",", "").strip()
        assert answers_match(solution, gold)
        if "answer" not in work:  # a few solutions say it twice
            assert split_final_answer(solution)[0] == work.strip()

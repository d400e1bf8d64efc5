"""The one prompt, byte for byte."""

from __future__ import annotations

from looper_schemas.answers import extract_answer, split_final_answer
from looper_schemas.prompt import PROMPT_TEMPLATE, format_prompt, format_target

ISSUE_PROMPT = (
    b"You are a careful math tutor. Solve the problem step by step, then give the final numeric answer.\n\n"
    b"Problem:\n{q}\n\nSolution:"
)


def test_the_template_has_the_agreed_bytes() -> None:
    assert PROMPT_TEMPLATE.encode() == ISSUE_PROMPT


def test_the_question_is_inserted_verbatim() -> None:
    for question in ("How many?", "{q} {0} {a} %s \\1", " \n½ ", ""):
        assert format_prompt(question).encode() == ISSUE_PROMPT.replace(b"{q}", question.encode())


def test_the_target_has_the_agreed_bytes() -> None:
    assert format_target("48 + 24 = 72", "72") == "48 + 24 = 72\nAnswer: #### 72"
    assert format_target("{a} {cot}", "{cot}") == "{a} {cot}\nAnswer: #### {cot}"


def test_the_grader_reads_the_target_and_its_reasoning() -> None:
    target = format_target("48 + 24 = 72", "1,072")
    assert extract_answer(target) == "1072"
    assert split_final_answer(target) == ("48 + 24 = 72", "1072")

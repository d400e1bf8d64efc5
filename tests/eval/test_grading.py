"""Each clause of each published rule, with its failures, and ours beside it."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from looper_eval.grading import GRADERS, lm_eval_flexible, lm_eval_strict, platinum_match, robust_match
from looper_schemas.answers import answers_match


def test_every_grader_has_its_name() -> None:
    assert set(GRADERS) == {
        "platinum", "robust", "lm_eval_strict", "lm_eval_cot_strict", "lm_eval_flexible",
    }  # fmt: skip
    assert GRADERS["platinum"] is platinum_match
    assert GRADERS["robust"] is robust_match


PLATINUM = [
    # text, the number the official rule reads (None: it cannot parse), why
    ("Answer: 72", "72", "after the label"),
    ("ANSWER: 72", "72", "the label in any case"),
    ("answer: 5\nAnswer: 72", "72", "the last label"),
    ("48 + 24\nAnswer: 72\nThanks for 3 questions!", "72", "the first number after it, not the last"),
    ("Answer: 10 - 3 = 7", "10", "the first number after it"),
    ("Answer: $70,000", "70000", "commas are deleted"),
    ("Answer: **72**", "72", "asterisks are deleted"),
    ("Answer: #### 72", "72", "hashes are deleted"),
    ("**Answer:** 72", "72", "asterisks inside the label"),
    ("Answer: 72.", "72", "a full stop is no part of it"),
    ("Answer: 72.00", "72", "final zeros are stripped"),
    ("Answer: 3.50", "3.5", "floats"),
    ("Answer: .5", ".5", "no leading zero"),
    ("Answer: -5", "-5", "a glued minus"),
    ("Answer: -$5", "5", "a minus before the dollar is lost"),
    ("Answer: - 5", "5", "a spaced minus is lost"),
    ("Answer: −5", "5", "a unicode minus is lost"),
    ("Answer: 1/2", "1", "fractions are not read"),
    ("Answer: 1.2.3", None, "no float"),
    ("Answer: none", None, "no number"),
    ("Answer: \\boxed{72}", "72", "a box after the label"),
    ("Answer: 5 so \\boxed{72}", "72", "a box after the label comes before its first number"),
    ("\\boxed{72} and \\boxed{5}", "72", "the first box"),
    ("answer: \\boxed{5}\nanswer: \\boxed{72}", "72", "the box after the last label"),
    ("**Answer**: 72\nfor 3 people", "72", "asterisks between label and colon"),
    ("\\boxed{\\text{72 clips}}", "72", "text in the box"),
    ("\\boxed{57{,}500} it is", "57", "a box with braces is not seen; last line instead, commas deleted"),
    ("\\boxed{72}\nanswer: 5", "5", "the label comes before the box"),
    ("48 + 24\nShe sold 72 of 80", "72", "the first number of the last line"),
    ("48 + 24\n72\n", "72", "line breaks at the end do not make a last line"),
    ("She has 5\nAnswer:72", "5", "a label without blank: the first number of everything"),
    ("<think>Answer: 5", "5", "thoughts count"),
    ("Answer:\n72", "72", "a label that ends its line"),
    ("Answer:\n10 to 72", "10", "the first number below such a label"),
    ("<think>\\boxed{5}</think>\nIt is 72.", "5", "a box in a thought counts"),
    ("<think>\\boxed{5}</think>\nAnswer: 72", "72", "unless a label follows"),
    ("<think>Answer: 5</think>\nAnswer: 72", "72", "the last label, after the thought"),
    ("\\boxed{1/2}", "1", "a fraction in a box"),
    ("\\boxed{-$5}", "5", "a minus before the dollar in a box"),
    ("Answer: 5%", "5", "percent signs are dropped"),
    ("Answer: 1e5", "1", "no exponents"),
    ("She has 5\n72 of 80\n\n", "72", "the last line before empty ones"),
    ("72\n ", None, "a last line of blanks"),
    ("", None, "nothing"),
    ("no numbers", None, "no number"),
    ("Answer: 7 ...", "7", "full stops after"),
    ("Answer: ...7", None, "full stops before are no float"),
]


@pytest.mark.parametrize(("text", "reads", "why"), PLATINUM)
def test_the_official_rule_reads(text: str, reads: str | None, why: str) -> None:
    for gold in ("72", "70000", "10", "3.5", ".5", "-5", "5", "1", "7", "57", "57500", "1.2"):
        assert platinum_match(text, gold) == (reads is not None and float(reads) == float(gold)), why


def test_the_official_rule_takes_gold_with_commas_and_from_a_solution() -> None:
    assert platinum_match("Answer: 385000", "385,000")
    assert platinum_match("Answer: 385,000", "40 * 9625\n#### 385,000")
    assert platinum_match("Answer: 5", "5.0")
    assert not platinum_match("Answer: 5", "five")


def test_the_official_rule_confuses_huge_integers_and_ours_does_not() -> None:
    assert platinum_match("Answer: 9007199254740993", "9007199254740992")
    assert not robust_match("Answer: 9007199254740993", "9007199254740992")


def test_the_official_rule_and_ours_differ_as_documented() -> None:
    for text, gold in [
        ("Answer: 10 - 3 = 7", "7"),
        ("Answer: -$5", "-5"),
        ("Answer: 1/2", "0.5"),
        ("\\boxed{57{,}500} it is", "57500"),
    ]:
        assert not platinum_match(text, gold)
        assert robust_match(text, gold)
    assert platinum_match("<think>Answer: 5", "5")
    assert not robust_match("<think>Answer: 5", "5")


@given(st.text(alphabet="-.0123456789 ,a\n$", max_size=30))
def test_the_linear_number_pattern_finds_what_the_published_one_finds(text: str) -> None:
    published = re.search(r"-?[0-9.]*[0-9]", text.replace(",", ""))
    for gold in ("1", "-1", "0", "0.5", "12"):
        expected = False
        if published:
            try:
                expected = float(re.sub(r"\.0+$", "", published[0])) == float(gold)
            except ValueError:
                expected = False
        assert platinum_match(f"Answer: {text}", gold) == expected


@pytest.mark.parametrize("unit", [".", "-", "9", "-.", "9.", "\\boxed{", "answer: ", "\n", ".0", "#", "$"])
def test_graders_are_linear_in_the_text(unit: str) -> None:
    text = "Answer: " + unit * (300_000 // len(unit))
    for name, grader in GRADERS.items():
        started = time.thread_time()
        grader(text, "5")
        assert time.thread_time() - started < 0.9, name


@given(st.text(max_size=60), st.text(max_size=8))
def test_no_text_raises(text: str, gold: str) -> None:
    for grader in GRADERS.values():
        assert grader(text, gold) in (True, False)


@given(st.text(alphabet="Answer: #5\\boxed{}=", max_size=30), st.sampled_from(["5", "55", "-5"]))
def test_robust_is_the_shared_grader(text: str, gold: str) -> None:
    assert robust_match(text, gold) == answers_match(text, gold)


@pytest.mark.parametrize(
    ("text", "gold", "strict", "flexible"),
    [
        ("so\n#### 72", "72", True, True),
        ("so\n#### 18.00", "18", False, False),
        ("so\n#### 18.", "18", True, True),
        ("so\n#### 1,000", "1000", True, True),
        ("so\n#### 1000", "48 * 2\n#### 1,000", True, True),
        ("so\n#### $18", "18", False, True),
        ("so\n####72", "72", False, True),
        ("#### 5\n#### 72", "72", False, True),
        ("#### 72\n#### 5", "72", True, False),
        ("Answer: 72", "72", False, True),
        ("Answer: $72.", "72", False, True),
        ("Answer: 72. I checked 2 times", "72", False, False),
        ("so\n#### -5", "-5", True, True),
        ("7", "7", False, True),
        ("no number", "7", False, False),
    ],
)
def test_lm_eval_rules(text: str, gold: str, strict: bool, flexible: bool) -> None:
    assert lm_eval_strict(text, gold) == strict
    assert lm_eval_flexible(text, gold) == flexible


def test_all_graders_accept_every_gsm8k_gold() -> None:
    beside_the_repository = Path(__file__).resolve().parents[3] / "shared" / "data"
    data_folder = Path(os.environ.get("LOOPER_DATA") or beside_the_repository)
    if not data_folder.is_dir():
        pytest.skip(f"no data in {data_folder}: set LOOPER_DATA")
    for line in (data_folder / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines():
        gold = json.loads(line)["answer"].split("#### ")[1]
        for name, grader in GRADERS.items():
            # A space after the label: what the prompt of the official rule asks for.
            text = "The answer is {}." if name == "lm_eval_cot_strict" else "Because.\nAnswer: #### {}"
            assert grader(text.format(gold), gold), (name, gold)

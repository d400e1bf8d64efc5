"""Our grader beside math-verify on the hand-labelled cases: at least as good in each category, same run."""

from __future__ import annotations

from collections import Counter
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from looper_schemas.answers import answers_match

math_verify = pytest.importorskip("math_verify", reason="math-verify is not installed")

_spec = spec_from_file_location("grader_cases", Path(__file__).with_name("_cases.py"))
assert _spec is not None
assert _spec.loader is not None
_cases = module_from_spec(_spec)
_spec.loader.exec_module(_cases)


def _math_verify_match(text: str, gold: str) -> bool:
    # Without its timeouts, which need signals; their limits are not what is compared here.
    predicted = math_verify.parse(text, parsing_timeout=None)
    expected = math_verify.parse(gold, parsing_timeout=None)
    return bool(math_verify.verify(expected, predicted, timeout_seconds=None))


@pytest.mark.filterwarnings("ignore")
def test_in_each_category_we_are_right_at_least_as_often_as_math_verify() -> None:
    """A verdict is right when the stated answer is credited, or when a trap is not."""
    ours: Counter[str] = Counter()
    theirs: Counter[str] = Counter()
    verdicts: Counter[str] = Counter()
    for case in _cases.read_cases():
        bomb = "999999999" in case.text  # math-verify would compute the power
        for gold, credit in ((case.answer, True), (case.trap, False)):
            if gold is None or bomb:
                continue
            verdicts[case.category] += 1
            ours[case.category] += answers_match(case.text, gold) == credit
            theirs[case.category] += _math_verify_match(case.text, gold) == credit
    for category, count in verdicts.items():
        print(f"{category:12} {count:4} verdicts  ours {ours[category]:4}  math-verify {theirs[category]:4}")
    print(f"{'all':12} {verdicts.total():4} verdicts  ours {ours.total():4}  math-verify {theirs.total():4}")
    assert verdicts.total() >= 200
    assert theirs.total() > verdicts.total() // 2, "math-verify did not run as it should"
    assert all(ours[category] >= theirs[category] for category in verdicts)

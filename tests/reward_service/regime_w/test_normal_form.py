"""NFKC against the standard library, which is right and, for runs of marks, slow."""

from __future__ import annotations

import sys
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from regime_w.normal_form import _MARKS, nfkc

TEXTS = st.text(
    st.sampled_from("aé½ﬁ²Åﷺ가 \u0301\u0316\u0344\u0f73\u1100\u1161") | st.characters(), max_size=60
)


@given(TEXTS)
def test_text_without_long_runs_of_marks_is_that_of_the_standard_library(text: str) -> None:
    runs = "".join("m" if char in _MARKS else " " for char in text).split()
    if all(len(run) <= 30 for run in runs):
        assert nfkc(text) == unicodedata.normalize("NFKC", text)


@given(st.integers(31, 5000), st.sampled_from(["\u0301", "\u0316\u0301", "\u0f73", "\u0344"]))
def test_a_long_run_of_marks_is_that_of_its_first_thirty(count: int, marks: str) -> None:
    run = (marks * count)[:count]
    assert nfkc(f"a{run}b{run}") == unicodedata.normalize("NFKC", f"a{run[:30]}b{run[:30]}")


def test_every_character_that_begins_with_a_mark_is_known() -> None:
    first = (unicodedata.normalize("NFKD", chr(code))[0] for code in range(sys.maxunicode + 1))
    found = "".join(chr(code) for code, char in enumerate(first) if unicodedata.combining(char))
    assert found == _MARKS

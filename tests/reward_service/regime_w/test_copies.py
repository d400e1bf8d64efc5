"""The copies rule against the definition, pair by pair."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regime_w.copies import copied_pairs, jaccard, word_grams

words = st.lists(st.sampled_from(["a", "b", "c", "d", "e", "f"]), max_size=30).map(" ".join)


def near_copies(text: str) -> st.SearchStrategy[str]:
    """`text` with one word more at its end, or changed in its letter case and punctuation."""
    return st.sampled_from([text, text.upper(), text.replace(" ", ", "), text + " z", text + " z y x w v"])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(words, max_size=6).flatmap(lambda texts: st.tuples(*map(near_copies, texts + texts))),
    st.sampled_from([0.3, 0.5, 0.9, 1.0]),
)
def test_the_prefix_filter_finds_exactly_the_similar_pairs(texts: tuple[str, ...], threshold: float) -> None:
    expected = {
        (i, j)
        for i, j in combinations(range(len(texts)), 2)
        if jaccard(word_grams(texts[i]), word_grams(texts[j])) >= threshold
    }
    assert copied_pairs(texts, threshold) == expected


def test_jaccard_by_hand() -> None:
    # abcdef has the grams abcde, bcdef; abcdeg has abcde, bcdeg: 1 shared of 3
    assert jaccard(word_grams("a b c d e f"), word_grams("a b c d e g")) == pytest.approx(1 / 3)


def test_a_sentence_added_to_a_long_text_leaves_it_a_copy() -> None:
    text = " ".join(f"step{i} yields {i} apples" for i in range(40))
    assert copied_pairs([text, text + " And so we are done."], 0.9) == {(0, 1)}


def test_case_punctuation_and_width_make_no_difference() -> None:
    assert copied_pairs(["Two plus two, is four!", "ｔｗｏ PLUS two is four"], 0.9) == {(0, 1)}


def test_texts_without_words_are_copies_of_nothing() -> None:
    assert copied_pairs(["", "", "...", "..."], 0.9) == frozenset()


def test_the_rule_can_be_switched_off() -> None:
    assert copied_pairs(["same words here"] * 2, None) == frozenset()

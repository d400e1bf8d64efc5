"""Does a training file hold questions of the evaluation set? Three looks, from certain to suspicious.

`exact`: the same words in the same order. `masked`: the same after every number is replaced, which finds
questions that were only renumbered. `ngram`: 13 words in a row are shared, the measure of the GPT-3 paper
(arXiv:2005.14165, appendix C). Case, punctuation and spaces never count.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from looper_eval.dataset import EvalQuestion

N = 13
_WORD = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+")


class Hit(NamedTuple):
    """A training question that matches an evaluation question, by the most certain of the three looks."""

    kind: Literal["exact", "masked", "ngram"]
    eval_id: str
    train_id: str
    shared: str


def find_contamination(train: Sequence[EvalQuestion], evaluation: Sequence[EvalQuestion]) -> list[Hit]:
    """Every pair of a training and an evaluation question that match, most certain first.

    A pair is listed once. Time is linear in the number of words, plus the number of hits.
    """
    exact: dict[tuple[str, ...], list[str]] = {}
    masked: dict[tuple[str, ...], list[str]] = {}
    ngrams: dict[tuple[str, ...], set[str]] = {}
    for item in evaluation:
        words = _words(item.question)
        exact.setdefault(words, []).append(item.id)
        masked.setdefault(_masked(words), []).append(item.id)
        for gram in _ngrams(words):
            ngrams.setdefault(gram, set()).add(item.id)
    hits: dict[tuple[str, str], Hit] = {}
    for item in train:
        words = _words(item.question)
        for eval_id in exact.get(words, ()):
            hits[eval_id, item.id] = Hit("exact", eval_id, item.id, " ".join(words))
        for eval_id in masked.get(_masked(words), ()):
            hits.setdefault((eval_id, item.id), Hit("masked", eval_id, item.id, " ".join(_masked(words))))
        for gram in _ngrams(words):
            for eval_id in sorted(ngrams.get(gram, ())):
                hits.setdefault((eval_id, item.id), Hit("ngram", eval_id, item.id, " ".join(gram)))
    order = {"exact": 0, "masked": 1, "ngram": 2}
    return sorted(hits.values(), key=lambda hit: order[hit.kind])


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.lower()))


def _masked(words: tuple[str, ...]) -> tuple[str, ...]:
    return tuple("0" if word[0].isdigit() else word for word in words)


def _ngrams(words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for start in range(len(words) - N + 1):
        yield words[start : start + N]

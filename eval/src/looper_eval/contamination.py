"""Does a training file hold questions of the evaluation set? Three looks, from certain to suspicious.

`exact`: the same words in the same order. `masked`: the same after every number is replaced, which finds
questions that were only renumbered. `ngram`: 13 words in a row are shared, the measure of the GPT-3 paper
(arXiv:2005.14165, appendix C). Case, punctuation and spaces never count.
"""

from __future__ import annotations

import re
from collections import Counter
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


def find_contamination(
    train: Sequence[EvalQuestion], evaluation: Sequence[EvalQuestion], most: int | None = None
) -> list[Hit]:
    """Every pair of a training and an evaluation question that match, most certain first.

    A pair is listed once. `most` bounds the `masked` and the `ngram` hits of one evaluation question: sets
    made from few templates match each other in millions of pairs. Time is linear in the number of words, plus
    the number of hits.
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
    counts: Counter[tuple[str, str]] = Counter()

    def add(kind: Literal["masked", "ngram"], eval_id: str, train_id: str, shared: tuple[str, ...]) -> None:
        if (eval_id, train_id) not in hits and (most is None or counts[kind, eval_id] < most):
            hits[eval_id, train_id] = Hit(kind, eval_id, train_id, " ".join(shared))
            counts[kind, eval_id] += 1

    for item in train:
        words = _words(item.question)
        for eval_id in exact.get(words, ()):
            hits[eval_id, item.id] = Hit("exact", eval_id, item.id, " ".join(words))
        for eval_id in masked.get(_masked(words), ()):
            add("masked", eval_id, item.id, _masked(words))
        for gram in _ngrams(words):
            found = ngrams.get(gram)
            for eval_id in sorted(found or ()):
                add("ngram", eval_id, item.id, gram)
            if found and most is not None:
                found -= {one for one in found if counts["ngram", one] >= most}
    order = {"exact": 0, "masked": 1, "ngram": 2}
    return sorted(hits.values(), key=lambda hit: order[hit.kind])


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.lower()))


def _masked(words: tuple[str, ...]) -> tuple[str, ...]:
    return tuple("0" if word[0].isdigit() else word for word in words)


def _ngrams(words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for start in range(len(words) - N + 1):
        yield words[start : start + N]

"""Which arms of a question are copies of each other: word 5-grams with Jaccard similarity >= a threshold.

Comparing all pairs costs n**2 set intersections. A prefix filter finds the same pairs with almost none:
with the 5-grams of each arm in one common order, two sets of Jaccard >= t share an element among the first
|A| - ceil(t |A|) + 1 of A and the same many of B (Chaudhuri, Ganti, Kaushik, ICDE 2006).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence

from regime_w.normal_form import nfkc

Pair = tuple[int, int]
Gram = tuple[str, ...]

GRAM_WORDS = 5
_WORD = re.compile(r"\w+")


def word_grams(text: str) -> frozenset[Gram]:
    """The 5-grams of the case-folded words of `text`; a shorter text is one gram, an empty one none."""
    words = _WORD.findall(nfkc(text).casefold())
    if not words:
        return frozenset()
    return frozenset(tuple(words[i : i + GRAM_WORDS]) for i in range(max(1, len(words) - GRAM_WORDS + 1)))


def jaccard(a: frozenset[Gram], b: frozenset[Gram]) -> float:
    """|a & b| / |a | b|, and 0 for two empty sets: texts without words are copies of nothing."""
    shared = len(a & b)
    union = len(a) + len(b) - shared
    return shared / union if union else 0.0


def copied_pairs(texts: Sequence[str], threshold: float | None) -> frozenset[Pair]:
    """Pairs i < j of texts whose similarity reaches `threshold`, 0 < threshold <= 1 (None: no pairs)."""
    if threshold is None or len(texts) < 2:
        return frozenset()
    grams = [word_grams(text) for text in texts]
    holders: dict[Gram, list[int]] = defaultdict(list)
    candidates: set[Pair] = set()
    for j, own in enumerate(grams):
        prefix = (
            len(own) - math.ceil(threshold * len(own) - 1e-9) + 1
        )  # one too many is safe, one too few is not
        for gram in sorted(own)[:prefix]:
            candidates.update((i, j) for i in holders[gram])
            holders[gram].append(j)
    return frozenset((i, j) for i, j in candidates if jaccard(grams[i], grams[j]) >= threshold)

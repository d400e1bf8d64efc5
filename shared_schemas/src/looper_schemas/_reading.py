"""Reads the number that a short piece of model output states: `**$57{,}500**`, `3\\frac12 hours`, `x = 7`.

`tidy` removes the typesetting, `parse` makes quantities of what is left, and `read` chooses among them. A
text that names rival quantities (`5 or 6`, `1 hour 30 minutes`), work left undone (`48 + 24`, `half of 10`)
or an irrational symbol states no single number.
"""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

from looper_schemas._quantities import ARTICLES, Item, parse
from looper_schemas._tidy import tidy

_CONNECTORS = {"and", "or", "to", "by", "plus", "x", "times", "versus", "vs"}
_PREPOSITIONS = {
    "per", "of", "in", "for", "every", "each", "from", "at", "after", "before", "over", "on", "with",
    "within", "than", "out", "as", "times", "more", "less", "during", "if",
}  # fmt: skip
_EXPLAINERS = {"because", "since", "which", "where", "given", "with", "as", "so", "assuming", "meaning"}
_HEDGES = {
    "approximately", "approx", "about", "around", "roughly", "exactly", "only", "just", "is", "be", "equals",
    "total", "a", "an", "of", "the", "it's", "its", "therefore", "thus", "so", "x", "y", "n",
}  # fmt: skip
_VERBS = {"is", "are", "was", "were", "be", "equals"}
_HAVING = {"has", "have", "gets", "get", "is", "are", "needs"}
_NUMBERS = {"quantity", "unreadable"}
_NAME = re.compile(r"-|(?:st|nd|rd|th)\b")  # after the number in 8th graders, 2-year-olds


class Reading(NamedTuple):
    """The number a text states: `led` by it, its `sole` number, `bare` but for a unit."""

    value: Fraction
    led: bool
    sole: bool
    bare: bool


def read(text: str) -> Reading | None:
    """The single number that `text` states, or None."""
    sentence, more = _first_sentence_with_number(parse(tidy(text)))
    if not sentence:
        return None
    sentence = _with_verbs_as_equality(_without_asides(sentence))
    if _assigns_several(sentence):
        return None
    for side in reversed(_sides(sentence)):
        chosen = _choose(side)
        if chosen is not None:
            numbers = sum(item.kind in _NUMBERS for item in sentence)
            words = sum(item.kind == "word" for item in sentence)
            led = sentence[0].kind == "quantity"
            return Reading(chosen, led, numbers == 1, led and numbers == 1 and words <= 4 and not more)
    return None


def _first_sentence_with_number(items: list[Item]) -> tuple[list[Item], bool]:
    """The first sentence that holds a number or symbol, and whether words or numbers follow it."""
    sentence: list[Item] = []
    for position, item in enumerate(items):
        if item.kind != "stop":
            sentence.append(item)
            continue
        if any(part.kind in {*_NUMBERS, "symbol"} for part in sentence):
            return sentence, any(rest.kind in ("quantity", "word") for rest in items[position:])
        sentence = []
    return sentence, False


def _without_asides(sentence: list[Item]) -> list[Item]:
    """`sentence` without parentheses and explanations that follow a number, and without dangling brackets.

    A parenthesis after an arithmetic sign is work: `2 * (3 + 4)`.
    """
    kept: list[Item] = []
    depth, aside, seen = 0, 0, False  # `aside`: the depth of the parenthesis that is left out
    for at, item in enumerate(sentence):
        if item.kind == "open":
            depth += 1
            if seen and not aside and kept[-1].kind != "operator":
                aside = depth
            continue
        if item.kind == "close":
            depth = max(depth - 1, 0)
            while kept and kept[-1].kind == "operator":
                kept.pop()  # Change (+/-): 5
            aside = aside if depth >= aside else 0
            continue
        if aside:
            continue
        if seen and item.kind == "word" and item.text in _EXPLAINERS and kept[-1].kind != "equals":
            rest = sentence[at + 1 :]
            if item.text != "so" or kept[0].kind == "quantity" or all(one.kind != "quantity" for one in rest):
                break
            kept, seen = [], False  # x + 5 = 12, so x = 7
            continue
        if item.text == ";" and seen and kept[-1].kind == "word":
            break  # 72 clips; 48 in April and 24 in May
        seen |= not depth and item.kind in _NUMBERS
        kept.append(item)
    return kept


def _with_verbs_as_equality(sentence: list[Item]) -> list[Item]:
    """`20% of 50 is 10` as `20% of 50 = 10`: the only verb, before the last of several numbers."""
    verbs = [at for at, item in enumerate(sentence) if item.text in _VERBS]
    numbers = [at for at, item in enumerate(sentence) if item.kind in _NUMBERS]
    if len(verbs) != 1 or len(numbers) < 2 or numbers[-1] < verbs[0] or numbers[-2] > verbs[0]:
        return sentence
    if any(item.text not in _HEDGES for item in sentence[verbs[0] + 1 : numbers[-1]]):
        return sentence
    return [*sentence[: verbs[0]], Item("equals", "="), *sentence[verbs[0] + 1 :]]


def _assigns_several(sentence: list[Item]) -> bool:
    """Whether different unknowns are given different values: `x = 7, y = 5`."""
    sides = _sides(sentence)
    last = [item.value for item in sides[-1] if item.kind == "quantity"]
    return any(
        len(side) > 2
        and side[0].kind == "quantity"
        and side[1].kind == "separator"
        and all(item.kind == "word" for item in side[2:])
        and [side[0].value] != last
        for side in sides[1:-1]
    )


def _sides(sentence: list[Item]) -> list[list[Item]]:
    """`sentence` cut at its equality signs."""
    sides: list[list[Item]] = [[]]
    for item in sentence:
        if item.kind == "equals":
            sides.append([])
        else:
            sides[-1].append(item)
    return sides


def _choose(side: list[Item]) -> Fraction | None:
    """The number that one side of an equation, or a whole sentence, states."""
    numbers = [at for at, item in enumerate(side) if item.kind in _NUMBERS]
    if not numbers or any(item.kind == "symbol" for item in side) or _is_expression(side):
        return None
    hedges = _HEDGES if len(numbers) == 1 else _HEDGES - {"the"}  # the 3 friends paid $15
    lead = next((at for at, item in enumerate(side) if item.kind != "word" or item.text not in hedges), 0)
    priced = [at for at in numbers if side[at].priced]
    main = [at for at in numbers if not _after_preposition(side, at)]
    if lead in numbers:
        chosen = lead
    elif len(main) == 1:
        chosen = main[0]
    elif (after_verb := _after_last_verb(side)) is not None:
        chosen = next((at for at in numbers if at > after_verb), numbers[-1])
    elif len(priced) == 1:
        chosen = priced[0]
    else:
        chosen = numbers[-1]
    value = side[chosen].value
    contested = any(
        chosen in (first, second)
        and side[first].value != side[second].value
        and (_are_rivals(side[first + 1 : second]) or _is_share(side, first, second))
        for first, second in pairwise(numbers)
    )
    return None if contested or side[chosen].operand else value


def _is_expression(side: list[Item]) -> bool:
    """Whether an arithmetic sign stands before a number, so that `side` is work rather than a result."""
    return any(first.kind == "operator" and second.kind in _NUMBERS for first, second in pairwise(side))


def _is_share(side: list[Item], first: int, second: int) -> bool:
    """Whether the number at `first` is a part of the one at `second`: `3/4 of 100`, `10% of 50`.

    Not so in `5 of 12`, `3/4 of 1 hour`, `25% of 8th graders` and `75% of 2-year-olds`.
    """
    words = [item.text for item in side[first + 1 : second]]
    value = side[first].value
    part = side[first].text == "%" or (value is not None and 0 < value < 1)
    named = side[second].value == 1 or any(_NAME.match(item.text) for item in side[second + 1 : second + 2])
    return not named and (words == ["percent", "of"] or (words == ["of"] and part))


def _after_preposition(side: list[Item], at: int) -> bool:
    """Whether the number at `at` hangs on a preposition: `for 30 pens`, `after the 20% discount`."""
    for item in reversed(side[max(0, at - 4) : at]):
        if item.kind != "word":
            return False
        if item.text in _PREPOSITIONS - {"times", "than", "out"}:
            return True
        if item.text not in ARTICLES and not item.text.endswith("ing"):  # after giving away 5
            return False
    return False


def _after_last_verb(side: list[Item]) -> int | None:
    verbs = [at for at, item in enumerate(side) if item.text in _VERBS]
    return verbs[-1] if verbs else None


def _are_rivals(between: list[Item]) -> bool:
    """Whether two numbers with `between` them compete: `5 or 6`, `5, 6`, `5 apples and 3`, `1 hour 30`."""
    if not between:
        return True
    if len(between) > 4:
        return False
    last = between[-1]
    if last.kind == "separator" or last.text in _CONNECTORS:
        return True
    if between[0].text in ("and", ",") and last.text in _HAVING:  # Tom has 5 and Ann has 6
        return True
    return len(between) == 1 and last.kind == "word" and last.text not in _PREPOSITIONS

"""Joins the tokens of tidied text into exact quantities: `-$5`, `3 1/2`, `1.5 x 10^6`, `5 million`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

from looper_schemas._numbers import decimal, power_of, scaled

_TOKEN = re.compile(
    r"""
    (?P<number> [0-9]+ (?:[.,:][0-9]+)* (?:[eE][+-]?[0-9]+(?![\w]))?
              | (?<![0-9])\.[0-9]+ (?:[eE][+-]?[0-9]+(?![\w]))? )
  | (?P<currency> [$€£¥₹¢]|(?:US|CA|AU|HK|Rs|RM|USD|EUR|GBP|INR)(?=\s?[$0-9]) )
  | (?P<percent> [%°] )
  | (?P<symbol> [π√∛∞∅±] )
  | (?P<word> [^\W\d_]+ (?:['’-][^\W\d_]+)* [0-9]* )
  | (?P<equals> [=≈→] )
  | (?P<operator> [-+×/÷^] )
  | (?P<open> [(\[（] ) | (?P<close> [)\]）] )
  | (?P<separator> [,;|&] )
  | (?P<stop> (?!!\ ?=)[.!?]+(?=\s|$) | \n )
  | (?P<other> \S )
    """,
    re.VERBOSE,
)
_MAGNITUDES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_PRICE_SUFFIXES = {"k": 3, "K": 3, "M": 6, "B": 9}
_MOST_WORDS = 16
_PARTS = {
    "half": 2,
    "halves": 2,
    "third": 3,
    "thirds": 3,
    "quarter": 4,
    "quarters": 4,
    "fourth": 4,
    "fourths": 4,
}
_PARTS |= {
    "fifth": 5,
    "fifths": 5,
    "sixth": 6,
    "sixths": 6,
    "eighth": 8,
    "eighths": 8,
    "tenth": 10,
    "tenths": 10,
}
_SIGN_WORDS = {"minus", "negative"}
_STARTS = {"number", "currency"}
_SMALL_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
_TENS_WORDS = "twenty thirty forty fifty sixty seventy eighty ninety"
NUMBER_WORDS = {word: value for value, word in enumerate(_SMALL_WORDS.split())}
NUMBER_WORDS |= {word: 10 * tens for tens, word in enumerate(_TENS_WORDS.split(), start=2)}
ARTICLES = {
    "the", "a", "an", "all", "these", "those", "his", "her", "their", "its", "only", "about", "first", "last",
    "away", "up", "off",
}  # fmt: skip
_OPERATION = re.compile(
    rf"""\b(?: sqrt\s?\(? | (?: twice | double | triple | (?:twice|half)\sas\s[a-z]+\sas
             | (?:root|{"|".join(_PARTS)})\sof ) (?:\s(?:{"|".join(ARTICLES)}))? ) \s?$""",
    re.VERBOSE | re.IGNORECASE,
)


class _Token(NamedTuple):
    kind: str
    text: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Item:
    """A token, or several joined into a `quantity` (value set) or an `unreadable` number such as 3:30.

    The text of a quantity is "%" for a percentage, else empty. An `operand` stands behind words that compute
    with it: `half of 10`, `twice 5`.
    """

    kind: str
    text: str = ""
    value: Fraction | None = None
    priced: bool = False
    operand: bool = False


def parse(text: str) -> list[Item]:
    """Joins signs, currencies, fractions, powers, percents and magnitudes into quantities."""
    tokens = [_Token(str(m.lastgroup), m[0], m.start(), m.end()) for m in _TOKEN.finditer(text)]
    items: list[Item] = []
    position = 0
    while position < len(tokens):
        token = tokens[position]
        if token.kind == "number" or _starts_signed(tokens, position, items):
            item, position = _quantity(tokens, position)
            items.append(replace(item, operand=_is_operand(text, token)))
            continue
        position += 1
        if token.text.lower() in _SIGN_WORDS and position < len(tokens) and tokens[position].kind in _STARTS:
            if items and items[-1].kind in ("quantity", "unreadable"):
                items.append(Item("operator", "-"))  # 10 minus 3: work left undone
                continue
            item, position = _quantity(tokens, position)
            items.append(item if item.value is None else replace(item, value=-item.value))
            continue
        if token.text == "^" and items and items[-1].kind == "word":  # the square in 72 m^2
            _, position = _exponent(tokens, position)
            continue
        if token.kind == "word":
            spelled = token.text.lower() in NUMBER_WORDS
            items.append(Item("word", token.text.lower(), operand=spelled and _is_operand(text, token)))
        elif token.kind not in ("currency", "percent", "other"):
            items.append(Item(token.kind, token.text))
    if not any(item.kind in ("quantity", "unreadable") for item in items):
        items = list(_spelled(items))
    return items


def _starts_signed(tokens: list[_Token], position: int, items: list[Item]) -> bool:
    """Whether a sign or currency at `position` begins a number, such as `-$5`, `$-5` or `- 5`."""
    if tokens[position].kind not in ("currency", "operator") or tokens[position].text in ("×", "/", "÷", "^"):
        return False
    signs, ahead = 0, position
    while ahead < len(tokens) and ahead - position < 4 and tokens[ahead].kind != "number":
        if tokens[ahead].kind == "operator" and tokens[ahead].text in "+-":
            signs += 1
        elif tokens[ahead].kind != "currency":
            return False
        ahead += 1
    if ahead == len(tokens) or tokens[ahead].kind != "number" or signs > 1:
        return False
    if not signs:
        return True
    if items and items[-1].kind in ("quantity", "unreadable", "close", "symbol"):
        return False  # a subtraction
    unknown = items and items[-1].kind == "word" and len(items[-1].text) == 1
    if unknown and _spaced(tokens, position) == _spaced(tokens, position + 1):
        return False  # x + 5, x-5
    glued = all(tokens[at].end == tokens[at + 1].start for at in range(position, ahead))
    return glued or not any(item.kind == "quantity" for item in items) or items[-1].kind in ("equals", "open")


def _is_operand(text: str, token: _Token) -> bool:
    """Whether words directly before `token` compute with it: `half of 10`, `twice 5`; not `Double: 5`."""
    return _OPERATION.search(text, max(0, token.start - 40), token.start) is not None


def _spaced(tokens: list[_Token], position: int) -> bool:
    """Whether a blank stands before the token at `position`."""
    return tokens[position - 1].end < tokens[position].start


def _quantity(tokens: list[_Token], position: int) -> tuple[Item, int]:
    """The quantity whose sign, currency or first digit is at `position`, and the position after it."""
    negative = priced = False
    while tokens[position].kind != "number":
        negative |= tokens[position].text == "-"
        priced |= tokens[position].kind == "currency"
        position += 1
    value = decimal(tokens[position].text)
    position += 1
    texts = [token.text for token in tokens[position : position + 4]]
    kinds = [token.kind for token in tokens[position : position + 4]]
    if texts[:1] == ["/"] and kinds[1:2] == ["number"]:  # 7/2
        value = _ratio(value, decimal(texts[1]))
        position += 2
    elif texts[:3] == ["and", "a", "half"]:  # 30 and a half
        value = None if value is None else value + Fraction(1, 2)
        position += 3
    elif texts[:1] == ["and"] and kinds[1:4:2] == ["number", "number"] and texts[2] == "/":  # 3 and 1/2
        value = _mixed(value, decimal(texts[1]), decimal(texts[3]))
        position += 4
    elif kinds[:1] == ["number"] and texts[1:2] == ["/"] and kinds[2:3] == ["number"]:  # 3 1/2
        value = _mixed(value, decimal(texts[0]), decimal(texts[2]))
        position += 3
    elif texts[:1] == ["^"]:
        exponent, position = _exponent(tokens, position + 1)
        value = None if value is None or exponent is None else power_of(value, exponent)
    elif texts[:1] in (["×"], ["x"], ["X"]) and texts[1:3] == ["10", "^"]:  # 1.5 x 10^6
        exponent, position = _exponent(tokens, position + 3)
        value = None if value is None or exponent is None else scaled(value, exponent)
    while position < len(tokens) and value is not None:
        zeros = _zeros(tokens, position, priced)
        if not zeros:
            break
        value *= 10**zeros
        position += 1
    if position < len(tokens) and tokens[position].text in ("¢", "€", "£", "$", "¥", "₹"):
        priced = True
    if value is None:
        return Item("unreadable"), position
    unit = "%" if position < len(tokens) and tokens[position].text == "%" else ""
    return Item("quantity", unit, -value if negative else value, priced), position


def _zeros(tokens: list[_Token], position: int, priced: bool) -> int:
    """How many zeros the word at `position` adds to the number before it: `5 million`, `$5k`, `100k`."""
    word, before = tokens[position], tokens[position - 1]
    last = position + 1 == len(tokens) or tokens[position + 1].kind == "stop"
    suffixed = priced or (last and before.kind == "number" and before.end == word.start)  # but a 5k race
    return _MAGNITUDES.get(word.text.lower(), _PRICE_SUFFIXES.get(word.text, 0) if suffixed else 0)


def _exponent(tokens: list[_Token], position: int) -> tuple[str | None, int]:
    sign = ""
    while position < len(tokens) and tokens[position].text in ("+", "-", "("):
        sign = tokens[position].text.strip("(") or sign
        position += 1
    if position == len(tokens) or not tokens[position].text.isdecimal():
        return None, position
    return sign + tokens[position].text, position + 1


def _ratio(above: Fraction | None, below: Fraction | None) -> Fraction | None:
    return above / below if above is not None and below else None


def _mixed(whole: Fraction | None, above: Fraction | None, below: Fraction | None) -> Fraction | None:
    part = _ratio(above, below)
    if whole is None or part is None or whole.denominator != 1 or part >= 1:
        return None
    return whole + part


def _spelled(items: list[Item]) -> Iterator[Item]:
    """`items` with number words (`two thousand five hundred`, `two and a half`) as quantities."""
    position = 0
    while position < len(items):
        value, after = _words_value(items, position)
        if value is None:
            yield items[position]
            position += 1
        else:
            yield Item("quantity", value=value, operand=items[position].operand)
            position = after


def _words_value(items: list[Item], position: int) -> tuple[Fraction | None, int]:
    """The number that words from `position` on spell, or None, and the position after it."""
    words = [item.text if item.kind == "word" else "" for item in items[position : position + _MOST_WORDS]]
    negative = words[0] in _SIGN_WORDS
    at = int(negative)
    total = group = Fraction(0)
    scaled_last = seen = False
    while at < len(words):
        word = words[at]
        small = _small(word)
        if small is not None and (group % 100 == 0 or (group % 10 == 0 and group % 100 >= 20 and small < 10)):
            group, scaled_last = group + small, False
        elif word == "hundred" and seen and group < 100:
            group, scaled_last = group * 100, True
        elif word in _MAGNITUDES and word != "hundred" and seen:
            total, group, scaled_last = total + group * 10 ** _MAGNITUDES[word], Fraction(0), True
        elif not (
            word == "and" and scaled_last and at + 1 < len(words) and _small(words[at + 1]) is not None
        ):
            break
        seen = True
        at += 1
    value, rest = total + group, words[at : at + 3]
    if seen and rest == ["and", "a", "half"]:
        value, at = value + Fraction(1, 2), at + 3
    elif seen and rest and rest[0] in _PARTS:
        value, at = value / _PARTS[rest[0]], at + 1
    elif not seen and rest[:1] in (["half"], ["a"]) and "half" in rest[:2]:
        value, at, seen = Fraction(1, 2), at + 1 + (rest[0] == "a"), True
    return (-value if negative else value) if seen else None, position + at


def _small(word: str) -> int | None:
    """The value of `seven`, `twenty` or `twenty-five`."""
    parts = word.split("-")
    if len(parts) > 2 or not all(part in NUMBER_WORDS for part in parts):
        return None
    return sum(NUMBER_WORDS[part] for part in parts)

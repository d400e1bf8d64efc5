"""Reads the number that a short piece of model output states: `**$57{,}500**`, `3\\frac{1}{2} hours`, `x = 7`.

`tidy` removes typesetting, `_lex` cuts the rest into tokens, `_parse` joins tokens into exact quantities and
`read` chooses among them. Every step is one pass over the text. A text that names rival quantities
(`5 or 6`, `1 hour 30 minutes`), an unevaluated sum or an irrational symbol states no single number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from looper_schemas._numbers import decimal, power_of, scaled

_VULGAR = {
    "½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5", "⅘": "4/5",
    "⅙": "1/6", "⅚": "5/6", "⅐": "1/7", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8", "⅑": "1/9", "⅒": "1/10",
}  # fmt: skip
_CHARACTERS = str.maketrans(
    {char: f" {plain} " for char, plain in _VULGAR.items()}
    | {"⁄": "/", "∕": "/", "·": "×", "⋅": "×", "∙": "×", "✕": "×", "•": " "}
    | {"≃": "≈", "≅": "≈", "⇒": "→", "⟹": "→", "➡": "→"}
    | dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad", "")
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_SUPERSCRIPT_RUN = re.compile("[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_ANNOTATION = re.compile(r"<<[^<>\n]*>>|</?[a-zA-Z]{1,12}>")  # GSM8K's calculator notes; HTML
_FRACTION = re.compile(r"\\[dtc]?frac\s{0,3}(?:\{([^{}]*)\}|([0-9]))\s{0,3}(?:\{([^{}]*)\}|([0-9]))")
_LATEX_OPERATORS = re.compile(r"\\(?:times|cdot|div|approx|to|rightarrow|Rightarrow|implies|le|ge|pm)(?![a-zA-Z])")
_OPERATOR_SIGNS = {"times": "×", "cdot": "×", "div": "/", "approx": "≈", "pm": "±", "le": "≈", "ge": "≈"}
_LATEX_SYMBOL = re.compile(r"\\(?:pi|sqrt|infty|emptyset|theta|log|ln|sin|cos|tan)(?![a-zA-Z])")
_LATEX_SPACE = re.compile(r"\\[,;: ]|~")
_LATEX_STYLE = re.compile(r"\\[a-zA-Z]+|\\[()\[\]!\\]")
_LATEX_ESCAPE = re.compile(r"\\([$%#&_{}])")
_MULTIPLIED = re.compile(r"(?<=[0-9)]) {0,3}\*{1} {0,3}(?=[0-9(])")
_THIN_GROUPS = re.compile("(?<=[0-9])[\u00a0\u2007\u2009\u202f'’_](?=[0-9]{3}(?![0-9]))")
_SPACE_GROUPS = re.compile(r"(?<![\w.,/^])[0-9]{1,3}(?: [0-9]{3})+(?![\w/])")

_TOKEN = re.compile(
    r"""
    (?P<number> [0-9]+ (?:[.,:][0-9]+)* (?:[eE][+-]?[0-9]+(?![\w]))?
              | (?<![0-9])\.[0-9]+ (?:[eE][+-]?[0-9]+(?![\w]))? )
  | (?P<currency> [$€£¥₹¢]|(?:US|CA|AU|HK|Rs|RM|USD|EUR|GBP|INR)(?=\s?[$0-9]) )
  | (?P<percent> [%°] )
  | (?P<symbol> [π√∞∅±] )
  | (?P<word> [^\W\d_]+ (?:['’-][^\W\d_]+)* [0-9]* )
  | (?P<equals> [=≈→] )
  | (?P<operator> [-+×/÷^] )
  | (?P<open> [(\[] ) | (?P<close> [)\]] )
  | (?P<separator> [,;|&] )
  | (?P<stop> [.!?]+(?=\s|$) | \n )
  | (?P<other> \S )
    """,
    re.VERBOSE,
)
_MAGNITUDES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_CONNECTORS = frozenset("and or to by plus x versus vs".split())
_PREPOSITIONS = frozenset(
    "per of in for every each from at after before over on with within than out as times more less during if".split()
)
_EXPLAINERS = frozenset("because since which where given with as so assuming meaning i.e".split())
_HEDGES = frozenset(
    "approximately about around roughly exactly only just is be equals total a an of the usd eur gbp rs approx "
    "it's its therefore thus so x y n".split()
)
_SMALL = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
_WORD_VALUES = {word: value for value, word in enumerate([*_SMALL.split(), "seventeen", "eighteen", "nineteen"])}
_WORD_VALUES |= {
    word: 10 * tens
    for tens, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), start=2)
}


class _Token(NamedTuple):
    kind: str
    text: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Item:
    """A token, or several joined into a `quantity` (value set) or into an `unreadable` number such as 3:30."""

    kind: str
    text: str = ""
    value: Fraction | None = None
    priced: bool = False


class Reading(NamedTuple):
    """The number a text states. `led`: it comes first; `sole`: no other number; `bare`: at most a unit beside it."""

    value: Fraction
    led: bool
    sole: bool
    bare: bool


def tidy(text: str) -> str:
    """`text` without LaTeX, markdown and HTML dress, with one form for each sign and separator."""
    text = _SUPERSCRIPT_RUN.sub(lambda run: "^" + run[0].translate(_SUPERSCRIPTS), text)
    text = _ANNOTATION.sub("", text.translate(_CHARACTERS))
    if "\\" in text or "~" in text:
        text = text.replace("{,}", ",")
        text = _FRACTION.sub(_inline_fraction, text)
        text = _LATEX_OPERATORS.sub(lambda found: _OPERATOR_SIGNS.get(found[0][1:], "→"), text)
        text = _LATEX_SYMBOL.sub("π", text)
        text = _LATEX_ESCAPE.sub(r"\1", text)
        text = _LATEX_SPACE.sub("\u2009", text)
        text = _LATEX_STYLE.sub("", text)
    text = text.replace("{", "").replace("}", "")
    text = _SPACE_GROUPS.sub(lambda run: run[0].replace(" ", ","), _THIN_GROUPS.sub(",", text))
    text = _MULTIPLIED.sub("×", text)
    return text.replace("*", "").replace("_", " ").replace("`", "")


def _inline_fraction(found: re.Match[str]) -> str:
    above, below = found[1] or found[2] or "", found[3] or found[4] or ""
    return f" {above.strip()}/{below.strip()} "


def read(text: str) -> Reading | None:
    """The single number that `text` states, or None."""
    sentence, more = _first_sentence_with_number(_parse(_lex(tidy(text))))
    if not sentence:
        return None
    sentence = _without_asides(sentence)
    for side in reversed(_sides(sentence)):
        chosen = _choose(side)
        if chosen is not None:
            numbers = sum(item.kind in ("quantity", "unreadable") for item in sentence)
            words = sum(item.kind == "word" for item in sentence)
            led = sentence[0].kind == "quantity"
            return Reading(chosen, led, numbers == 1, led and numbers == 1 and words <= 4 and not more)
    return None


def _lex(text: str) -> list[_Token]:
    return [_Token(str(m.lastgroup), m[0], m.start(), m.end()) for m in _TOKEN.finditer(text)]


def _parse(tokens: list[_Token]) -> list[_Item]:
    """Joins signs, currencies, fractions, powers, percents and magnitudes into quantities."""
    items: list[_Item] = []
    position = 0
    while position < len(tokens):
        token = tokens[position]
        if token.kind == "number" or _starts_signed(tokens, position, items):
            item, position = _quantity(tokens, position)
            items.append(item)
            continue
        position += 1
        if token.kind == "word":
            items.append(_Item("word", token.text.lower()))
        elif token.kind not in ("currency", "percent", "other"):
            items.append(_Item(token.kind, token.text))
    if not any(item.kind in ("quantity", "unreadable") for item in items):
        items = list(_spelled(items))
    return items


def _starts_signed(tokens: list[_Token], position: int, items: list[_Item]) -> bool:
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
    glued = all(tokens[at].end == tokens[at + 1].start for at in range(position, ahead))
    return glued or not any(item.kind == "quantity" for item in items) or items[-1].kind in ("equals", "open")


def _quantity(tokens: list[_Token], position: int) -> tuple[_Item, int]:
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
    if position < len(tokens) and tokens[position].text.lower() in _MAGNITUDES and value is not None:
        value *= 10 ** _MAGNITUDES[tokens[position].text.lower()]
        position += 1
    if position < len(tokens) and tokens[position].text in ("¢", "€", "£", "$", "¥", "₹"):
        priced = True
    if value is None:
        return _Item("unreadable"), position
    return _Item("quantity", value=-value if negative else value, priced=priced), position


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


def _spelled(items: list[_Item]) -> Iterator[_Item]:
    """`items` with number words (zero to ninety-nine, with magnitudes) as quantities."""
    value: Fraction | None = None
    for item in items:
        parts = item.text.split("-") if item.kind == "word" else []
        if parts and all(part in _WORD_VALUES for part in parts) and len(parts) <= 2:
            value = (value or Fraction(0)) + sum(_WORD_VALUES[part] for part in parts)
        elif value is not None and item.text in _MAGNITUDES:
            value *= 10 ** _MAGNITUDES[item.text]
        else:
            if value is not None:
                yield _Item("quantity", value=value)
                value = None
            yield item
    if value is not None:
        yield _Item("quantity", value=value)


def _first_sentence_with_number(items: list[_Item]) -> tuple[list[_Item], bool]:
    """The first sentence that holds a number or symbol, and whether words or numbers follow it."""
    sentence: list[_Item] = []
    for position, item in enumerate(items):
        if item.kind != "stop":
            sentence.append(item)
            continue
        if any(part.kind in ("quantity", "unreadable", "symbol") for part in sentence):
            return sentence, any(rest.kind in ("quantity", "word") for rest in items[position:])
        sentence = []
    return sentence, False


def _without_asides(sentence: list[_Item]) -> list[_Item]:
    """`sentence` without parentheses and explanations that follow a number, and without dangling brackets."""
    kept: list[_Item] = []
    depth, seen = 0, False
    for item in sentence:
        if item.kind == "open":
            depth += 1
            continue
        if item.kind == "close":
            depth = max(depth - 1, 0)
            continue
        if depth and seen:
            continue
        if seen and item.kind == "word" and item.text in _EXPLAINERS and kept[-1].kind != "equals":
            break
        seen |= not depth and item.kind in ("quantity", "unreadable")
        kept.append(item)
    return kept


def _sides(sentence: list[_Item]) -> list[list[_Item]]:
    """`sentence` cut at its equality signs."""
    sides: list[list[_Item]] = [[]]
    for item in sentence:
        if item.kind == "equals":
            sides.append([])
        else:
            sides[-1].append(item)
    return sides


def _choose(side: list[_Item]) -> Fraction | None:
    """The number that one side of an equation, or a whole sentence, states."""
    numbers = [at for at, item in enumerate(side) if item.kind in ("quantity", "unreadable")]
    if not numbers or any(item.kind == "symbol" for item in side) or _is_expression(side):
        return None
    lead = next((at for at, item in enumerate(side) if item.kind != "word" or item.text not in _HEDGES), 0)
    priced = [at for at in numbers if side[at].priced]
    if lead in numbers:
        chosen = lead
    elif (after_verb := _after_last_verb(side)) is not None:
        chosen = next((at for at in numbers if at > after_verb), numbers[-1])
    elif len(priced) == 1:
        chosen = priced[0]
    else:
        chosen = numbers[-1]
    value = side[chosen].value
    place = numbers.index(chosen)
    for first, second in zip(numbers[max(place - 1, 0) :], numbers[max(place - 1, 0) + 1 : place + 2], strict=False):
        if side[first].value != side[second].value and _are_rivals(side[first + 1 : second]):
            return None
    return value


def _is_expression(side: list[_Item]) -> bool:
    """Whether an arithmetic sign stands between two numbers, so that `side` is work rather than a result."""
    pending = seen = False
    for item in side:
        if item.kind in ("quantity", "unreadable"):
            if pending:
                return True
            seen = True
        pending = item.kind == "operator" and seen
    return False


def _after_last_verb(side: list[_Item]) -> int | None:
    verbs = [at for at, item in enumerate(side) if item.text in ("is", "are", "was", "were", "be", "equals")]
    return verbs[-1] if verbs else None


def _are_rivals(between: list[_Item]) -> bool:
    """Whether two numbers with `between` them compete: `5 or 6`, `5, 6`, `5 apples and 3`, `1 hour 30`."""
    if not between:
        return True
    if len(between) > 4:
        return False
    last = between[-1]
    if last.kind == "separator" or last.text in _CONNECTORS:
        return True
    return len(between) == 1 and last.kind == "word" and last.text not in _PREPOSITIONS

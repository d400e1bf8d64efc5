"""The intermediate results of a chain of reasoning: exact values of the equations written in it.

An equation is arithmetic with a stated result: `4*6=24`, `<<48/2=24>>`, `$3 x 4 = $12`, `1,200 ÷ 4 = 300`,
`\\frac{48}{2} = 24`, `20% of 50 = 10`, `7 fish + 17 fish = 24 fish`, `2 + 3 = 10/2 = 5`. Its values are those
of every side after the first `=`. `x = 5` and `5 = 5` calculate nothing and are no equations.

A calculator annotation stands for the equation it annotates: in `80,000*.5=$<<80000*.5=40000>>40,000` only
the part between the brackets is read. An equation that reads across words (units, mostly) counts only when
its sides agree to a rounding, since words may also change what the numbers mean (`5x + 3 = 18`).

The text is read once, from left to right, and every side of an equation is bounded in length and size, so
that time is linear in the text and hostile numbers cost nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

from regime_w.arithmetic import evaluate
from regime_w.arms import COUNTERFACTUAL_CLOSE, COUNTERFACTUAL_OPEN
from regime_w.normal_form import nfkc

MAX_CHARS = 100_000  # of a text, normalised; what stands beyond is not read
MAX_SIDE_TOKENS = 64  # a longer side is no equation
MAX_UNIT_WORDS = 4  # words that may follow a number within a side
ROUNDING = Fraction(1, 100)  # relative, for equations read across words

_NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_TOKEN = re.compile(
    rf"""(?P<number>{_NUMBER})
    |(?P<annotation><<|>>)
    |(?P<other>[<>!:=]=+>?|=>|->|<|>)     # comparisons and arrows end an equation; `==` is mended below
    |(?P<equals>[=≈])
    |(?P<power>(?<=[0-9)])\*\*(?=[0-9(]))
    |(?P<bold>\*\*)
    |(?P<times>x(?=[ ]?[$€£]?[0-9.(]))
    |(?P<per>/[ ]?(?=[^\W\d_]))
    |(?P<operator>[-+*/^()%])
    |(?P<of>of(?=[ ][$€£]?[0-9(]))
    |(?P<word>[^\W\d_]+)
    |(?P<currency>[$€£])
    |(?P<space>[ ])
    |(?P<stop>.|\n)""",
    re.VERBOSE | re.IGNORECASE,
)
_VULGAR = re.compile("[¼-¾⅐-⅞]")
_SUPERSCRIPTS = str.maketrans({"²": "^2", "³": "^3"})
_SPACES = re.compile(r"[^\S\n]+")
_NEWLINES = re.compile(r" ?\n[ \n]*")
_BULLETS = re.compile(r"^(?:[-+*•] )+", re.MULTILINE)
_SIMPLE_FRAC = re.compile(r"\\[dt]?frac ?\{([^{}\\]{1,80})\} ?\{([^{}\\]{1,80})\}")
_MIXED = re.compile(r"(?<![0-9.,/])([0-9]{1,6}) ([0-9]{1,4}) ?/ ?([0-9]{1,4})(?![0-9.,])")
_SIGNS = str.maketrans(
    {
        **dict.fromkeys("×∙·⋅∗✕✖⨯", "*"),
        **dict.fromkeys("÷∕⁄", "/"),
        **dict.fromkeys("−‐‑‒–—﹣－", "-"),
        **dict.fromkeys("≃≅≒", "≈"),
    }
)
_BRACKETS = str.maketrans("[]{}", "()()")
_LATEX = {
    r"\times": "*",
    r"\cdot": "*",
    r"\div": "/",
    r"\approx": "≈",
    r"\left": "",
    r"\right": "",
    r"\$": "$",
    r"\%": "%",
    r"\,": "",
    r"\;": " ",
    r"\(": "\n",
    r"\)": "\n",
    r"\[": "\n",
    r"\]": "\n",
    r"\\": "\n",
}
_LATEX_WRAPPER = re.compile(r"\\(?:text|mathrm|mbox|mathbf|textbf|boxed) ?\{([^{}]{0,80})\}")
_LATEX_COMMAND = re.compile(r"\\(?:[A-Za-z]+|[$%,;()\[\]\\])")


class Equation(NamedTuple):
    """The exact values of an equation's sides after the first, and whether all its sides are equal."""

    values: tuple[Fraction, ...]
    holds: bool


def intermediate_results(text: str, final: Fraction | None = None) -> frozenset[Fraction]:
    """Values of all equations of `text` outside counterfactual blocks, without the `final` answer."""
    values = {value for equation in equations(text) for value in equation.values}
    return frozenset(values - {final}) if final is not None else frozenset(values)


def equations(text: str) -> Iterator[Equation]:
    """Every equation of `text` outside counterfactual blocks, in order."""
    chain = _Chain()
    annotated = False
    for token in _tokens(_normalise(_outside_counterfactuals(text))):
        if token.kind == "annotation":
            # What precedes `<<` is the same equation without its result: forget it.
            finished = chain.finish() if annotated else None
            chain = _Chain()
            annotated = token.text == "<<"
        elif chain.accepts(token):
            continue
        else:
            finished = chain.finish()
            chain = _Chain()
            chain.accepts(token)  # it may begin the next one
        if finished is not None:
            yield finished
    finished = chain.finish()
    if finished is not None:
        yield finished


# --- text to tokens ------------------------------------------------------------------------------------


class _Token(NamedTuple):
    kind: str  # number, operator (`*` for every sign of multiplication), equals, word, per, stop, annotation
    text: str
    glued: bool  # nothing stands between this token and the one before it


def _outside_counterfactuals(text: str) -> str:
    """`text` without its counterfactual blocks; one that is never closed reaches to the end."""
    kept = []
    for i, part in enumerate(text.split(COUNTERFACTUAL_OPEN)):
        if i == 0:
            kept.append(part)
        else:
            kept.append(part.partition(COUNTERFACTUAL_CLOSE)[2])
    return "\n".join(kept)


def _normalise(text: str) -> str:
    # NFKC alone would read 2½ as 21/2 and 5² as 52.
    text = _VULGAR.sub(lambda m: " " + m.group(), text).translate(_SUPERSCRIPTS)
    text = nfkc(text).translate(_SIGNS)[:MAX_CHARS]
    if "\\" in text:
        text = _LATEX_WRAPPER.sub(r" \1 ", text.replace("{,}", ","))
        text = _SIMPLE_FRAC.sub(r"((\1)/(\2))", text)
        text = _LATEX_COMMAND.sub(lambda m: _LATEX.get(m.group(), " "), text)
    text = text.translate(_BRACKETS)
    text = _NEWLINES.sub("\n", _SPACES.sub(" ", text))
    text = text.replace("\n=", " =").replace("\n≈", " ≈").replace("==", "=")
    text = _BULLETS.sub("", text)
    return _MIXED.sub(_join_mixed, text)


def _join_mixed(match: re.Match[str]) -> str:
    whole, over, under = match.groups()
    return f"({whole}+{over}/{under})" if int(over) < int(under) else match.group()


def _tokens(text: str) -> Iterator[_Token]:
    glued = False
    matches = _TOKEN.finditer(text)
    for match in matches:
        kind, value = match.lastgroup or "stop", match.group()
        if kind == "space":
            glued = False
            continue
        if kind in {"currency", "bold"}:
            continue
        if kind == "times":
            kind, value = "operator", "*"
        if kind == "power":
            kind, value = "operator", "^"
        if kind == "other":
            kind = "stop"
        yield _Token(kind, value, glued)
        glued = True


# --- tokens to equations -------------------------------------------------------------------------------


@dataclass
class _Chain:
    """Sides joined by `=`, read token by token."""

    sides: list[list[str]] = field(default_factory=lambda: [[]])
    words: int = 0  # since the last number
    worded: bool = False
    void: bool = False  # too long

    def accepts(self, token: _Token) -> bool:
        """Take `token` in if the chain can go on with it."""
        side = self.sides[-1]
        after_value = bool(side) and (side[-1] in (")", "%") or side[-1][-1].isdigit())
        match token.kind:
            case "equals":
                if after_value:
                    self.sides.append([])
                    self.words = 0
                return after_value
            case "word" | "per":
                self.words += token.kind == "word"
                self.worded = True
                return after_value and self.words <= MAX_UNIT_WORDS
            case "of":  # 20% of 50
                symbols, fits = ["*"], after_value and not self.words
            case "number":
                symbols, fits = [token.text], not after_value
            case "operator" if token.text == "(":  # 3(4 + 5), but not 24 (3 + 4)
                symbols, fits = ["*", "("] if after_value else ["("], not after_value or token.glued
            case "operator" if token.text == "-":
                symbols, fits = ["-"], True
            case "operator":
                symbols, fits = [token.text], after_value
            case _:
                return False
        if fits:
            side += symbols
            self.words = 0
            self.void = self.void or len(side) > MAX_SIDE_TOKENS
        return fits

    def finish(self) -> Equation | None:
        """The equation read so far, if it is one."""
        if len(self.sides) < 2 or self.void:
            return None
        first, *rest = self.sides
        sides = [_after_unmatched(first), *(_before_unmatched(side) for side in rest)]
        if not any(token in _BINARY for side in sides for token in side[1:]):
            return None
        start = evaluate(sides[0])
        values = []
        for side in sides[1:]:
            value = evaluate(side)
            if value is None:
                break
            values.append(value)
        if start is None or not values:
            return None
        holds = all(abs(value - start) <= ROUNDING * max(abs(start), abs(value)) for value in values)
        if self.worded and not holds:
            return None
        return Equation(tuple(values), holds)


_BINARY = frozenset("+-*/^")


def _after_unmatched(side: Sequence[str]) -> Sequence[str]:
    """The part of a first side after its last parenthesis without a partner: `5 + (4 * 6` is `4 * 6`."""
    opened: list[int] = []
    last = -1
    for i, token in enumerate(side):
        if token == "(":
            opened.append(i)
        elif token == ")":
            if opened:
                opened.pop()
            else:
                last = i
    return side[max([last, *opened]) + 1 :]


def _before_unmatched(side: Sequence[str]) -> Sequence[str]:
    """The part of a later side before its first `)` without a partner, without a trailing operator."""
    depth = 0
    end = len(side)
    for i, token in enumerate(side):
        depth += (token == "(") - (token == ")")
        if depth < 0:
            end = i
            break
    while end and side[end - 1] in _BINARY | {"("}:
        end -= 1
    return side[:end]

"""Takes the typesetting off a short piece of model output: LaTeX, markdown, HTML, unicode signs, separators.

One pass of each pattern, each linear in the text.
"""

from __future__ import annotations

import re

from looper_schemas._quantities import NUMBER_WORDS

_VULGAR = {
    "½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5",
    "⅘": "4/5", "⅙": "1/6", "⅚": "5/6", "⅐": "1/7", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8",
    "⅑": "1/9", "⅒": "1/10",
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
_LATEX_OPERATOR = re.compile(r"\\(times|cdot|div|approx|pm|to|rightarrow|Rightarrow|implies)(?![a-zA-Z])")
_OPERATOR_SIGNS = {"times": "×", "cdot": "×", "div": "/", "approx": "≈", "pm": "±"}
_LATEX_DEGREES = re.compile(r"\^\s?\{?\\circ\}?")
_LATEX_SYMBOL = re.compile(
    r"\\(?:pi|sqrt|infty|emptyset|theta|log|ln|sin|cos|tan|[dt]?binom|lfloor|lceil)(?![a-zA-Z])"
)
_LATEX_SPACE = re.compile(r"\\[,;: ]|~")
_LATEX_STYLE = re.compile(r"\\[a-zA-Z]+|\\[()\[\]!\\]")
_LATEX_ESCAPE = re.compile(r"\\([$%#&_{}])")
_STRUCK = re.compile(r"~~[^~\n]{1,80}~~")
_POWER = re.compile(r"(?<=[0-9])\*\*(?=[0-9])")  # Python's; a bold number has no digit before it
_GLUED_TIMES = re.compile(r"(?<=[0-9])[xX](?=[0-9])")
_MULTIPLIED = re.compile(r"(?<=[0-9)])(?: {0,3}\* {0,3}(?=[0-9(])| [xX] (?=\())")
_APPLIED = re.compile(r"(?<=[^\W_])\((?=[-+($]{0,3}[0-9][-+×/^.,() 0-9]{0,40}\))")  # 2(3), sqrt(16)
_UNIT = r"(?!(?:sqrt|plus|minus|times|and|or|x)\b)[^\W\d_]+"
_STATED = re.compile(  # the end of 72 clips, 72元 and ten: a parenthesis glued to it is an aside
    rf"(?:[0-9%] {_UNIT}(?: {_UNIT})?|[0-9%][一-鿿]+|\b(?:{'|'.join(NUMBER_WORDS)})(?: {_UNIT}){{0,2}})$",
    re.IGNORECASE,
)
_LABEL = re.compile(  # (C) - 12; Total (miles) - 45; but (x) - 5
    r"^([^\d=(（]{0,80})[(（]?([A-Z]|[^\W\d_]{2}[^\d=()（）+×/^-]{0,80})[)）]\s?(?:-{1,3}\s|(?=-))"
)
_ARROW = re.compile("-{1,2}>")
_NOTED = re.compile(  # 72 clips - (48 in April and 24 in May); a sum without words is work
    rf"([0-9%](?: {_UNIT}){{1,3}}) - (?=\((?:(?![()+×/^-])[\W\d_]){{0,40}}[^\W\d_]{{2}}[^()+×/^-]{{0,80}}\))"
)
_THIN_GROUPS = re.compile("(?<=[0-9])[\u00a0\u2007\u2009\u202f'’_](?=[0-9]{3}(?![0-9]))")
_SPACE_GROUPS = re.compile(r"(?<![\w.,/^])[0-9]{1,3}(?: [0-9]{3})+(?![\w/-])")


def tidy(text: str) -> str:
    """`text` without LaTeX, markdown and HTML dress, with one form for each sign and separator."""
    text = _SUPERSCRIPT_RUN.sub(lambda run: "^" + run[0].translate(_SUPERSCRIPTS), text)
    text = _ANNOTATION.sub("", text.translate(_CHARACTERS))
    if "\\" in text or "~" in text:
        text = _STRUCK.sub(" ", text)
        text = text.replace("{,}", ",")
        text = _FRACTION.sub(_inline_fraction, text)
        text = _LATEX_OPERATOR.sub(lambda found: _OPERATOR_SIGNS.get(found[1], "→"), text)
        text = _LATEX_DEGREES.sub("°", text)
        text = _LATEX_SYMBOL.sub("π", text)
        text = _LATEX_ESCAPE.sub(r"\1", text)
        text = _LATEX_SPACE.sub("\u2009", text)
        text = _LATEX_STYLE.sub("", text)
    text = text.replace("{", "").replace("}", "")
    text = _SPACE_GROUPS.sub(lambda run: run[0].replace(" ", ","), _THIN_GROUPS.sub(",", text))
    text = _GLUED_TIMES.sub(" x ", _MULTIPLIED.sub("×", _POWER.sub("^", text)))
    text = _APPLIED.sub(_opened, text).replace("*", "").replace("_", " ").replace("`", "")
    return _NOTED.sub(r"\1 ", _LABEL.sub(r"\1\2: ", _ARROW.sub("→", text)))


def _opened(found: re.Match[str]) -> str:
    stated = _STATED.search(found.string, max(0, found.start() - 40), found.start())
    return "(" if stated else "×("


def _inline_fraction(found: re.Match[str]) -> str:
    above, below = found[1] or found[2] or "", found[3] or found[4] or ""
    applied = found.string.startswith(("(", "\\left("), found.end())
    return f" {above.strip()}/{below.strip()}" + " " * (not applied)

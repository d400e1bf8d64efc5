"""The answer of a text that states none: its last line or sentence, when that concludes.

A number alone on the last line, a result after a colon or an equality sign that ends it ("Total: 72",
"48 + 24 = 72") and a finished last sentence that draws a conclusion are answers. A sentence concludes when
it says so ("So she has 5 left."), ends an equation ("She makes 9 * 2 = $18 a day."), stresses its number
("She makes **$18**."), or repeats the result of the work before it. Any other number may be quoted from the
question, and a sentence without its full stop may have been cut off within its number.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from looper_schemas._reading import Reading, read

_MOST_CHARS = 4_000  # of a last line, and of the work that is looked at before it
_DRESS = r"[ \t*_`\"'#>]"
_OPENING = re.compile(
    rf"""{_DRESS}{{0,9}}(?: so | therefore | thus | hence | altogether | finally | overall | consequently
    | in\ (?:total|all|conclusion|summary|the\ end|short) | as\ a\ result | to\ sum\ up | which\ means
    | (?:that|this|it)(?:['’]s|\ is)?\ (?:means|leaves|gives|makes|comes\ to|a\ total\ of)
    | (?:we|i|you)\ (?:get|find|conclude|end\ up) | (?:∴|\\therefore) )(?![a-zA-Z])""",
    re.IGNORECASE | re.VERBOSE,
)
_CLOSING = re.compile(
    r"\b(?:total|totals|result|solution|sum|final|altogether|overall|in all|left|remain|remains|remaining"
    r"|(?:the|an|our|my|final) answer)\b",
    re.IGNORECASE,
)
_DENIAL = re.compile(r"\b(?:not|cannot|never|if|unless)\b|n['’]t\b", re.IGNORECASE)
_CORRECTED = re.compile(
    r"\b(?:is|are|was)(?: not|n['’]t)\b[^.!?\n]{1,60}?(?:[,;]? but|[,;]? rather|[,;] it is|[,;] it['’]s)\b",
    re.IGNORECASE,
)
_BOLD = re.compile(r"\*\*([^*\n]{1,60})\*\*")
_GIVING = re.compile(
    r".*\b(?:gives?|gets?|yields?|leaves?|leaving|totals?|totalling|comes? to|amounts? to|results? in"
    r"|obtain)\b",
    re.IGNORECASE,
)
_QUOTING = re.compile(
    rf"{_DRESS}{{0,9}}(?:to (?:answer|solve|find)|we (?:know|are given|have to|need)|let|first|suppose|if"
    r"|given|since|because)\b",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?][*_`\"'’”)]{0,4}[ \t]+(?=\S)")
_RESULT = re.compile(rf"(?:^|.*[^=<>!])(?:=|:(?![0-9])){_DRESS}{{0,6}}(?=[^=]*$)")
_TAIL = " \t*_`\"'’”$)]}\\"
_STEP = re.compile(
    rf"{_DRESS}{{0,9}}(?:[-*•]|\d{{1,3}}[.)]|step\b|q\b|question\b|note\b|hint\b)", re.IGNORECASE
)
_LAST_EQUALITY = re.compile(r"=[^=\n]{1,80}$", re.MULTILINE)


class Conclusion(NamedTuple):
    """Where the conclusion stands in the text, and its number."""

    start: int
    end: int
    value: Fraction


def conclude(text: str, *, thought: bool) -> Conclusion | None:
    """The number that the end of `text` concludes with, or None.

    `thought`: `text` is what was said after a thought, so that one sentence with one number is the answer.
    """
    end = len(text.rstrip(" \t\n`"))  # a code fence is no line
    start = text.rfind("\n", 0, end) + 1
    line = text[start:end]
    if not line or len(line) > _MOST_CHARS:
        return None
    reading = read(line)
    if reading is not None and reading.bare and not _stray_words(line, alone=not text[:start].strip()):
        return Conclusion(start, end, reading.value)
    value = _result(line)
    if value is not None:
        return Conclusion(start, end, value)
    if line.rstrip(_TAIL)[-1:] not in (".", "!", "。"):
        return None
    ends = [found.end() for found in _SENTENCE_END.finditer(line)]
    first = ends[-1] if ends else 0
    value = _sentence(line[first:], text[:start] + line[:first])
    if value is None and thought and not first and not text[:start].strip():
        value = reading.value if reading is not None and reading.sole and not _DENIAL.search(line) else None
    return None if value is None else Conclusion(start + first, end, value)


def _stray_words(line: str, alone: bool) -> bool:
    """Whether a number with words on a last line may be the rest of a sentence that was cut off."""
    if alone or line.lstrip(" \t*_`$\\([{-+")[:1].isdigit():
        return False
    return re.search(r"[^\W\d_]{2,}", re.sub(r"\\[a-zA-Z]+", "", line)) is not None


def _result(line: str) -> Fraction | None:
    """The bare number after the last colon or equality sign of `line`: `Total: $64`, `48 + 24 = 72 clips`."""
    found = _RESULT.match(line)
    if found is None or (line[found.end() - 1 : found.end()] == ":" and _STEP.match(line)):
        return None
    body = line[found.end() :]
    reading = read(body)
    if reading is None or not reading.bare or not body.strip(_TAIL + "(["):
        return None
    whole = read(line[: found.end()] + body)
    agreed = whole is not None and whole.value == reading.value
    return reading.value if agreed or found[0].rstrip(_TAIL).endswith(":") else None


def _sentence(sentence: str, before: str) -> Fraction | None:
    """The number of a finished sentence that concludes, `before` being all that stands before it."""
    corrected = _CORRECTED.search(sentence)
    if corrected:
        reading = read(sentence[corrected.end() :])
        return reading.value if reading is not None and reading.sole else None
    bold = _BOLD.findall(sentence)
    if len(bold) == 1 and not _DENIAL.search(sentence):
        stressed = read(bold[0])
        if stressed is not None and stressed.bare:
            return stressed.value
    giving = _GIVING.match(sentence)
    if giving and not _DENIAL.search(sentence):
        given = read(sentence[giving.end() :])
        if given is not None and given.sole:
            return given.value
    reading = read(sentence)
    if reading is None or _QUOTING.match(sentence):
        return None
    if _OPENING.match(sentence):
        return None if _DENIAL.search(sentence) and not reading.sole else reading.value
    if _DENIAL.search(sentence):
        return None
    if "=" in sentence:
        return reading.value
    if _CLOSING.search(sentence) and reading.sole:
        return reading.value
    return reading.value if _worked_out(before, reading) else None


def _worked_out(before: str, reading: Reading) -> bool:
    """Whether the last equation of the work before a sentence has its number as the result."""
    equations = _LAST_EQUALITY.findall(before[-_MOST_CHARS:])
    if not equations:
        return False
    result = read(equations[-1])
    return result is not None and result.value == reading.value

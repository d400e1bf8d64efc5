"""The grader: which number a solution states as its final answer, and whether that number is the gold one.

A *statement* is `#### 5`, `Answer: 5`, `A: 5` at the start of a line, `\\boxed{5}`, `<answer>5</answer>` or
"the answer is 5". The last statement counts, also when it was cut off before its number: then there is no
answer. Without any statement, only a text or a last line that is a number, or a last sentence that concludes
("So she has 5 apples."), is an answer (see `_conclusion`); other numbers may be quoted from the question. A
model that goes on with another question after its answer has answered this one before.

Text inside `<think>` is never an answer, and an unterminated `<think>` means that none was given. What still
needs computing (`48 + 24`, `half of 10`) is no answer. Percent and currency signs are units: `50%` is 50. All
functions are pure, linear in the length of the text and safe in any thread.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

from looper_schemas._conclusion import conclude
from looper_schemas._numbers import MAX_ANSWER_CHARS, canonical
from looper_schemas._reading import read

__all__ = ["MAX_ANSWER_CHARS", "answers_match", "extract_answer", "normalise_answer", "split_final_answer"]

# One character for one character, so that positions in the folded text are positions in the original.
# Full-width parentheses stay: they are asides, never work.
_FOLD = str.maketrans(
    {
        0xFF01 + offset: chr(0x21 + offset) for offset in range(0x5E) if offset not in (7, 8)
    }  # full-width forms
    | {0x1D7CE + offset: str(offset % 10) for offset in range(50)}  # mathematical digits
    | {ord(dash): "-" for dash in "−–—‐‑‒―﹣"}
    | {0x3000: " ", 0x2028: "\n", 0x2029: "\n", 0x0D: "\n"}
)
_THINK_TAG = re.compile(r"<(/?)(?:think|thinking)>", re.IGNORECASE)
_DRESS = r"[ \t*_`\"'#>]"
_MARKER = re.compile(
    rf"""
    (?P<hash> \#{{4,}} )
  | (?P<box> \\f?box(?:ed)?(?![a-zA-Z]) )
  | (?P<tag> <(?:final_?)?answer> | <\|begin_of_box\|> )
  | (?P<label> (?: (?<![^\W_])(?: answers? | ans | final\ result ) \b | 答案 ) {_DRESS}{{0,9}}
               (?: [(（][^()（）\n]{{0,80}}[)）] {_DRESS}{{0,9}} )?
               (?: : | = | -> | => | → | -\s | 是 | 为 ) )
  | (?P<start> ^{_DRESS}{{0,9}} (?: final\ )? answer [ ]{{1,2}} (?= [-$]? [0-9]) )
  | (?P<heading> ^{_DRESS}{{0,9}} (?: final\ )? answer {_DRESS}{{0,9}} $ )
  | (?P<prose> (?: \banswers? | \b(?:the|my|our|final|correct|right) [ ] (?:[a-z]{{1,12}}[ ]){{0,2}} answers?
                   (?: , | [ ](?:to|for|in|of|here|then|thus|therefore|we)\b ) [^.:=?!\n]{{0,60}}? )
               [\s*_]{{1,4}} (?: (?: would | should | will | must ) \s )?
               (?: is | are | was | be | equals | becomes | comes\ to ) \b
               (?! n['’]t ) (?! {_DRESS}{{0,4}} not\b ) )
  | (?P<letter> ^{_DRESS}{{0,9}} (?-i:A) {_DRESS}{{0,4}} : )
    """,
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BULLET = re.compile(r"\s*[-*•+][ \t]+")
_HEADING_WORD = re.compile(
    rf"{_DRESS}{{0,9}}(?:step|part|case|method|approach|section|example|option|phase|question|problem|solution|stage)\b",
    re.IGNORECASE,
)
_NEXT_TURN = re.compile(
    r"^[ \t*_#>\[]{0,9}(?:question|q|problem|exercise|human|user|input|instruction)"
    r"[ \t]?\d{0,4}[*_\]]{0,2}[ \t]?:",
    re.IGNORECASE | re.MULTILINE,
)
_LINE_REST = re.compile(r"[^\w\n]{1,40}$", re.MULTILINE)
_SENTENCE_END = re.compile(r"[.!?](?=\s)")
# Reading costs microseconds a character, so one statement and all statements of a text have a budget. The
# longest answer fits into one statement with a separator after every third digit.
_STATEMENT_CHARS = 2 * MAX_ANSWER_CHARS
_TEXT_CHARS = 2 * _STATEMENT_CHARS


class _Statement(NamedTuple):
    """Where a statement stands, `start:end` with its marker and `body:end` without, and what it was read as.

    `value` is None for a statement that was cut off or names no number.
    """

    start: int
    body: int
    end: int
    value: Fraction | None


def extract_answer(text: str) -> str | None:
    """The final answer that `text` states, normalised, or None when it states none.

    Normalised means: an integer in plain digits (`-3`, `57500`), else a fraction in lowest terms (`7/2`), so
    that two answers are equal as numbers exactly when they are equal as strings. Extracting from a
    normalised answer gives it back.
    """
    found = _final_statement(_fold(text))
    return None if found is None or found.value is None else canonical(found.value)


def normalise_answer(answer: str) -> str | None:
    """The normalised form of a bare answer such as `$1,000` or `0.50`, or of a text that states one."""
    return extract_answer(answer)


def answers_match(prediction_text: str, gold: str) -> bool:
    """Whether `prediction_text` states exactly the number `gold` (`72`, `1,000`, `-5`, `$5.00`, `0.5`)."""
    predicted = extract_answer(prediction_text)
    return predicted is not None and predicted == extract_answer(gold)


def split_final_answer(text: str) -> tuple[str, str | None]:
    """`text` as (reasoning without its final-answer statement, normalised answer).

    Every statement of the counted answer outside `<think>` is removed, each with the sentence it stands in;
    thoughts stay in the reasoning, without their tags.
    """
    folded = _fold(text)
    final = _final_statement(folded)
    if final is None:
        return _THINK_TAG.sub("", text).strip(), None
    spans = [(final.start, final.end)] if final.end > final.start else []
    if final.value is not None:
        begin = _spoken_from(folded)
        limit = _end_of_turn(folded, begin) if begin is not None else len(folded)
        spans += [(s.start, s.end) for s in _statements(folded, begin, limit) if s.value == final.value]
    kept: list[str] = []
    position = 0
    for start, end in sorted(_whole_sentence(folded, span) for span in spans):
        kept.append(text[position : max(start, position)])
        position = max(end, position)
    kept.append(text[position:])
    reasoning = _THINK_TAG.sub("", "".join(kept)).strip()
    return reasoning, None if final.value is None else canonical(final.value)


def _fold(text: str) -> str:
    return text.translate(_FOLD)


def _spoken_from(text: str) -> int | None:
    """Where the text after all thoughts begins; None when a thought never ends."""
    start = 0
    for tag in _THINK_TAG.finditer(text):
        start = tag.end() if tag[1] else -1
    return None if start < 0 else start


def _final_statement(text: str) -> _Statement | None:
    begin = _spoken_from(text)
    if begin is None:
        return None
    limit = _end_of_turn(text, begin)
    found = next(_statements(text, begin, limit), None)
    if found is not None:
        return found
    conclusion = conclude(text[begin:limit], thought=begin > 0)
    if conclusion is None:
        return None
    start, end = begin + conclusion.start, begin + conclusion.end
    if "=" in text[start:end]:
        start = end  # an equation is work, and stays in the reasoning
    return _Statement(start, start, end, conclusion.value)


def _end_of_turn(text: str, begin: int) -> int:
    """Where a model that has answered goes on with another question; the end of the text if it does not.

    A heading before any answer repeats the question, or parts it: then the last answer counts as ever.
    """
    turn = _NEXT_TURN.search(text, begin)
    if turn is None:
        return len(text)
    answered = next(_statements(text, begin, turn.start()), None)
    return len(text) if answered is None or answered.value is None else turn.start()


def _statements(text: str, begin: int | None, limit: int) -> Iterator[_Statement]:
    """The statements in `text[begin:limit]`, last first. Each ends where the next one starts: linear overall.

    Stops when as much text as all statements may hold was read; what stands further back is not looked at.
    """
    markers = [] if begin is None else list(_MARKER.finditer(text, begin, limit))
    budget = _TEXT_CHARS
    whole = limit
    for marker in reversed(markers):
        budget -= min(limit - marker.start(), _STATEMENT_CHARS) + 100
        if budget < 0:
            return
        statement = _statement(text, marker, limit, whole)
        if statement is not None:
            yield statement
        limit = marker.start()


def _statement(text: str, marker: re.Match[str], limit: int, whole: int) -> _Statement | None:
    """The statement that `marker` makes, or None when it turns out to be a heading or mere talk.

    Its own text ends at `limit`, what is looked at of `text` at `whole`.
    """
    kind = str(marker.lastgroup)
    if kind == "box":
        body, end = _box(text, marker.end(), limit)
        reading = read(text[body:end][:_STATEMENT_CHARS]) if end < limit or text[body:end] else None
        return _Statement(marker.start(), body, min(end + 1, limit), reading.value if reading else None)
    body, end = _segment(text, marker.end(), limit)
    segment = text[body:end]
    if not segment.strip(" \t\n*_`\"'#>$:.\\[](){}（）"):
        if limit < whole:
            return None  # another statement follows at once: `Answer: #### 5`
        return _Statement(marker.start(), body, end, None)
    reading = read(segment[:_STATEMENT_CHARS])
    followed = limit < whole or bool(text[end:whole].strip())
    if reading is None:
        talk = kind in ("prose", "hash", "heading") or followed
        return None if talk else _Statement(marker.start(), body, end, None)
    if kind == "hash" and not reading.bare and (followed or _HEADING_WORD.match(segment)):
        return None
    if kind in ("label", "start", "heading", "letter") and followed and not reading.bare:
        final = (reading.led or reading.sole) and "=" not in text[end:limit]
        if not final:
            return None  # `Answer:` as the title of a worked solution
    return _Statement(marker.start(), body, end, reading.value)


def _segment(text: str, start: int, limit: int) -> tuple[int, int]:
    """The rest of the line after a marker, or the next line that holds a letter or digit."""
    position = start
    while position < limit:
        end = text.find("\n", position, limit)
        end = limit if end < 0 else end
        if any(char.isalnum() for char in text[position:end]):
            bullet = _BULLET.match(text, position, end) if position > start else None
            return (bullet.end() if bullet else position), end
        position = end + 1
    return limit, limit


def _box(text: str, start: int, limit: int) -> tuple[int, int]:
    """What stands in the braces after `\\boxed`; an empty range at `limit` when they never close."""
    while start < limit and text[start].isspace():
        start += 1
    if start < limit and text[start] != "{":
        end = start
        while end < limit and not text[end].isspace() and text[end] not in "$\\":
            end += 1
        return start, end
    depth = 0
    for brace in _BRACE.finditer(text, start, limit):
        if brace[0] == "{":
            depth += 1
        elif brace[0] == "}":
            depth -= 1
            if depth == 0:
                return start + 1, brace.start()
    return limit, limit


def _whole_sentence(text: str, span: tuple[int, int]) -> tuple[int, int]:
    """`span` widened to the start of its sentence and over the punctuation that ends its line."""
    start, end = span
    if rest := _LINE_REST.match(text, end):
        end = rest.end()
    line_start = text.rfind("\n", 0, start) + 1
    sentence_ends = [found.end() for found in _SENTENCE_END.finditer(text, line_start, start)]
    return (sentence_ends[-1] if sentence_ends else line_start), end

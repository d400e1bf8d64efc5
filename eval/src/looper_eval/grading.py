"""Four graders of one completion: the official GSM8K-Platinum rule, ours, and the two of lm-evaluation-harness.

The first and the last two reproduce published rules with their published failures, so that our figures can be
compared with other people's; `robust_match` is the one to believe. A completion without a readable answer is
wrong under each of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from looper_schemas.answers import answers_match

_BOXED = "\\boxed{"
_OFFICIAL_NUMBER = re.compile(r"-?[0-9.]*[0-9]")
_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_LM_EVAL_IGNORED = re.compile(r",|\$|(?s:.*)#### |\.$")

Grader = Callable[[str, str], bool]


def platinum_match(text: str, gold: str) -> bool:
    """GSM8K-Platinum's official rule, applied to prediction and gold alike.

    The answer is the text after the last `answer: ` (in any case), else the content of the first `\\boxed{}`,
    else the last line. `*`, `#` and `,` are deleted, the first match of `-?[0-9.]*[0-9]` is taken, a final `.0` is
    stripped, and the two are compared as floats. So `Answer: 10 - 3 = 7` reads 10, `-$5` reads 5, `1/2` reads 1
    and integers above 2**53 collide.
    """
    predicted, expected = _official_number(text), _official_number(gold)
    return predicted is not None and predicted == expected


def robust_match(text: str, gold: str) -> bool:
    """Our rule: the last stated answer, compared exactly (`looper_schemas.answers.answers_match`)."""
    return answers_match(text, gold)


def lm_eval_strict(text: str, gold: str) -> bool:
    """lm-evaluation-harness `strict-match` for gsm8k: the first `#### n`, compared as a string."""
    found = _STRICT.search(text)
    return found is not None and _lm_eval_form(found[1]) == _lm_eval_form(gold)


def lm_eval_flexible(text: str, gold: str) -> bool:
    """lm-evaluation-harness `flexible-extract` for gsm8k: the last thing that looks like a number, as a string."""
    found = None
    for found in _FLEXIBLE.finditer(text):
        pass
    return found is not None and _lm_eval_form(found[0].strip()) == _lm_eval_form(gold)


GRADERS: dict[str, Grader] = {
    "platinum": platinum_match,
    "robust": robust_match,
    "lm_eval_strict": lm_eval_strict,
    "lm_eval_flexible": lm_eval_flexible,
}


def _official_number(text: str) -> float | None:
    span = _official_span(text).replace("*", "").replace("#", "").replace(",", "")
    found = _OFFICIAL_NUMBER.search(span)
    if found is None:
        return None
    try:
        value = float(found[0].removesuffix(".0"))
    except ValueError:  # such as 1.2.3
        return None
    return value if math.isfinite(value) else None


def _official_span(text: str) -> str:
    at = text.lower().rfind("answer: ")
    if at >= 0:
        return text[at + len("answer: ") :]
    at = text.find(_BOXED)
    if at >= 0:
        return _braced(text, at + len(_BOXED))
    return text.strip().rsplit("\n", 1)[-1]


def _braced(text: str, start: int) -> str:
    """The text from `start` to the brace that closes the one before it."""
    depth = 1
    for at in range(start, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return text[start:at]
    return text[start:]


def _lm_eval_form(answer: str) -> str:
    return _LM_EVAL_IGNORED.sub("", answer).strip().lower()

"""Graders of one completion: GSM8K-Platinum's official rule, ours, and those of lm-evaluation-harness.

All but ours reproduce published rules with their published failures, so that our figures can be
compared with other people's; `robust_match` is the one to believe. A completion without a readable answer is
wrong under each of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from looper_schemas.answers import answers_match

# A box, or a \text in it, without braces and commands inside: `\boxed{57{,}500}` is not seen.
_OFFICIAL_BOX = re.compile(r"\\boxed\{(?:\\text\{)?([^\\{}]+)\}")
# Like `-?[0-9.]*[0-9]`, with full stops that follow: that pattern is quadratic in a run of full stops.
_OFFICIAL_NUMBER = re.compile(r"(?:-|(?<![0-9.]))\.*[0-9][0-9.]*")
_OFFICIAL_ZEROS = re.compile(r"\.0+$")
_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_COT_STRICT = re.compile(r"The answer is (-?[0-9.,]+).")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_DELETED = str.maketrans("", "", "*#")

Grader = Callable[[str, str], bool]


def platinum_match(text: str, gold: str) -> bool:
    """GSM8K-Platinum's official rule (MadryLab/platinum-benchmarks, `src/utils.py`, strategy "math").

    The answer is what follows the last `answer: ` in any case, or the first \\boxed{} in it; without an
    `answer:` the first \\boxed{} of the text; without either the last line. `*`, `#` and `,` are deleted, the
    first match of `-?[0-9.]*[0-9]` is taken, a final `.0` is stripped, and it is compared with the gold as a
    float. A text that this cannot parse is wrong. So `Answer: 10 - 3 = 7` reads 10, `-$5` reads 5, `1/2`
    reads 1, `Answer:7` reads the first number of the whole text, and integers above 2**53 collide.

    `gold` is a bare number; commas and the solution before a `####` are removed from it.
    """
    predicted = _official_number(text)
    try:
        return predicted is not None and predicted == float(_bare_gold(gold))
    except ValueError:
        return False


def robust_match(text: str, gold: str) -> bool:
    """Our rule: the last stated answer, compared exactly (`looper_schemas.answers.answers_match`)."""
    return answers_match(text, gold)


def lm_eval_strict(text: str, gold: str) -> bool:
    """lm-evaluation-harness `strict-match` for gsm8k: the first `#### n` as a string (18.00 is not 18)."""
    found = _STRICT.search(text)
    return found is not None and _lm_eval_form(found[1]) == _lm_eval_form(gold)


def lm_eval_cot_strict(text: str, gold: str) -> bool:
    """`strict-match` for gsm8k_cot: the first "The answer is n" with one more character, as a string.

    Where nothing follows the number, its own last character is that one: `The answer is 72` reads 7.
    """
    found = _COT_STRICT.search(text)
    return found is not None and _lm_eval_form(found[1]) == _lm_eval_form(gold)


def lm_eval_flexible(text: str, gold: str) -> bool:
    """lm-evaluation-harness `flexible-extract` for gsm8k: the last run of digits, as a string."""
    numbers = [found[0] for found in _FLEXIBLE.finditer(text)]
    return bool(numbers) and _lm_eval_form(numbers[-1]) == _lm_eval_form(gold)


GRADERS: dict[str, Grader] = {
    "platinum": platinum_match,
    "robust": robust_match,
    "lm_eval_strict": lm_eval_strict,
    "lm_eval_cot_strict": lm_eval_cot_strict,
    "lm_eval_flexible": lm_eval_flexible,
}


def _official_number(text: str) -> float | None:
    found = _OFFICIAL_NUMBER.search(_official_span(text))
    if found is None:
        return None
    try:
        return float(_OFFICIAL_ZEROS.sub("", found[0].rstrip(".")))
    except ValueError:  # such as 1.2.3
        return None


def _official_span(text: str) -> str:
    labelled = "answer:" in text.lower().replace("*", "")
    searched = text.lower().rsplit("answer: ", 1)[-1] if labelled else text
    boxed = _OFFICIAL_BOX.search(searched)
    if boxed:
        span = boxed[1]
    elif labelled:
        span = text
    else:
        span = text.strip("\n").rsplit("\n", 1)[-1]
    return span.translate(_DELETED).lower().rsplit("answer: ", 1)[-1].replace(",", "")


def _bare_gold(gold: str) -> str:
    return gold.rpartition("####")[2].replace(",", "").strip()


def _lm_eval_form(answer: str) -> str:
    """What lm-eval compares: no commas or dollars, nothing up to the last `#### `, no final full stop."""
    return answer.replace(",", "").replace("$", "").rpartition("#### ")[2].removesuffix(".").lower()

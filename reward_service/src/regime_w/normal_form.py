"""NFKC in linear time.

Normalising sorts each run of combining marks by class, in quadratic time, and holds the interpreter's lock
meanwhile: one long text of marks would stop the whole process. Unicode's stream-safe format (UAX #15,
section 13) allows 30 marks in a row, more than any language has; what is beyond them is left out here.
"""

from __future__ import annotations

import re
import unicodedata

_MOST_MARKS = 30
_LAST_MARK = 0x1FFFF  # no plane above has any


def _is_mark(char: str) -> bool:
    # Some characters that are no marks themselves are made of marks.
    return unicodedata.combining(unicodedata.normalize("NFKD", char)[0]) != 0


_MARKS = "".join(filter(_is_mark, map(chr, range(0x300, _LAST_MARK + 1))))
_LONG_RUN = re.compile(f"([{_MARKS}]{{{_MOST_MARKS}}})[{_MARKS}]+")


def nfkc(text: str) -> str:
    """`text` in NFKC, each run of combining marks cut to 30."""
    return unicodedata.normalize("NFKC", _LONG_RUN.sub(r"\1", text))

"""The two ways in which the service fails.

Exception
├── StartError    before serving: a person reads one line on stderr, exit code 2
└── ProblemError  while serving: a client reads one constant `application/problem+json` body

Neither carries anything that a caller sent.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

from starlette.responses import Response

from looper_schemas.problems import PROBLEM_CONTENT_TYPE, PROBLEMS, Problem, ProblemCode

_PLACE = "REQUEST-ID"  # request ids are hexadecimal digits


class StartError(Exception):
    """A command cannot do its work; the message is one line that says what to do."""


def denied(error: PermissionError) -> StartError:
    """What to say of a file that somebody else owns, which is no reason to restore or remove it."""
    return StartError(f"{error.filename}: {error.strerror}; run this as the user whose file it is")


class ProblemError(Exception):
    """A request ends with `code`. `retry_after_s` and `allow` become the headers of their names."""

    def __init__(
        self, code: ProblemCode, *, retry_after_s: float | None = None, allow: str | None = None
    ) -> None:
        super().__init__(code.value)
        self.code = code
        self.retry_after_s = retry_after_s
        self.allow = allow


class ProblemResponse(Response):
    """The reply for an error: the constant body and headers of its code, and the headers of this occasion."""

    def __init__(self, error: ProblemError, request_id: str) -> None:
        constant = _constant(error.code)
        self.background = None
        self.status_code = constant.status
        self.body = constant.before + request_id.encode() + constant.after
        self.raw_headers = [(b"content-length", b"%d" % len(self.body)), *constant.headers]
        if error.retry_after_s is not None:
            self.raw_headers.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_s))))
        if error.allow is not None:
            self.raw_headers.append((b"allow", error.allow.encode()))


class _Constant(NamedTuple):
    """What all replies of a code share. The body is given before and after the request id."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    before: bytes
    after: bytes


@cache
def _constant(code: ProblemCode) -> _Constant:
    """Made once a code: refusing has to be cheap."""
    before, after = Problem.of(code, _PLACE).model_dump_json().encode().split(_PLACE.encode())
    headers = [(b"content-type", PROBLEM_CONTENT_TYPE.encode())]
    if code is ProblemCode.UNAUTHENTICATED:
        headers.append((b"www-authenticate", b"Bearer"))
    return _Constant(PROBLEMS[code].status, tuple(headers), before, after)

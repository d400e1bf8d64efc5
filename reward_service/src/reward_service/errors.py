"""The two ways in which the service fails.

Exception
├── StartError    before serving: a person reads one line on stderr, exit code 2
└── ProblemError  while serving: a client reads one constant `application/problem+json` body

Neither carries anything that a caller sent.
"""

from __future__ import annotations

import math
from functools import cache

from starlette.responses import Response

from looper_schemas.problems import PROBLEM_CONTENT_TYPE, PROBLEMS, Problem, ProblemCode, ProblemKind

_PLACE = "REQUEST-ID"  # request ids are hexadecimal digits


class StartError(Exception):
    """A command cannot do its work; the message is one line that says what to do."""


class ProblemError(Exception):
    """A request ends with `code`. `retry_after_s` and `allow` become the headers of their names."""

    def __init__(
        self, code: ProblemCode, *, retry_after_s: float | None = None, allow: str | None = None
    ) -> None:
        super().__init__(code.value)
        self.code = code
        self.retry_after_s = retry_after_s
        self.allow = allow


def problem_response(error: ProblemError, request_id: str) -> Response:
    """The reply for `error`: the constant body of its code, and the headers that belong to it."""
    kind, before, after = _constant(error.code)
    headers = {}
    if error.code is ProblemCode.UNAUTHENTICATED:
        headers["www-authenticate"] = "Bearer"
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if error.allow is not None:
        headers["allow"] = error.allow
    return Response(
        before + request_id.encode() + after,
        status_code=kind.status,
        headers=headers,
        media_type=PROBLEM_CONTENT_TYPE,
    )


@cache
def _constant(code: ProblemCode) -> tuple[ProblemKind, bytes, bytes]:
    """A code's kind, and its body before and after the request id: refusing has to be cheap."""
    before, after = Problem.of(code, _PLACE).model_dump_json().encode().split(_PLACE.encode())
    return PROBLEMS[code], before, after

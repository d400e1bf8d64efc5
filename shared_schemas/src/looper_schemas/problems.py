"""Error bodies of the wire contract: `application/problem+json` after RFC 9457, from a closed set of codes.

A problem never repeats anything the caller sent. `retryable` tells a client whether the same request may
succeed later; every other decision belongs to the caller.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

PROBLEM_CONTENT_TYPE = "application/problem+json"
PROBLEM_TYPE_PREFIX = "urn:looper:problem:"


class ProblemCode(StrEnum):
    """Every error a service may report, for a whole request or for one question."""

    MALFORMED_REQUEST = "malformed_request"
    INVALID_REQUEST = "invalid_request"
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    REQUEST_TIMEOUT = "request_timeout"
    SCORER_MISMATCH = "scorer_mismatch"
    REQUEST_IN_FLIGHT = "request_in_flight"
    REQUEST_TOO_LARGE = "request_too_large"
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type"
    IDEMPOTENCY_MISMATCH = "idempotency_mismatch"
    RATE_LIMITED = "rate_limited"
    BUDGET_EXHAUSTED = "budget_exhausted"
    HEADERS_TOO_LARGE = "headers_too_large"
    INTERNAL = "internal"
    OVERLOADED = "overloaded"
    NOT_READY = "not_ready"
    SCORER_TIMEOUT = "scorer_timeout"
    SCORER_FAILED = "scorer_failed"
    GENERATOR_FAILED = "generator_failed"


class ProblemKind(NamedTuple):
    """HTTP status, fixed human title and retryability of a code."""

    status: int
    title: str
    retryable: bool


PROBLEMS: dict[ProblemCode, ProblemKind] = {
    ProblemCode.MALFORMED_REQUEST: ProblemKind(400, "The request is not well-formed JSON.", False),
    ProblemCode.INVALID_REQUEST: ProblemKind(422, "The request does not follow the contract.", False),
    ProblemCode.UNAUTHENTICATED: ProblemKind(401, "A valid API key is required.", False),
    ProblemCode.FORBIDDEN: ProblemKind(403, "The API key does not allow this.", False),
    ProblemCode.NOT_FOUND: ProblemKind(404, "There is nothing here.", False),
    ProblemCode.METHOD_NOT_ALLOWED: ProblemKind(405, "The method is not allowed here.", False),
    ProblemCode.REQUEST_TIMEOUT: ProblemKind(408, "The request took too long to arrive.", True),
    ProblemCode.SCORER_MISMATCH: ProblemKind(409, "The service runs another scorer than requested.", False),
    ProblemCode.REQUEST_IN_FLIGHT: ProblemKind(409, "The same request is still being answered.", True),
    ProblemCode.REQUEST_TOO_LARGE: ProblemKind(413, "The request exceeds the limits in /v1/info.", False),
    ProblemCode.UNSUPPORTED_MEDIA_TYPE: ProblemKind(415, "Send application/json.", False),
    ProblemCode.IDEMPOTENCY_MISMATCH: ProblemKind(422, "The idempotency key has another body.", False),
    ProblemCode.RATE_LIMITED: ProblemKind(429, "Too many requests; retry later.", True),
    ProblemCode.BUDGET_EXHAUSTED: ProblemKind(403, "The budget of this API key is used up.", False),
    ProblemCode.HEADERS_TOO_LARGE: ProblemKind(431, "The request headers are too large.", False),
    ProblemCode.INTERNAL: ProblemKind(500, "The service failed.", True),
    ProblemCode.OVERLOADED: ProblemKind(503, "The service is at capacity; retry later.", True),
    ProblemCode.NOT_READY: ProblemKind(503, "The service is not ready; retry later.", True),
    ProblemCode.SCORER_TIMEOUT: ProblemKind(504, "Scoring did not finish in time.", True),
    ProblemCode.SCORER_FAILED: ProblemKind(500, "Scoring failed.", True),
    ProblemCode.GENERATOR_FAILED: ProblemKind(502, "The generator failed.", True),
}


class Problem(BaseModel):
    """Body of every error reply."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    type: str
    title: str
    status: int
    request_id: str
    retryable: bool

    @classmethod
    def of(cls, code: ProblemCode, request_id: str) -> Problem:
        """The problem body of `code` for the request `request_id`."""
        kind = PROBLEMS[code]
        return cls(
            type=PROBLEM_TYPE_PREFIX + code.value,
            title=kind.title,
            status=kind.status,
            request_id=request_id,
            retryable=kind.retryable,
        )

    @property
    def code(self) -> ProblemCode | None:
        """The code named by `type`, or None when another server wrote this problem."""
        prefix, separator, name = self.type.rpartition(PROBLEM_TYPE_PREFIX)
        if prefix or not separator:
            return None
        try:
            return ProblemCode(name)
        except ValueError:
            return None

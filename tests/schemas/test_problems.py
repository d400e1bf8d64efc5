"""Error bodies: a closed set of codes, nothing of the caller's, and other servers' bodies do not break us."""

from __future__ import annotations

import http

import pytest
from pydantic import ValidationError

from looper_schemas.problems import PROBLEM_TYPE_PREFIX, PROBLEMS, Problem, ProblemCode


def test_every_code_has_a_kind_and_a_title_of_its_own() -> None:
    assert set(PROBLEMS) == set(ProblemCode)
    titles = [kind.title for kind in PROBLEMS.values()]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize("code", list(ProblemCode))
def test_a_problem_round_trips_and_names_its_code(code: ProblemCode) -> None:
    problem = Problem.of(code, "request-1")
    assert Problem.model_validate_json(problem.model_dump_json()) == problem
    assert problem.code is code
    assert problem.type == f"urn:looper:problem:{code.value}"
    assert set(problem.model_dump()) == {"type", "title", "status", "request_id", "retryable"}


@pytest.mark.parametrize("code", list(ProblemCode))
def test_statuses_are_http_errors(code: ProblemCode) -> None:
    assert http.HTTPStatus(PROBLEMS[code].status).value >= 400


@pytest.mark.parametrize(
    ("code", "status", "retryable"),
    [
        (ProblemCode.MALFORMED_REQUEST, 400, False),
        (ProblemCode.UNAUTHENTICATED, 401, False),
        (ProblemCode.FORBIDDEN, 403, False),
        (ProblemCode.REQUEST_TIMEOUT, 408, True),
        (ProblemCode.SCORER_MISMATCH, 409, False),
        (ProblemCode.REQUEST_IN_FLIGHT, 409, True),
        (ProblemCode.REQUEST_TOO_LARGE, 413, False),
        (ProblemCode.INVALID_REQUEST, 422, False),
        (ProblemCode.RATE_LIMITED, 429, True),
        (ProblemCode.INTERNAL, 500, True),
        (ProblemCode.OVERLOADED, 503, True),
        (ProblemCode.NOT_READY, 503, True),
        (ProblemCode.SCORER_TIMEOUT, 504, True),
    ],
)
def test_statuses_and_retryability_are_the_contracts(code: ProblemCode, status: int, retryable: bool) -> None:
    kind = PROBLEMS[code]
    assert (kind.status, kind.retryable) == (status, retryable)


@pytest.mark.parametrize(
    "type_uri",
    [
        "about:blank",
        "",
        PROBLEM_TYPE_PREFIX + "unheard_of",
        "internal",
        "x" + PROBLEM_TYPE_PREFIX + "internal",
    ],
)
def test_another_servers_problem_has_no_code(type_uri: str) -> None:
    problem = Problem(type=type_uri, title="t", status=500, request_id="r", retryable=False)
    assert problem.code is None


def test_a_problem_is_closed_and_strict() -> None:
    body = Problem.of(ProblemCode.INTERNAL, "r").model_dump()
    for bad in ({**body, "detail": "your key is 123"}, {**body, "status": "500"}, {**body, "retryable": 1}):
        with pytest.raises(ValidationError):
            Problem.model_validate(bad)

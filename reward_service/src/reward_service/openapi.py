"""The routes as an OpenAPI 3.1 document, for the owner's tests: no route serves it.

It states what a service with these settings takes and answers, as far as JSON Schema can say it. It cannot
say that ids of questions, and of arms within a question, are distinct.
"""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from looper_schemas.problems import PROBLEM_CONTENT_TYPE, PROBLEM_TYPE_PREFIX, PROBLEMS, Problem, ProblemCode
from looper_schemas.rollout import RolloutRequest, RolloutResponse
from looper_schemas.scoring import CONTRACT_VERSION, ScoreRequest, ScoreResponse, ServiceInfo
from reward_service.settings import Settings

_JSON = "application/json"
_REFS = "#/components/schemas/{model}"
_ANYWHERE = (
    ProblemCode.MALFORMED_REQUEST,
    ProblemCode.NOT_FOUND,
    ProblemCode.METHOD_NOT_ALLOWED,
    ProblemCode.REQUEST_TIMEOUT,
    ProblemCode.HEADERS_TOO_LARGE,
    ProblemCode.INTERNAL,
    ProblemCode.OVERLOADED,
)
_WITH_KEY = (*_ANYWHERE, ProblemCode.UNAUTHENTICATED)
_INFO = (*_WITH_KEY, ProblemCode.INVALID_REQUEST, ProblemCode.FORBIDDEN)
_WHEN_READY = (*_WITH_KEY, ProblemCode.NOT_READY)
_SCORING = (
    *_WHEN_READY,
    ProblemCode.INVALID_REQUEST,
    ProblemCode.FORBIDDEN,
    ProblemCode.SCORER_MISMATCH,
    ProblemCode.REQUEST_IN_FLIGHT,
    ProblemCode.REQUEST_TOO_LARGE,
    ProblemCode.UNSUPPORTED_MEDIA_TYPE,
    ProblemCode.IDEMPOTENCY_MISMATCH,
    ProblemCode.RATE_LIMITED,
    ProblemCode.BUDGET_EXHAUSTED,
)


def document(settings: Settings) -> dict[str, Any]:
    """The document of a service with `settings`; /v1/arms/rollout is there as far as a generator is."""
    arms = {} if settings.generator_url is None else {"/v1/arms/rollout": {"post": _post("Rollout")}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Reward service", "version": CONTRACT_VERSION},
        "security": [{"key": []}],
        "paths": {
            "/livez": {"get": {"security": [], "responses": _responses(_flag("live"), _ANYWHERE)}},
            "/readyz": {"get": {"responses": _responses(_flag("ready"), _WHEN_READY)}},
            "/v1/info": {
                "get": {
                    "parameters": [_header("X-Disclosure", _ref("Disclosure"))],
                    "responses": _responses(_ref("ServiceInfo"), _INFO),
                }
            },
            "/v1/score": {"post": _post("Score")},
            **arms,
        },
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": _schemas(settings),
        },
    }


def _post(name: str) -> dict[str, Any]:
    """A route that takes a `<name>Request` and answers a `<name>Response`."""
    return {
        "parameters": [
            _header("Idempotency-Key", {"type": "string", "pattern": "^[!-~]{1,200}$"}),
            _header("X-Deadline-Ms", {"type": "integer", "minimum": 1, "maximum": 10**9 - 1}),
        ],
        "requestBody": {"required": True, "content": {_JSON: {"schema": _ref(f"{name}Request")}}},
        "responses": _responses(_ref(f"{name}Response"), _SCORING),
    }


def _schemas(settings: Settings) -> dict[str, Any]:
    _, definitions = models_json_schema(
        [
            (ScoreRequest, "validation"),
            (ScoreResponse, "serialization"),
            (RolloutRequest, "validation"),
            (RolloutResponse, "serialization"),
            (ServiceInfo, "serialization"),
        ],
        ref_template=_REFS,
    )
    schemas: dict[str, Any] = definitions["$defs"]
    for name in ("ScoreRequest", "RolloutRequest"):
        schemas[name]["properties"]["questions"]["maxItems"] = settings.max_questions
    schemas["Question"]["properties"]["arms"]["maxItems"] = settings.max_arms
    for name in ("Question", "OpenQuestion"):
        schemas[name]["properties"]["question"]["maxLength"] = settings.max_text_chars
    for name in ("reasoning", "full_text"):
        for choice in schemas["Arm"]["properties"][name]["anyOf"]:
            if choice["type"] == "string":
                choice["maxLength"] = settings.max_text_chars
    schemas["Arm"]["anyOf"] = [
        {"required": [name], "properties": {name: {"type": "string"}}} for name in ("reasoning", "full_text")
    ]
    return schemas


def _responses(body: dict[str, Any], codes: tuple[ProblemCode, ...]) -> dict[str, Any]:
    replies: dict[str, Any] = {"200": {"description": "Done.", "content": {_JSON: {"schema": body}}}}
    for status in sorted({PROBLEMS[code].status for code in codes}):
        problems = [_problem(code) for code in codes if PROBLEMS[code].status == status]
        replies[str(status)] = {
            "description": " Or: ".join(
                PROBLEMS[code].title for code in codes if PROBLEMS[code].status == status
            ),
            "content": {PROBLEM_CONTENT_TYPE: {"schema": {"oneOf": problems}}},
        }
    return replies


def _problem(code: ProblemCode) -> dict[str, Any]:
    """The one body of `code`, whose request id alone varies."""
    constant = Problem.of(code, "").model_dump()
    properties = {name: {"const": value} for name, value in constant.items()}
    properties["type"] = {"const": PROBLEM_TYPE_PREFIX + code.value}
    return {
        "type": "object",
        "additionalProperties": False,
        "required": sorted(properties),
        "properties": {**properties, "request_id": {"type": "string", "pattern": "^[0-9a-f]{32}$"}},
    }


def _flag(name: str) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": [name],
        "properties": {name: {"const": True}},
    }


def _header(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "schema": schema}


def _ref(model: str) -> dict[str, str]:
    return {"$ref": _REFS.format(model=model)}

"""The guard: who gets in, and what an error may say."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import Any

import httpx
import pytest

from looper_schemas.problems import PROBLEMS
from reward_service import auth
from reward_service.auth import Scope
from reward_service.logs import SafeFormatter

pytestmark = pytest.mark.anyio

CANARY = "canary7141"
TITLES = {f"urn:looper:problem:{code.value}": kind for code, kind in PROBLEMS.items()}


def assert_constant_problem(reply: httpx.Response, *, retryable: bool | None = None) -> None:
    """`reply` is a problem of the closed set and carries nothing else."""
    body = reply.json()
    assert set(body) == {"type", "title", "status", "request_id", "retryable"}
    kind = TITLES[body["type"]]
    assert (body["title"], body["status"], body["retryable"]) == (kind.title, kind.status, kind.retryable)
    assert reply.status_code == body["status"]
    assert reply.headers["content-type"] == "application/problem+json"
    assert len(bytes.fromhex(body["request_id"])) == 16
    allowed = {"content-type", "content-length", "www-authenticate", "retry-after", "allow", "connection"}
    assert set(reply.headers) <= allowed
    if retryable is not None:
        assert body["retryable"] is retryable


def code_of(reply: httpx.Response) -> str:
    return str(reply.json()["type"]).removeprefix("urn:looper:problem:")


async def test_only_livez_opens_without_a_good_key(open_service: Any) -> None:
    now = time.time()
    async with open_service() as live:
        keys = {
            "none": None,
            "wrong": live.key[:-9] + "0" * 9,
            "unknown": "rw_" + "0" * 12 + "_" + "1" * 64 + "_00000000",
            "empty": "",
            "expired": live.new_key(Scope.SCORE_REWARD, expires=now - 1),
            "early": live.new_key(Scope.SCORE_REWARD, not_before=now + 60),
            "revoked": live.new_key(Scope.SCORE_REWARD),
        }
        auth.revoke_key(live.home, str(keys["revoked"]).split("_")[1])
        seen: set[str] = set()
        paths = {route.path for route in live.app.routes} | {"/", "/nowhere", "/docs", "/openapi.json"}
        assert {"/livez", "/readyz", "/v1/info", "/v1/score"} <= paths
        for path in sorted(paths):
            for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"):
                for key in keys.values():
                    headers = {} if key is None else {"authorization": f"Bearer {key}"}
                    reply = await live.client.request(method, path, headers=headers)
                    if path == "/livez":
                        assert reply.status_code == (200 if method == "GET" else 405)
                        continue
                    assert reply.status_code == 401, (method, path)
                    if method != "HEAD":
                        seen.add(json.dumps({**reply.json(), "request_id": "-"}))
                    assert reply.headers["www-authenticate"] == "Bearer"
        assert len(seen) == 1, "refusals differ"


async def test_a_good_key_opens_every_route(open_service: Any, message: Any) -> None:
    async with open_service() as live:
        headers = {"authorization": f"Bearer {live.key}"}
        for path in ("/livez", "/readyz", "/v1/info"):
            assert (await live.client.get(path, headers=headers)).status_code == 200
        assert (await live.score(message())).status_code == 200


@pytest.mark.parametrize(
    "value",
    ["Basic {key}", "{key}", "Bearer", "Bearer{key}", "Bearer {key} {key}", "Token {key}", "Bearer\t{key}"],
)
async def test_the_key_counts_only_as_a_bearer_token(open_service: Any, value: str) -> None:
    async with open_service() as live:
        reply = await live.client.get("/v1/info", headers={"authorization": value.format(key=live.key)})
        assert reply.status_code == 401


async def test_two_authorizations_are_none(open_service: Any) -> None:
    async with open_service() as live:
        header = ("authorization", f"Bearer {live.key}")
        assert (await live.client.get("/v1/info", headers=[header, header])).status_code == 401
        lower = {"authorization": f"bearer {live.key}"}
        assert (await live.client.get("/v1/info", headers=lower)).status_code == 200


@pytest.mark.parametrize("scopes", [[Scope.METRICS_READ], [Scope.ARMS_ROLLOUT, Scope.METRICS_READ]])
async def test_a_key_without_a_scoring_scope_cannot_score(
    open_service: Any, message: Any, scopes: Any
) -> None:
    async with open_service() as live:
        for disclosure in ("reward", "components"):
            reply = await live.score(message(disclosure=disclosure), key=live.new_key(*scopes))
            assert reply.status_code == 403
            assert code_of(reply) == "forbidden"
        assert live.engine.batches == []


async def test_unknown_paths_and_methods_are_problems_too(open_service: Any) -> None:
    async with open_service() as live:
        headers = {"authorization": f"Bearer {live.key}"}
        for path in ("/", "/docs", "/redoc", "/openapi.json", "/v1", "/v1/score/", "/livez/", "/v1/arms"):
            reply = await live.client.get(path, headers=headers)
            assert_constant_problem(reply, retryable=False)
            assert code_of(reply) == "not_found"
        reply = await live.client.get("/v1/score", headers=headers)
        assert_constant_problem(reply)
        assert (code_of(reply), reply.headers["allow"]) == ("method_not_allowed", "POST")


async def test_errors_and_logs_never_repeat_what_the_caller_sent(
    open_service: Any, message: Any, caplog: pytest.LogCaptureFixture
) -> None:
    canary_question = {
        "id": CANARY,
        "question": f"poison {CANARY}",
        "arms": [{"id": CANARY, "full_text": CANARY}],
    }
    async with open_service(max_body_bytes=4096) as live:
        caplog.set_level(logging.DEBUG)
        plain = {"authorization": f"Bearer {live.key}"}
        as_json = {"content-type": "application/json"}
        replies = [
            await live.client.get(f"/{CANARY}?{CANARY}={CANARY}", headers=plain),
            await live.client.get("/v1/info", headers={"authorization": f"Bearer {CANARY}"}),
            await live.client.request(CANARY.upper(), "/v1/info", headers=plain),
            await live.client.put(f"/v1/score?{CANARY}", headers={**plain, "x-any": CANARY}),
            await live.score(f'{{"{CANARY}": "{CANARY}", "{CANARY}": 1}}'.encode()),
            await live.score(f"{CANARY}".encode()),
            await live.score({CANARY: CANARY}),
            await live.score(message(**{CANARY: 1})),
            await live.score(message(purpose=CANARY)),
            await live.score(message(disclosure=CANARY)),
            await live.score(message(reward_mode=CANARY)),
            await live.score(message(contract=CANARY)),
            await live.score(message(step=CANARY)),
            await live.score(message(run_id=CANARY, step=-1)),
            await live.score(message(canary_question, canary_question)),
            await live.score(message(scorer_id=CANARY)),
            await live.score(CANARY.encode() * 1000),
            await live.score(message(), headers={"content-type": CANARY}),
            await live.score(message(), headers={"content-encoding": CANARY}),
            await live.score(message(), headers={"x-deadline-ms": CANARY}),
            await live.score(message(), headers={"idempotency-key": f"{CANARY} "}),
            await live.score(message(), headers={"idempotency-key": CANARY * 100}),
            await live.client.post("/v1/score", content=b"{}", headers={**plain, **as_json, CANARY: CANARY}),
        ]
        for reply in replies:
            if reply.status_code == 200:  # the blank after the canary is no part of the header's value
                assert "idempotency-key" in reply.request.headers
                continue
            assert_constant_problem(reply)
            assert CANARY not in reply.text.lower()
            assert CANARY not in str(reply.headers).lower()
        # A question that makes the engine raise an error with its text: the reply names ids, the log nothing.
        poisoned = await live.score(message(canary_question))
        assert poisoned.json()["results"][0]["error"] == {"code": "scorer_failed", "retryable": True}
    lines = [
        SafeFormatter().format(record) for record in caplog.records if not record.name.startswith("httpx")
    ]
    assert any("ValueError" in line for line in lines)
    assert all(CANARY not in line.lower() and "poison" not in line for line in lines)


async def test_an_error_of_our_own_is_a_constant_problem(open_service: Any, message: Any) -> None:
    async with open_service() as live:

        def broken(*_: object) -> None:
            raise RuntimeError(CANARY)

        object.__setattr__(live.app.state.service, "store", type("Broken", (), {"reply": broken})())
        reply = await live.score(message())
        assert_constant_problem(reply, retryable=True)
        assert code_of(reply) == "internal"


async def test_livez_answers_while_a_batch_is_being_scored(
    open_service: Any, message: Any, until: Any
) -> None:
    async with open_service() as live:
        live.engine.gate.clear()
        scoring = asyncio.create_task(live.score(message()))
        await until(lambda: bool(live.engine.batches))
        started = time.monotonic()
        for _ in range(20):
            assert (await live.client.get("/livez")).status_code == 200
        assert time.monotonic() - started < 2
        assert not scoring.done()
        live.engine.gate.set()
        assert (await scoring).status_code == 200


async def test_a_refused_body_is_drained_or_the_connection_closed(open_service: Any) -> None:
    async with open_service(max_body_bytes=1024) as live:

        async def chunks(count: int) -> Any:
            for _ in range(count):
                yield b"x" * 512

        short = await live.client.post("/v1/score", content=chunks(2))
        long = await live.client.post("/v1/score", content=chunks(20))
        assert (short.status_code, long.status_code) == (401, 401)
        assert "connection" not in short.headers
        assert long.headers["connection"] == "close"


async def test_websockets_are_not_accepted(open_service: Any) -> None:
    async with open_service() as live:
        sent: list[Any] = []

        async def send(event: Any) -> None:
            sent.append(event)

        async def receive() -> Any:
            return {"type": "websocket.connect"}

        scope = {
            "type": "websocket",
            "path": "/livez",
            "headers": [],
            "query_string": b"",
            "subprotocols": [],
        }
        await live.app(scope, receive, send)
        assert all(event["type"] != "websocket.accept" for event in sent)


async def test_telemetry_and_documents_are_off(open_service: Any) -> None:
    async with open_service() as live:
        assert live.app.openapi_url is None
        assert not live.app._native_telemetry.enabled()
        assert not any(
            live.app._telemetry[name]
            for name in ("tracing", "metrics", "logs", "operation_spans", "auto_configure")
        )

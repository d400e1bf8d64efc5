"""Every route of the application with every key that must not open it; every error that it can give."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx
import pytest

from looper_schemas.problems import PROBLEMS, Problem, ProblemCode
from reward_service import auth
from reward_service.app import OPEN_PATH
from reward_service.auth import Scope, checksum

pytestmark = pytest.mark.anyio

OF_QUESTIONS = {ProblemCode.SCORER_TIMEOUT, ProblemCode.SCORER_FAILED, ProblemCode.GENERATOR_FAILED}
BODIES = {
    json.dumps({**Problem.of(code, "-").model_dump()}, sort_keys=True) for code in PROBLEMS
}  # all that an error may say


def body_of(reply: httpx.Response) -> str:
    """The error without its request id; it must be one of the closed set, with headers of a closed set."""
    problem = reply.json()
    assert len(bytes.fromhex(problem["request_id"])) == 16
    body = json.dumps({**problem, "request_id": "-"}, sort_keys=True)
    assert body in BODIES
    assert reply.status_code == problem["status"]
    assert reply.headers["content-type"] == "application/problem+json"
    assert set(reply.headers) <= {
        "content-type", "content-length", "www-authenticate", "retry-after", "allow", "connection"
    }  # fmt: skip
    return body


def closed_keys(live: Any) -> dict[str, str | None]:
    """Keys that open nothing, by what is wrong with them."""
    now = time.time()
    key: str = live.key
    _, key_id, secret, _ = key.split("_")
    forged = f"rw_{key_id}_{secret[:-1]}{'0' if secret[-1] != '0' else '1'}"
    revoked = live.new_key(Scope.SCORE_COMPONENTS)
    auth.revoke_key(live.home, revoked.split("_")[1])
    return {
        "none": None,
        "empty": "",
        "unknown": f"rw_{'0' * 12}_{'1' * 64}_00000000",
        "forged with a good checksum": f"{forged}_{checksum(forged)}",
        "wrong checksum": key[:-8] + ("0" * 8 if key[-8:] != "0" * 8 else "1" * 8),
        "wrong prefix": "xx" + key[2:],
        "upper case": key.upper(),
        "one character short": key[:-1],
        "one character more": key + "0",
        "the id alone": key_id,
        "not yet": live.new_key(Scope.SCORE_COMPONENTS, not_before=now + 3600),
        "expired": live.new_key(Scope.SCORE_COMPONENTS, expires=now - 1),
        "revoked": revoked,
    }


async def test_no_route_opens_to_a_key_that_is_none(open_service: Any, message: Any) -> None:
    async with open_service() as live:
        refusals, tried = set(), 0
        for route in live.app.routes:
            for method in sorted(route.methods):
                for wrong, key in closed_keys(live).items():
                    headers = {} if key is None else {"authorization": f"Bearer {key}"}
                    reply = await live.client.request(
                        method, route.path, headers=headers, json=message() if method == "POST" else None
                    )
                    if route.path == OPEN_PATH:
                        assert reply.status_code == 200
                        continue
                    tried += 1
                    assert reply.status_code == 401, (method, route.path, wrong)
                    refusals.add((body_of(reply), reply.headers["content-length"], len(reply.headers)))
        assert tried >= 13 * 3
        assert len(refusals) == 1, "refusals differ"
        assert live.engine.batches == []


async def test_no_route_that_does_something_opens_to_a_key_of_another_scope(
    open_service: Any, message: Any
) -> None:
    async with open_service() as live:
        posts = [route.path for route in live.app.routes if "POST" in route.methods]
        assert "/v1/score" in posts
        keys = {path: live.new_key(Scope.METRICS_READ) for path in posts}
        for path, key in keys.items():
            for sent in (message(), message(disclosure="reward")):
                reply = await live.client.post(path, headers={"authorization": f"Bearer {key}"}, json=sent)
                assert json.loads(body_of(reply))["type"] == "urn:looper:problem:forbidden", path
        reply = await live.score(message(), key=live.new_key(Scope.ARMS_ROLLOUT))
        assert reply.status_code == 403
        assert live.engine.batches == []


async def test_every_error_that_a_request_can_end_with_is_one_of_the_closed_set(
    open_service: Any, message: Any, until: Any
) -> None:
    seen: set[str] = set()
    limits = {
        "max_body_bytes": 4096,
        "max_header_bytes": 2048,
        "max_waiting_arms": 4,
        "receive_deadline_s": 0.2,
    }
    async with open_service(**limits) as live:
        plain = {"authorization": f"Bearer {live.key}"}
        broke = live.new_key(Scope.SCORE_COMPONENTS, budget=1)
        rated = live.new_key(Scope.SCORE_COMPONENTS, rate=1)
        await live.score(message(), key=rated)

        async def never_ends() -> Any:
            yield b"{"
            await asyncio.sleep(5)

        replies = [
            await live.score(b"{"),
            await live.score(message(step=-1)),
            await live.client.get("/v1/info"),
            await live.score(message(), key=live.new_key(Scope.METRICS_READ)),
            await live.client.get("/nowhere", headers=plain),
            await live.client.get("/v1/score", headers=plain),
            await live.client.post(
                "/v1/score", headers={**plain, "content-type": "application/json"}, content=never_ends()
            ),
            await live.score(message(scorer_id="another")),
            await live.score(b"x" * 5000),
            await live.score(message(), headers={"content-type": "text/plain"}),
            await live.score(message(), key=broke),
            await live.score(message(), key=rated),
            await live.client.get("/v1/info", headers={**plain, "x": "y" * 3000}),
        ]
        name = {"idempotency-key": "k"}
        await live.score(message(), headers=name)
        replies.append(await live.score(message(step=9), headers=name))

        live.engine.gate.clear()
        first = asyncio.create_task(live.score(message(step=10), headers={"idempotency-key": "j"}))
        await until(lambda: live.app.state.service.admission.arms == 3)
        replies.append(await live.score(message(step=11)))
        again = {"idempotency-key": "j", "x-deadline-ms": "50"}
        replies.append(await live.score(message(step=10), headers=again))
        live.engine.gate.set()
        assert (await first).status_code == 200

        live.app.state.service.readiness.ready = False
        replies.append(await live.score(message()))
        live.app.state.service.readiness.ready = True
        object.__setattr__(live.app.state.service, "store", None)
        replies.append(await live.score(message()))
        seen = {body_of(reply) for reply in replies}
    told = {json.loads(body)["type"].rpartition(":")[2] for body in seen}
    assert told == {code.value for code in ProblemCode} - {code.value for code in OF_QUESTIONS}

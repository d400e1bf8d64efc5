"""`POST /v1/score` and `GET /v1/info`: the wire contract, seen from outside."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

from looper_schemas.scoring import FailedQuestion, ScoredQuestion, ScoreResponse, ServiceInfo
from reward_service.auth import Scope
from reward_service.endpoints import _json_of

pytestmark = pytest.mark.anyio


def code_of(reply: Any) -> str:
    return str(reply.json()["type"]).removeprefix("urn:looper:problem:")


def question(name: str, *texts: str, gold: str | None = "8", prompt: str = "3 + 5?") -> dict[str, Any]:
    arms = [{"id": f"{name}-{i}", "full_text": text} for i, text in enumerate(texts)]
    return {"id": name, "question": prompt, "gold_answer": gold, "arms": arms}


# --- a scored request ----------------------------------------------------------------------------------


async def test_a_reply_holds_what_the_engine_said_keyed_by_id(open_service: Any, message: Any) -> None:
    async with open_service() as live:
        sent = message(question("q1", "3 + 5 = 8\n#### 8", "5 + 3 = 8\n#### 8", "#### 9"), question("q2"))
        reply = ScoreResponse.model_validate_json((await live.score(sent)).content)
        assert reply.scorer_id == "fake-1"
        first, second = reply.results
        assert isinstance(first, ScoredQuestion)
        assert isinstance(second, ScoredQuestion)
        assert (first.id, second.id) == ("q1", "q2")
        # By hand: one of three pairs agrees; 1 + .001 * 16 characters for a right arm, -.5 + .001 * 6 else.
        assert first.scores is not None
        assert first.scores.s_end == pytest.approx(1 / 3)
        assert first.correct_flags == (True, True, False)
        rewards = {arm.id: arm.reward for arm in first.arms}
        assert rewards == pytest.approx({"q1-0": 1.016, "q1-1": 1.016, "q1-2": -0.494})
        assert second.arms == ()


async def test_disclosure_reward_shows_no_component_name_or_value(open_service: Any, message: Any) -> None:
    async with open_service() as live:
        only_reward = live.new_key(Scope.SCORE_REWARD)
        reply = await live.score(message(disclosure="reward"), key=only_reward)
        result = reply.json()["results"][0]
        assert set(result) == {"id", "status", "reward", "degenerate", "arms"}
        for name in ("s_end", "s_path", "s_cf", "s_wm", "scores", "correct", "0.333"):
            assert name not in reply.text
            assert name not in str(reply.headers)
        assert ScoreResponse.model_validate_json(reply.content).results[0].id == "q1"
        shown = (await live.score(message())).json()["results"][0]
        assert {name: shown[name] for name in result} == result, "disclosure changes no reward"


async def test_components_without_their_scope_are_forbidden_and_never_downgraded(
    open_service: Any, message: Any
) -> None:
    async with open_service() as live:
        reply = await live.score(message(), key=live.new_key(Scope.SCORE_REWARD))
        assert (reply.status_code, code_of(reply)) == (403, "forbidden")
        assert live.engine.batches == []
        assert (await live.score(message(), key=live.new_key(Scope.SCORE_COMPONENTS))).status_code == 200


async def test_another_scorer_is_a_conflict(open_service: Any, message: Any) -> None:
    async with open_service() as live:
        reply = await live.score(message(scorer_id="fake-0"))
        assert (reply.status_code, code_of(reply)) == (409, "scorer_mismatch")
        assert (await live.score(message(scorer_id="fake-1"))).status_code == 200


async def test_the_same_request_gives_the_same_bytes_alone_and_in_a_crowd(
    open_service: Any, message: Any
) -> None:
    async with open_service() as live:
        alone = (await live.score(message())).content
        others = [message(question("q1", f"{i}\n#### {i}", gold=str(i % 2))) for i in range(8)]
        crowd = await asyncio.gather(*(live.score(m) for m in [*others, message(), *others]))
        assert crowd[8].content == alone
        # Each of the others has its own answer although all use the id q1.
        for i, reply in enumerate(crowd[:8]):
            assert reply.json()["results"][0]["correct_flags"] == [i == i % 2]
        assert any(len(batch) > 1 for batch in live.engine.batches), "no batch was shared"


async def test_digest_and_request_id_name_the_request_and_hide_it(open_service: Any, message: Any) -> None:
    async with open_service() as live:
        one = (await live.score(message())).json()
        spaced = (await live.score(json.dumps(message(), indent=3).encode())).json()
        other = (await live.score(message(step=4))).json()
        keyed = (await live.score(message(), headers={"idempotency-key": "k"})).json()
        assert one == spaced
        assert one["request_digest"] == keyed["request_digest"] != other["request_digest"]
        assert len({one["request_id"], other["request_id"], keyed["request_id"]}) == 3


# --- failures of single questions ----------------------------------------------------------------------


async def test_one_question_that_breaks_the_engine_fails_alone(open_service: Any, message: Any) -> None:
    async with open_service() as live:
        questions = [question(f"q{i}", "#### 8", prompt="poison" if i == 3 else "fine") for i in range(7)]
        reply = await live.score(message(*questions))
        results = ScoreResponse.model_validate_json(reply.content).results
        assert reply.status_code == 200
        assert [result.id for result in results] == [q["id"] for q in questions]
        failures = [result for result in results if isinstance(result, FailedQuestion)]
        assert [(f.id, f.error.code, f.error.retryable) for f in failures] == [("q3", "scorer_failed", True)]


async def test_questions_not_scored_by_the_deadline_fail_as_timeouts(open_service: Any, message: Any) -> None:
    async with open_service(batch_arms=1) as live:
        live.engine.gate.clear()
        started = time.monotonic()
        reply = await live.score(message(), headers={"x-deadline-ms": "3000"})
        assert 2 < time.monotonic() - started < 3, "the reply must reach a client that waits 3 s"
        assert reply.status_code == 200
        error = {"code": "scorer_timeout", "retryable": True}
        assert reply.json()["results"] == [{"id": "q1", "status": "failed", "error": error}]


async def test_questions_scored_before_the_deadline_are_kept(open_service: Any, message: Any) -> None:
    async with open_service(batch_arms=1) as live:
        plain = live.engine.score

        def slow_second(questions: Any, mode: Any, *, fresh: bool = False) -> Any:
            if questions[0].question == "slow":
                time.sleep(2.5)
            return plain(questions, mode)

        live.engine.score = slow_second
        sent = message(question("q1", "#### 8"), question("q2", "#### 8", prompt="slow"))
        results = (await live.score(sent, headers={"x-deadline-ms": "1500"})).json()["results"]
        assert [result["status"] for result in results] == ["scored", "failed"]


async def test_expired_and_abandoned_work_is_never_started(
    open_service: Any, message: Any, until: Any
) -> None:
    async with open_service() as live:
        live.engine.gate.clear()
        blocker = asyncio.create_task(live.score(message(run_id="blocker")))
        await until(lambda: len(live.engine.batches) == 1)
        assert (await live.score(message(run_id="late"), headers={"x-deadline-ms": "50"})).status_code == 200
        gone = asyncio.create_task(live.score(message(run_id="gone")))
        await until(lambda: live.app.state.service.admission.arms == 6)
        gone.cancel()
        await until(lambda: live.app.state.service.admission.arms == 3)
        live.engine.gate.set()
        assert (await blocker).json()["results"][0]["status"] == "scored"
        assert (await live.score(message(run_id="after"))).status_code == 200
        assert len(live.engine.batches) == 2


async def test_a_client_that_disconnects_frees_its_slot(open_service: Any, message: Any, until: Any) -> None:
    async with open_service() as live:
        live.engine.gate.clear()
        body = json.dumps(message()).encode()
        events = [{"type": "http.request", "body": body, "more_body": False}]
        leave = asyncio.Event()

        async def receive() -> Any:
            if events:
                return events.pop()
            await leave.wait()
            return {"type": "http.disconnect"}

        async def send(event: Any) -> None:
            pass

        headers = {"authorization": f"Bearer {live.key}", "content-type": "application/json"}
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/score",
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }
        request = asyncio.create_task(live.app(scope, receive, send))
        admission = live.app.state.service.admission
        await until(lambda: len(live.engine.batches) == 1)
        assert (admission.arms, admission.bytes) == (3, live.app.state.service.settings.max_body_bytes)
        leave.set()
        await asyncio.wait_for(request, 5)
        await until(lambda: admission.arms == 0)
        assert admission.bytes == 0


# --- idempotency ---------------------------------------------------------------------------------------


async def test_the_same_idempotency_key_and_body_are_scored_once(open_service: Any, message: Any) -> None:
    async with open_service() as live:
        headers = {"idempotency-key": "abc"}
        first = await live.score(message(), headers=headers)
        live.engine.drift = 1.0  # would show if it were scored again
        second = await live.score(message(), headers=headers)
        assert first.content == second.content
        assert len(live.engine.batches) == 1
        other = await live.score(message(step=99), headers=headers)
        assert (other.status_code, code_of(other)) == (422, "idempotency_mismatch")


async def test_a_repeated_request_in_flight_is_joined(open_service: Any, message: Any, until: Any) -> None:
    async with open_service() as live:
        live.engine.gate.clear()
        headers = {"idempotency-key": "abc"}
        first = asyncio.create_task(live.score(message(), headers=headers))
        await until(lambda: bool(live.engine.batches))
        second = asyncio.create_task(live.score(message(), headers=headers))
        impatient = await live.score(message(), headers={**headers, "x-deadline-ms": "50"})
        assert (impatient.status_code, code_of(impatient)) == (409, "request_in_flight")
        assert impatient.headers["retry-after"] == "1"
        mismatch = await live.score(message(step=99), headers=headers)
        assert code_of(mismatch) == "idempotency_mismatch"
        first.cancel()  # the one that started it leaves; the other still waits
        await asyncio.sleep(0.05)
        live.engine.gate.set()
        assert (await second).json()["results"][0]["status"] == "scored"
        assert len(live.engine.batches) == 1


async def test_idempotency_keys_of_two_api_keys_never_meet(open_service: Any, message: Any) -> None:
    async with open_service() as live:
        headers = {"idempotency-key": "abc"}
        await live.score(message(), headers=headers)
        other = live.new_key(Scope.SCORE_COMPONENTS)
        assert (await live.score(message(step=99), headers=headers, key=other)).status_code == 200


async def test_a_retryable_failure_is_not_kept(open_service: Any, message: Any) -> None:
    async with open_service() as live:
        headers = {"idempotency-key": "abc"}
        plain, calls = live.engine.score, []

        def fails_once(questions: Any, mode: Any, *, fresh: bool = False) -> Any:
            calls.append(1)
            if len(calls) == 1:
                raise ValueError
            return plain(questions, mode)

        live.engine.score = fails_once
        statuses = [
            (await live.score(message(), headers=headers)).json()["results"][0]["status"] for _ in range(3)
        ]
        assert statuses == ["failed", "scored", "scored"]
        assert len(calls) == 2


# --- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b'{"a": 1, "a": 1}',
        b'{"step": NaN}',
        b'{"run_id": "\\ud800"}',
        b"\xff",
        "{}".encode("utf-16"),
    ],
)
async def test_what_is_no_strict_json_is_malformed(open_service: Any, body: bytes) -> None:
    async with open_service() as live:
        reply = await live.score(body)
        assert (reply.status_code, code_of(reply)) == (400, "malformed_request")


@pytest.mark.parametrize(
    "change",
    [
        {"contract": "2.0"},
        {"step": "3"},
        {"step": 3.0},
        {"step": True},
        {"step": -1},
        {"step": 2**53 + 1},
        {"run_id": ""},
        {"run_id": "x" * 201},
        {"run_id": None},
        {"purpose": "fun"},
        {"disclosure": "all"},
        {"reward_mode": "ARM"},
        {"questions": []},
        {"questions": {}},
        {"questions": "q"},
        {"questions": [{}]},
        {"extra": 1},
    ],
    ids=str,
)
async def test_what_does_not_follow_the_contract_is_invalid(
    open_service: Any, message: Any, change: Any
) -> None:
    async with open_service() as live:
        reply = await live.score(message(**change))
        assert (reply.status_code, code_of(reply)) == (422, "invalid_request")
        assert live.engine.batches == []


async def test_repeated_ids_are_invalid(open_service: Any, message: Any) -> None:
    async with open_service() as live:
        assert (await live.score(message(question("a"), question("a")))).status_code == 422
        twice = {**question("a"), "arms": [{"id": "0", "full_text": ""}] * 2}
        assert (await live.score(message(twice))).status_code == 422


@pytest.mark.parametrize(
    ("limits", "fits", "exceeds"),
    [
        ({"max_questions": 2}, [question("a"), question("b")], [question(x) for x in "abc"]),
        ({"max_arms": 2}, [question("a", "x", "y")], [question("a", "x", "y", "z")]),
        (
            {"max_text_chars": 5},
            [question("a", "12345", prompt="12345")],
            [question("a", "123456", prompt="")],
        ),
        ({"max_text_chars": 5}, [question("a", "é" * 5, prompt="12345")], [question("a", prompt="123456")]),
    ],
    ids=str,
)
async def test_limits_hold_exactly(
    open_service: Any, message: Any, limits: Any, fits: Any, exceeds: Any
) -> None:
    async with open_service(**limits) as live:
        info = await live.client.get("/v1/info", headers={"authorization": f"Bearer {live.key}"})
        assert info.json()["limits"].items() >= limits.items()
        assert (await live.score(message(*fits))).status_code == 200
        reply = await live.score(message(*exceeds))
        assert (reply.status_code, code_of(reply)) == (413, "request_too_large")


async def test_the_body_limit_holds_with_and_without_an_announced_length(
    open_service: Any, message: Any
) -> None:
    body = json.dumps(message()).encode()
    async with open_service(max_body_bytes=1024) as live:
        headers = {"authorization": f"Bearer {live.key}", "content-type": "application/json"}

        async def chunks(content: bytes) -> Any:
            for start in range(0, len(content), 100):
                yield content[start : start + 100]

        for size, status in ((1024, 200), (1025, 413)):
            content = body.ljust(size)
            assert (await live.score(content)).status_code == status
            streamed = await live.client.post("/v1/score", content=chunks(content), headers=headers)
            assert "content-length" not in streamed.request.headers
            assert streamed.status_code == status
        for bad, status in ((b"x", 400), (b"-1", 400), (b"1e3", 400), (b"\xb2", 400), (b"9" * 30, 413)):
            lying = {**headers, "content-length": bad}
            assert (await live.client.post("/v1/score", content=body, headers=lying)).status_code == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "application/json; charset=utf-8"}, 200),
        ({"content-type": 'Application/JSON;charset="UTF-8"'}, 200),
        ({"content-encoding": "identity"}, 200),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/json; charset=utf-16"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": "multipart/form-data; boundary=x"}, 415),
        ({"content-type": ""}, 415),
        ({"content-encoding": "gzip"}, 415),
        ({"x-deadline-ms": "60000"}, 200),
        ({"x-deadline-ms": "999999999"}, 200),
        ({"x-deadline-ms": "0"}, 422),
        ({"x-deadline-ms": "-5"}, 422),
        ({"x-deadline-ms": "1.5"}, 422),
        ({"x-deadline-ms": "9" * 10}, 422),
        ({"idempotency-key": "a" * 200}, 200),
        ({"idempotency-key": ""}, 422),
        ({"idempotency-key": "a" * 201}, 422),
        ({"idempotency-key": "a b"}, 422),
    ],
    ids=str,
)
async def test_headers_mean_one_thing_or_are_refused(
    open_service: Any, message: Any, headers: Any, status: int
) -> None:
    async with open_service() as live:
        assert (await live.score(message(), headers=headers)).status_code == status


@pytest.mark.parametrize("name", ["idempotency-key", "x-deadline-ms", "content-type"])
async def test_a_repeated_header_is_refused(open_service: Any, message: Any, name: str) -> None:
    async with open_service() as live:
        value = "application/json" if name == "content-type" else "1000"
        headers = [
            ("authorization", f"Bearer {live.key}"),
            ("content-type", "application/json"),
            (name, value),
            *([(name, value)] if name != "content-type" else []),
        ]
        reply = await live.client.post("/v1/score", content=json.dumps(message()).encode(), headers=headers)
        assert (reply.status_code, code_of(reply)) == (422, "invalid_request")


async def test_a_body_that_trickles_is_timed_out(open_service: Any) -> None:
    async with open_service(receive_deadline_s=0.2) as live:

        async def trickle() -> Any:
            while True:
                yield b" "
                await asyncio.sleep(0.05)

        headers = {"authorization": f"Bearer {live.key}", "content-type": "application/json"}
        started = time.monotonic()
        reply = await live.client.post("/v1/score", content=trickle(), headers=headers)
        assert (reply.status_code, code_of(reply)) == (408, "request_timeout")
        assert reply.headers["connection"] == "close"
        assert time.monotonic() - started < 2


async def test_a_full_queue_is_refused_at_once_with_retry_after(
    open_service: Any, message: Any, until: Any
) -> None:
    async with open_service(max_waiting_arms=4) as live:
        live.engine.gate.clear()
        waiting = asyncio.create_task(live.score(message()))
        await until(lambda: bool(live.engine.batches))
        reply = await live.score(message(run_id="other"), headers={"idempotency-key": "k"})
        assert (reply.status_code, code_of(reply)) == (503, "overloaded")
        assert 1 <= int(reply.headers["retry-after"]) <= 30
        live.engine.gate.set()
        assert (await waiting).status_code == 200
        again = await live.score(message(run_id="other"), headers={"idempotency-key": "k"})
        assert again.status_code == 200, "a refusal is not kept under the idempotency key"


async def test_a_full_queue_refuses_what_is_new_before_its_body_costs_anything_and_answers_the_rest(
    open_service: Any, message: Any, until: Any
) -> None:
    async with open_service(max_waiting_arms=3) as live:
        answered = await live.score(message(run_id="earlier"), headers={"idempotency-key": "earlier"})
        live.engine.gate.clear()
        waiting = asyncio.create_task(live.score(message(), headers={"idempotency-key": "now"}))
        await until(lambda: len(live.engine.batches) == 2)
        refused = await live.score(b"not read", headers={"idempotency-key": "new"})
        assert (refused.status_code, code_of(refused)) == (503, "overloaded")
        assert (await live.score(b"not read", key="wrong")).status_code == 401
        repeated = await live.score(message(run_id="earlier"), headers={"idempotency-key": "earlier"})
        assert (repeated.status_code, repeated.content) == (200, answered.content)
        joining = asyncio.create_task(live.score(message(), headers={"idempotency-key": "now"}))
        await asyncio.sleep(0.05)
        live.engine.gate.set()
        assert (await joining).content == (await waiting).content
        assert len(live.engine.batches) == 2
        assert (await live.score(b"not read", headers={"idempotency-key": "new"})).status_code == 400


async def never_whole() -> Any:
    yield b"{"
    await asyncio.sleep(30)


async def test_slow_bodies_of_one_account_keep_no_other_one_out(
    open_service: Any, message: Any, until: Any
) -> None:
    async with open_service(max_body_bytes=1024, max_waiting_bytes=4096) as live:
        greedy = live.new_key(Scope.SCORE_REWARD)
        sent = {"authorization": f"Bearer {greedy}", "content-type": "application/json"}
        # The second kind of head says 1 byte and sends what it likes (RFC 9112, 6.3: the length is ignored).
        for lengths in (
            {"content-length": "1024"},
            {"content-length": "1", "transfer-encoding": "chunked"},
        ):
            slow = [
                asyncio.create_task(
                    live.client.post("/v1/score", content=never_whole(), headers={**sent, **lengths})
                )
                for _ in range(5)
            ]
            await until(lambda: live.app.state.service.admission.bytes == 2048)
            await asyncio.sleep(0.05)
            assert live.app.state.service.admission.bytes == 2048
            assert code_of(await live.score(message(disclosure="reward"), key=greedy)) == "overloaded"
            assert (await live.score(message())).status_code == 200
            for task in slow:
                task.cancel()
            await until(lambda: live.app.state.service.admission.bytes == 0)


async def test_a_request_that_fills_the_queue_keeps_no_other_account_out(
    open_service: Any, message: Any, until: Any
) -> None:
    async with open_service(max_waiting_arms=8, batch_arms=1) as live:
        live.engine.gate.clear()
        greedy = live.new_key(Scope.SCORE_COMPONENTS)
        large = message(question("large", *(f"#### {i}" for i in range(8))))
        filling = asyncio.create_task(live.score(large, key=greedy))
        await until(lambda: live.app.state.service.admission.arms == 8)
        assert code_of(await live.score(message(step=4), key=greedy)) == "overloaded"
        other = asyncio.create_task(live.score(message()))
        await until(lambda: live.app.state.service.admission.arms == 11)
        live.engine.gate.set()
        assert [(await task).status_code for task in (filling, other)] == [200, 200]


async def test_what_is_no_request_takes_an_item_of_the_rate_and_in_debt_no_body_is_read(
    open_service: Any, message: Any
) -> None:
    async with open_service(receive_deadline_s=0.05, max_body_bytes=4096) as live:
        other = message(scorer_id="x", disclosure="reward")
        bad: list[Any] = [b"{", message(step=-1), other, message(), b" " * 5000, None]
        codes = [
            "malformed_request",
            "invalid_request",
            "scorer_mismatch",
            "forbidden",
            "request_too_large",
            "request_timeout",
        ]
        for sent, code in zip(bad, codes, strict=True):
            key = live.new_key(Scope.SCORE_REWARD, rate=1)
            seen = []
            for _ in range(3):
                if sent is None:
                    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
                    reply = await live.client.post("/v1/score", content=never_whole(), headers=headers)
                else:
                    reply = await live.score(sent, key=key)
                seen.append(code_of(reply))
            if code == "request_too_large":
                assert seen == [code] * 3, "it is refused by its head, which costs nothing"
                continue
            assert seen == [code, code, "rate_limited"]
            assert 115 <= int(reply.headers["retry-after"]) <= 120  # by hand: from -1 to 1 at one a minute
        assert (await live.score(message())).status_code == 200


def test_names_are_made_of_the_same_bytes_as_ever() -> None:
    # Keys kept by an earlier version have to be found by this one.
    for values in (("idempotency", 'a"b\\c'), ("run", "ü\u2028\x7f\n😀"), ("", None, "x")):
        assert _json_of(*values) == json.dumps(list(values))


# --- info ----------------------------------------------------------------------------------------------


async def test_info_states_contract_scorer_limits_and_ranges(open_service: Any) -> None:
    async with open_service(max_arms=5) as live:
        reply = await live.client.get("/v1/info", headers={"authorization": f"Bearer {live.key}"})
        info = ServiceInfo.model_validate_json(reply.content)
        assert (info.contract_min, info.contract_max, info.scorer_id) == ("1.0", "1.0", "fake-1")
        assert info.limits.max_arms == 5
        assert (
            set(info.ranges) == {mode.value for mode in info.reward_modes} == {"question", "arm", "arm_gated"}
        )
        assert all(name not in reply.text for name in ("s_end", "s_path", "s_cf", "s_wm"))


@pytest.mark.parametrize(
    ("scope", "disclosure", "status"),
    [
        (Scope.SCORE_COMPONENTS, "components", 200),
        (Scope.SCORE_COMPONENTS, "reward", 200),
        (Scope.SCORE_REWARD, "components", 403),
        (Scope.SCORE_REWARD, "reward", 200),
        (Scope.ARMS_ROLLOUT, "reward", 200),
        (Scope.METRICS_READ, "reward", 403),
        (Scope.METRICS_READ, None, 200),
        (Scope.SCORE_COMPONENTS, "everything", 422),
    ],
)
async def test_info_says_at_once_that_a_key_may_not_have_the_disclosure_it_will_want(
    open_service: Any, scope: Scope, disclosure: str | None, status: int
) -> None:
    async with open_service() as live:
        headers = {"authorization": f"Bearer {live.new_key(scope)}"}
        headers |= {"x-disclosure": disclosure} if disclosure else {}
        assert (await live.client.get("/v1/info", headers=headers)).status_code == status

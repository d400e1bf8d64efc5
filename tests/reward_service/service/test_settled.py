"""What a reply costs, what is kept, and what a restart or a crash changes about it: nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from looper_schemas.problems import ProblemCode
from looper_schemas.scoring import ScoreResponse
from reward_service import auth
from reward_service.audit import AuditFile, read_records, verify
from reward_service.auth import Scope
from reward_service.batching import failed
from reward_service.ledger import Ledger
from reward_service.state import State

pytestmark = pytest.mark.anyio

KEY = {"idempotency-key": "k"}


def question(name: str, arms: int, prompt: str = "fine") -> dict[str, Any]:
    return {"id": name, "question": prompt, "arms": [{"id": str(i), "full_text": "x"} for i in range(arms)]}


def code_of(reply: Any) -> str:
    return str(reply.json()["type"]).removeprefix("urn:looper:problem:")


def used(home: Path, key: str) -> int:
    state = State(home, None, 10, 1000, 60.0)
    try:
        return state.used(key.split("_")[1])
    finally:
        state.close()


async def test_the_same_key_and_body_give_the_same_bytes_across_restarts(
    open_service: Any, message: Any
) -> None:
    async with open_service() as live:
        key = live.key
        first = await live.score(message(), headers=KEY)
    async with open_service() as live:
        live.engine.drift = 1.0  # would show if it were scored again
        second = await live.score(message(), headers=KEY, key=key)
        assert second.content == first.content
        assert live.engine.batches == []
        other = await live.score(message(step=99), headers=KEY, key=key)
        assert (other.status_code, code_of(other)) == (422, "idempotency_mismatch")
        assert used(live.home, key) == 3


async def test_a_budget_lasts_for_life_and_counts_what_was_scored(open_service: Any, message: Any) -> None:
    async with open_service() as live:
        key = live.new_key(Scope.SCORE_REWARD, budget=10)
        sent = {"disclosure": "reward"}
        ask = message(question("a", 3), question("b", 2, "poison"), question("c", 0), **sent)
        assert (await live.score(ask, key=key)).status_code == 200  # 3 + 1; the failed question is free
        assert used(live.home, key) == 4
    async with open_service() as live:
        six = message(question("a", 6), **sent)
        assert (await live.score(six, key=key, headers=KEY)).status_code == 200
        over = await live.score(message(question("a", 1), **sent), key=key)
        assert (over.status_code, code_of(over)) == (403, "budget_exhausted")
        assert over.json()["retryable"] is False
        again = await live.score(six, key=key, headers=KEY)  # paid for already
        assert again.status_code == 200
        assert used(live.home, key) == 10
        assert (await live.score(message())).status_code == 200, "another key has its own budget"


async def test_requests_at_one_time_cannot_overdraw_a_budget(open_service: Any, message: Any) -> None:
    async with open_service() as live:
        key = live.new_key(Scope.SCORE_REWARD, budget=10)
        live.engine.gate.clear()
        asked = [
            asyncio.create_task(live.score(message(step=step, disclosure="reward"), key=key))
            for step in range(8)
        ]
        await asyncio.sleep(0.3)
        live.engine.gate.set()
        statuses = [reply.status_code for reply in await asyncio.gather(*asked)]
        assert sorted(statuses) == [200] * 3 + [403] * 5
        assert used(live.home, key) == 9


async def test_a_rate_is_refused_with_the_time_to_wait_and_nothing_is_kept_of_it(
    open_service: Any, message: Any
) -> None:
    async with open_service() as live:
        key = live.new_key(Scope.SCORE_COMPONENTS, rate=3)
        assert (await live.score(message(), key=key)).status_code == 200
        refused = await live.score(message(step=4), key=key, headers=KEY)
        assert (refused.status_code, code_of(refused)) == (429, "rate_limited")
        assert 55 <= int(refused.headers["retry-after"]) <= 60
        assert refused.json()["retryable"] is True
        live.app.state.service.limits._buckets.clear()  # a minute later
        assert (await live.score(message(step=4), key=key, headers=KEY)).status_code == 200
        assert used(live.home, key) == 6


async def test_repeats_take_from_the_rate_and_leave_no_line_once_it_is_spent(
    open_service: Any, message: Any
) -> None:
    async with open_service() as live:
        key = live.new_key(Scope.SCORE_COMPONENTS, rate=5, budget=3)
        asked = [await live.score(message(), key=key, headers=KEY) for _ in range(6)]
        # Three items for the arms, and one each for two repeats.
        assert [reply.status_code for reply in asked] == [200] * 3 + [429] * 3
        assert [record["event"] for record in read_records(live.home)] == ["score", "repeat", "repeat"]
        assert 1 <= int(asked[3].headers["retry-after"]) <= 12  # an item at five a minute
        live.app.state.service.limits._buckets.clear()  # a minute later
        again = await live.score(message(), key=key, headers=KEY)
        assert again.content == asked[0].content, "who lost a reply still gets it"
        assert used(live.home, key) == 3


async def test_questions_that_can_never_be_scored_cost_their_items(open_service: Any, message: Any) -> None:
    async with open_service() as live:
        plain = live.engine.score

        def refuses(questions: Any, mode: Any, *, fresh: bool = False) -> Any:
            bad = [failed(q.id, ProblemCode.INVALID_REQUEST) for q in questions if q.id == "bad"]
            return [*plain([q for q in questions if q.id != "bad"], mode), *bad]

        live.engine.score = refuses
        key = live.new_key(Scope.SCORE_COMPONENTS, budget=8)
        sent = message(question("a", 3), question("bad", 4))
        reply = await live.score(sent, key=key, headers=KEY)
        assert [result["status"] for result in reply.json()["results"]] == ["scored", "failed"]
        assert used(live.home, key) == 7, "it is kept, and what is kept was paid for"
        assert (await live.score(sent, key=key, headers=KEY)).content == reply.content
        assert used(live.home, key) == 7


async def test_a_rotated_key_goes_on_with_account_replies_and_limits(open_service: Any, message: Any) -> None:
    async with open_service() as live:
        old = live.new_key(Scope.SCORE_COMPONENTS, budget=7)
        first = await live.score(message(), key=old, headers=KEY)
        new = auth.rotate_key(live.home, old.split("_")[1], grace_s=3600)
        for key in (old, new):
            assert (await live.score(message(), key=key, headers=KEY)).content == first.content
        assert (await live.score(message(step=4), key=new)).status_code == 200
        for key in (old, new):
            assert code_of(await live.score(message(step=5), key=key)) == "budget_exhausted"
        assert used(live.home, old) == 6
        cut = auth.rotate_key(live.home, new.split("_")[1], grace_s=0)
        assert (await live.score(message(), key=new)).status_code == 401
        assert code_of(await live.score(message(step=5), key=cut)) == "budget_exhausted"


async def test_rotating_under_load_fails_nobody(open_service: Any, message: Any) -> None:
    async with open_service() as live:
        key = live.key
        statuses = []
        for step in range(30):
            if step % 5 == 4:
                key = auth.rotate_key(live.home, key.split("_")[1], grace_s=60)
            asked = (live.score(message(step=step), key=each) for each in (key, live.key))
            statuses += [reply.status_code for reply in await asyncio.gather(*asked)]
        assert statuses == [200] * 60


@pytest.mark.parametrize("point", ["before the audit", "after the audit", "after the commit"])
async def test_a_crash_at_any_point_of_a_commit_charges_once_and_changes_no_byte(
    open_service: Any, message: Any, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    async with open_service() as live:
        key = live.key
        calm = await live.score(message(step=1))
    append, write = AuditFile.append, Ledger.write

    def killed_append(self: Any, records: Any) -> None:
        if point == "after the audit":
            append(self, records)
        raise RuntimeError("killed")

    def killed_write(self: Any, entries: Any) -> Any:
        write(self, entries)
        raise RuntimeError("killed")

    async with open_service() as live:
        with monkeypatch.context() as patch:
            if point == "after the commit":
                patch.setattr(Ledger, "write", killed_write)
                patch.setattr(
                    live.app.state.service.ledger._commits,
                    "_write",
                    lambda entries: killed_write(live.app.state.service.ledger, entries),
                )
            else:
                patch.setattr(AuditFile, "append", killed_append)
            assert (await live.score(message(), key=key, headers=KEY)).status_code == 500
    async with open_service() as live:
        for _ in range(2):
            reply = await live.score(message(), key=key, headers=KEY)
            assert reply.status_code == 200
        rewards = [
            ScoreResponse.model_validate_json(body).results[0] for body in (reply.content, calm.content)
        ]
        assert rewards[0] == rewards[1]
        assert used(live.home, key) == 6, "twice three arms: the calm request and this one"
        told = [r["event"] for r in read_records(live.home) if r["digest"] == reply.json()["request_digest"]]
        first = {"before the audit": [], "after the audit": ["score"], "after the commit": ["score"]}[point]
        then = ["repeat", "repeat"] if point == "after the commit" else ["score", "repeat"]
        assert told == first + then
    verify(live.home)


async def test_a_database_that_does_not_answer_is_503(
    open_service: Any, message: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sqlalchemy.exc import OperationalError

    async with open_service() as live:
        state = live.app.state.service.state
        budgeted = live.new_key(Scope.SCORE_COMPONENTS, budget=100)

        class Down:
            def begin(self) -> None:
                raise OperationalError("secret", {}, Exception("secret"))

        with monkeypatch.context() as patch:
            patch.setattr(state, "_engine", Down())
            for key, headers in ((live.key, {}), (live.key, KEY), (budgeted, {})):
                reply = await live.score(message(), key=key, headers=headers)
                assert (reply.status_code, code_of(reply)) == (503, "not_ready")
                assert "secret" not in reply.text
        assert list(read_records(live.home)) == []
        assert (await live.score(message(), headers=KEY)).status_code == 200


async def test_what_a_replica_spent_meanwhile_is_withheld_and_the_audit_says_so(
    open_service: Any, message: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_service() as live:
        key = live.new_key(Scope.SCORE_COMPONENTS, budget=5)
        assert (await live.score(message(), key=key)).status_code == 200

        async def nothing(account: str) -> int:
            return 0  # as it was before another replica charged its reply

        monkeypatch.setattr(live.app.state.service.limits, "_used", nothing)
        reply = await live.score(message(step=4), key=key, headers=KEY)
        assert (reply.status_code, code_of(reply)) == (403, "budget_exhausted")
        told = [(record["event"], record["cost"]) for record in read_records(live.home)]
        assert told == [("score", 3), ("withheld", 0)]
        assert used(live.home, key) == 3

"""What the service audits, and that it answers nothing that it could not audit."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
from typing import Any

import pytest

from reward_service import audit
from reward_service.audit import read_records, verify

pytestmark = pytest.mark.anyio

WORDS = ("event", "time", "purpose", "mode", "disclosure", "scorer_id", "key_id")


def question(name: str, arms: int, prompt: str = "fine") -> dict[str, Any]:
    return {"id": name, "question": prompt, "arms": [{"id": str(i), "full_text": "x"} for i in range(arms)]}


async def test_every_reply_has_one_line_with_its_cost(open_service: Any, message: Any) -> None:
    async with open_service() as live:
        sent = message(question("a", 3), question("b", 0), question("c", 2, "poison"), run_id="r", step=7)
        reply = await live.score(sent)
        key = {"idempotency-key": "k"}
        for _ in range(2):
            await live.score(message(question("a", 3)), headers=key)
        records = list(read_records(live.home))
        assert [record["event"] for record in records] == ["score", "score", "repeat"]
        first = records[0]
        # 3 arms, and 1 for a question without arms; the failed one is free
        assert (first["questions"], first["arms"], first["failed"], first["cost"]) == (3, 5, 1, 4)
        assert (first["step"], first["purpose"], first["mode"]) == (7, "train", "arm_gated")
        assert first["reply_id"] == reply.json()["request_id"]
        assert first["digest"] == reply.json()["request_digest"]
        assert first["key_id"] == live.key.split("_")[1]
        assert (records[1]["cost"], records[2]["cost"]) == (3, 0)
        assert records[1]["digest"] == records[2]["digest"] != first["digest"]
        assert (first["run"] == records[1]["run"]) is False
    assert verify(live.home).seq == 3


async def test_the_audit_holds_no_text(open_service: Any, message: Any) -> None:
    canary = "canary7141"
    async with open_service() as live:
        one = {
            "id": canary,
            "question": canary,
            "gold_answer": canary,
            "arms": [{"id": canary, "full_text": canary, "answer": canary}],
        }
        reply = await live.score(message(one, run_id=canary), headers={"idempotency-key": canary})
        assert reply.status_code == 200
        assert canary not in (live.home / "audit.jsonl").read_text()
        (record,) = read_records(live.home)
        for name, value in record.items():
            assert name in WORDS or isinstance(value, int) or re.fullmatch("[0-9a-f]{32,64}", str(value))


async def test_refused_requests_leave_no_line(open_service: Any, message: Any) -> None:
    async with open_service() as live:
        for sent in (b"{", message(step=-1), message(scorer_id="other")):
            assert (await live.score(sent)).status_code >= 400
        assert (await live.score(message(), key="rw_nobody")).status_code == 401
        assert list(read_records(live.home)) == []


async def test_the_line_is_on_disk_before_the_reply(
    open_service: Any, message: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_service() as live:
        events: list[str] = []

        def watch(name: str) -> None:
            real = getattr(os, name)

            def watched(descriptor: int) -> None:
                events.append(name)
                real(descriptor)

            monkeypatch.setattr(os, name, watched)

        watch("fsync")
        watch("fdatasync")
        await live.score(message())
        assert events == ["fsync", "fdatasync"], "lines, then the head"
        assert len(list(read_records(live.home))) == 1


async def test_what_cannot_be_audited_is_not_answered(
    open_service: Any, message: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_service() as live:
        headers = {"idempotency-key": "k"}
        kept = await live.score(message(), headers=headers)

        def full(descriptor: int, data: bytes) -> None:
            raise OSError(errno.ENOSPC, "full")

        with monkeypatch.context() as patch:
            patch.setattr(audit, "_write_all", full)
            replies = [
                await live.score(message(step=99)),
                await live.score(message(step=99), headers={"idempotency-key": "other"}),
                await live.score(message(), headers=headers),  # also what was answered before
            ]
            for reply in replies:
                assert reply.status_code == 503
                assert reply.json()["type"].endswith(":not_ready")
                assert reply.json()["retryable"] is True
                assert reply.headers["retry-after"] == "5"
                assert "results" not in reply.text
        assert len(list(read_records(live.home))) == 1
        # The disk has room again: nothing has to be restarted, and the refusal was not kept.
        assert (await live.score(message(), headers=headers)).content == kept.content
        assert (await live.score(message(step=99), headers={"idempotency-key": "other"})).status_code == 200
    assert verify(live.home).seq == 3


async def test_with_a_full_disk_the_service_is_not_ready_until_there_is_room(
    open_service: Any, message: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_service() as live:
        headers = {"authorization": f"Bearer {live.key}"}

        async def ready() -> int:
            return int((await live.client.get("/readyz", headers=headers)).status_code)

        assert await ready() == 200
        assert list(read_records(live.home)) == [], "to ask is no event"

        def full(descriptor: int, data: bytes) -> None:
            raise OSError(errno.ENOSPC, "full")

        with monkeypatch.context() as patch:
            patch.setattr(audit, "_write_all", full)
            assert (await live.score(message())).status_code == 503
            assert [await ready(), await ready()] == [503, 503]
        # Who asks only whether it is ready gets to know: it takes no request for a score to find out.
        assert [await ready(), await ready()] == [200, 200]
        assert [record["event"] for record in read_records(live.home)] == ["resumed"]
    assert verify(live.home).seq == 1


async def test_a_disk_in_an_unknown_state_makes_the_service_not_ready(
    open_service: Any, message: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(descriptor: int) -> None:
        raise OSError(errno.EIO, "no")

    async with open_service() as live:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fails)
            assert (await live.score(message())).status_code == 503
        assert (await live.score(message())).status_code == 503
        ready = await live.client.get("/readyz", headers={"authorization": f"Bearer {live.key}"})
        assert (ready.status_code, ready.json()["type"]) == (503, "urn:looper:problem:not_ready")


async def test_requests_at_one_time_share_commits_and_the_chain_holds(
    open_service: Any, message: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits: list[int] = []
    real = audit.AuditFile.append

    def counted(self: Any, records: Any) -> None:
        commits.append(len(records))
        real(self, records)

    monkeypatch.setattr(audit.AuditFile, "append", counted)
    async with open_service() as live:
        live.engine.gate.clear()
        asked = [asyncio.create_task(live.score(message(step=step))) for step in range(40)]
        await asyncio.sleep(0.2)
        live.engine.gate.set()
        replies = await asyncio.gather(*asked)
        assert [reply.status_code for reply in replies] == [200] * 40
    records = list(read_records(live.home))
    assert sorted(int(str(record["step"])) for record in records) == list(range(40))
    assert {record["reply_id"] for record in records} == {reply.json()["request_id"] for reply in replies}
    assert sum(commits) == 40
    assert verify(live.home).seq == 40


async def test_a_restarted_service_continues_its_audit(open_service: Any, message: Any) -> None:
    for _ in range(3):
        async with open_service() as live:
            await live.score(message())
    assert verify(live.home).seq == 3
    assert json.loads((live.home / "audit.jsonl").read_text().splitlines()[2])["seq"] == 3

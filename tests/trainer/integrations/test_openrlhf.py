"""The adapter speaks the remote reward protocol of OpenRLHF, recorded from its own executor.

`openrlhf_0_11_0.json` holds requests as OpenRLHF 0.11.0's `SingleTurnAgentExecutor` sent them
(benchmarks/openrlhf_protocol.py records them anew and runs the same executor against the adapter).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from looper_trainer.integrations.openrlhf import Adapter, completion_of, samples_of
from looper_trainer.reward_client import RewardClient
from looper_trainer.testing import FakeRewardServer

RECORDED = json.loads(Path(__file__).with_name("openrlhf_0_11_0.json").read_text(encoding="utf-8"))


@pytest.fixture
def server() -> Iterator[FakeRewardServer]:
    with FakeRewardServer(key="k") as running:
        yield running


@pytest.fixture
def adapter(server: FakeRewardServer) -> Iterator[Adapter]:
    with (
        RewardClient(server.url, "k", run_id="r", give_up_after_s=0.5, on_wait=lambda _: None) as client,
        Adapter(client, samples_per_prompt=2, collect_s=0.4) as running,
    ):
        yield running


def post_all(adapter: Adapter, bodies: list[dict[str, Any]]) -> list[httpx.Response]:
    """Every body in a connection of its own at the same time, as OpenRLHF does."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(
            pool.map(lambda body: httpx.post(adapter.url, json=body, timeout=30, trust_env=False), bodies)
        )


def test_single_requests_of_a_prompt_become_one_group(adapter: Adapter, server: FakeRewardServer) -> None:
    replies = post_all(adapter, RECORDED["requests"])
    assert [reply.status_code for reply in replies] == [200] * 4
    assert [reply.json()["rewards"] for reply in replies] == [[r] for r in RECORDED["expected_rewards"]]
    for reply in replies:
        document = reply.json()
        assert document["scores"] == [1.0 if document["rewards"] == [1.0] else 0.0]
        assert document["extra_logs"]["looper_group_size"] == [2.0]
        assert 0.0 <= document["extra_logs"]["looper_s_wm"][0] <= 1.0
    sent = [question for request in server.requests for question in request.questions]
    assert [len(question.arms) for question in sent] == [2, 2]
    texts = {arm.full_text for question in sent for arm in question.arms}
    assert texts == set(RECORDED["completions"])


def test_an_incomplete_group_is_scored_and_says_so(adapter: Adapter) -> None:
    (reply,) = post_all(adapter, RECORDED["requests"][:1])
    assert reply.json()["extra_logs"]["looper_group_size"] == [1.0]


def test_a_dead_service_is_no_reward(
    adapter: Adapter, server: FakeRewardServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert post_all(adapter, RECORDED["requests"][:2])[0].status_code == 200
    server.stop()
    for reply in post_all(adapter, RECORDED["requests"][:2]):
        assert reply.status_code == 503
        assert "rewards" not in reply.json()
    server.start()
    assert [reply.status_code for reply in post_all(adapter, RECORDED["requests"][:2])] == [200, 200]
    assert "no answer from the reward service" in capsys.readouterr().err


def test_a_question_without_a_score_is_no_reward(adapter: Adapter, server: FakeRewardServer) -> None:
    server.faults.failing_is_retryable = False
    (one, _) = samples_of(json.dumps(RECORDED["requests"][0]).encode()) * 2
    server.faults.failing = {one.question_id: 1}
    for reply in post_all(adapter, RECORDED["requests"][:2]):
        assert (reply.status_code, reply.json()) == (503, {"error": "no score: scorer_failed"})


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[]", 400),
        (b'{"query": ["a"], "prompts": [], "labels": ["1"]}', 400),
        (b'{"query": ["abc"], "prompts": ["xyz"], "labels": ["1"]}', 400),
    ],
)
def test_what_is_no_request_of_openrlhf_is_refused(adapter: Adapter, body: bytes, status: int) -> None:
    reply = httpx.post(adapter.url, content=body, trust_env=False)
    assert reply.status_code == status
    assert reply.json().keys() == {"error"}
    elsewhere = httpx.post(adapter.url.replace("get_reward", "score"), content=b"{}", trust_env=False)
    assert elsewhere.status_code == 404


@pytest.mark.parametrize(
    ("query", "prompt", "completion"),
    [
        ("Q: 2+2?\nA: 4<|im_end|>", "Q: 2+2?\nA:", " 4"),
        ("<s>Q: 2+2?\nA: 4</s>", "Q: 2+2?\nA:", " 4"),
        ("Q: 2+2? A: 4<\uff5cend\u2581of\u2581sentence\uff5c>", "Q: 2+2? A:", " 4"),
        ("is 2 < 3 | true", "is 2", " < 3 | true"),
        ("long question? A: 4", "cut off here: long question? A:", " 4"),
    ],
)
def test_the_completion_is_what_follows_the_prompt(query: str, prompt: str, completion: str) -> None:
    assert completion_of(query, prompt) == completion


def test_the_process_names_its_address_or_what_is_wrong(server: FakeRewardServer) -> None:
    command = [sys.executable, "-m", "looper_trainer.integrations.openrlhf", "--port", "0"]
    command += ["--samples-per-prompt", "2", "--collect-s", "0.1"]
    environment = os.environ | {"LOOPER_REWARD_URL": server.url, "LOOPER_REWARD_KEY": "wrong"}
    refused = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error: ")
    assert "check LOOPER_REWARD_KEY" in refused.stderr
    environment["LOOPER_REWARD_KEY"] = "k"
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/get_reward", url)
        reply = httpx.post(url, json={"query": ["q a"], "prompts": ["q"], "labels": ["1"]}, trust_env=False)
        assert reply.status_code in (200, 503)
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()

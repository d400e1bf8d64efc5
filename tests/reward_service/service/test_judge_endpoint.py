"""The judge's endpoint over real HTTP: what is sent, what is tried again, and that no verdict is no score."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from regime_w import llm_judge
from regime_w.judges import JudgeError
from regime_w.llm_judge import SCHEMA, Prompt
from reward_service import auth
from reward_service.app import create_app, load_scorer
from reward_service.auth import Scope
from reward_service.errors import StartError
from reward_service.judge_endpoint import JudgeEndpoint
from reward_service.logs import SafeFormatter
from reward_service.settings import Settings, load_settings_of

from .openai_server import TinyGenerator

PROMPTS = [Prompt("system", f"user {i}") for i in range(6)]


def verdict_of(body: dict[str, Any]) -> str:
    """Consistent, unless a solution is one of the controls."""
    user = body["messages"][1]["content"]
    control = any(llm_judge.quoted(text) in user for text in llm_judge._CONTROLS)
    return json.dumps({"verdict": "inconsistent" if control else "consistent"})


@pytest.fixture
def server() -> Iterator[TinyGenerator]:
    with TinyGenerator(verdict_of) as running:
        yield running


@pytest.fixture
def endpoint(server: TinyGenerator) -> Iterator[JudgeEndpoint]:
    opened = JudgeEndpoint(server.url, "judge-7b", key="k", concurrency=3, sleep=lambda seconds: None)
    yield opened
    opened.close()


def test_a_request_is_constrained_greedy_and_seeded(server: TinyGenerator, endpoint: JudgeEndpoint) -> None:
    assert endpoint.replies_to(PROMPTS[:1], SCHEMA) == ['{"verdict": "consistent"}']
    assert server.requests == [
        {
            "model": "judge-7b",
            "messages": [{"role": "system", "content": "system"}, {"role": "user", "content": "user 0"}],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "verdict", "strict": True, "schema": SCHEMA},
            },
            "temperature": 0.0,
            "seed": 1,
            "max_tokens": 32,
            "n": 1,
        }
    ]
    assert server.keys == ["Bearer k"]


def test_replies_come_in_the_order_of_the_prompts_and_so_many_at_a_time(
    server: TinyGenerator, endpoint: JudgeEndpoint
) -> None:
    together = threading.Barrier(3)

    def slow(body: dict[str, Any]) -> str:
        together.wait(10)  # three are under way at once
        return str(body["messages"][1]["content"])

    server.write = slow
    assert endpoint.replies_to(PROMPTS, SCHEMA) == [prompt.user for prompt in PROMPTS]
    assert server.most_in_flight == 3


@pytest.mark.parametrize("fault", ["500", "nonsense"])
def test_what_may_pass_is_tried_again_and_then_is_no_verdict(
    server: TinyGenerator, endpoint: JudgeEndpoint, fault: str
) -> None:
    server.faults = [fault, fault]
    assert endpoint.replies_to(PROMPTS[:1], SCHEMA) == ['{"verdict": "consistent"}']
    server.faults = [fault] * 3
    with pytest.raises(JudgeError):
        endpoint.replies_to(PROMPTS[:1], SCHEMA)
    assert len(server.requests) == 6


def test_a_refusal_is_not_tried_again(server: TinyGenerator, endpoint: JudgeEndpoint) -> None:
    server.faults = ["400"]
    with pytest.raises(JudgeError):
        endpoint.replies_to(PROMPTS[:1], SCHEMA)
    assert len(server.requests) == 1


def test_a_server_that_is_away_is_no_verdict() -> None:
    endpoint = JudgeEndpoint("http://127.0.0.1:1", "m", sleep=lambda seconds: None)
    with pytest.raises(JudgeError):
        endpoint.replies_to(PROMPTS, SCHEMA)
    endpoint.close()


def test_nothing_of_prompts_and_replies_is_logged(
    server: TinyGenerator, endpoint: JudgeEndpoint, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    logging.getLogger("httpcore").setLevel(logging.WARNING)
    server.faults = ["500", "nonsense", "400"]
    with pytest.raises(JudgeError):
        endpoint.replies_to([Prompt("open", "sesame")], SCHEMA)
    assert "judge" in caplog.text
    assert "sesame" not in caplog.text
    assert all("sesame" not in str(vars(record)) for record in caplog.records)


# --- in the service -----------------------------------------------------------------------------------


def write_settings(home: Path, url: str, **more: Any) -> Settings:
    rows = [f'judge_url = "{url}"', *(f"{name} = {json.dumps(value)}" for name, value in more.items())]
    scorer = ["[scorer]", 'judge = "llm"', 'judge_model = "judge-7b"', 'embedding_device = "cpu"']
    (home / "settings.toml").write_text("\n".join([*rows, *scorer]))
    return load_settings_of(home)


MESSAGE = {
    "run_id": "r",
    "step": 0,
    "purpose": "train",
    "disclosure": "components",
    "questions": [
        {
            "id": "q",
            "question": "What is 3 + 5?",
            "gold_answer": "8",
            "arms": [
                {"id": "a", "full_text": "Three and five are eight.\n#### 8"},
                {"id": "b", "full_text": "Count on from five.\n#### 8"},
            ],
        }
    ],
}


@pytest.mark.anyio
async def test_a_service_judges_by_its_endpoint_and_fails_what_gets_no_verdict(
    home: Path, server: TinyGenerator
) -> None:
    settings = write_settings(home, server.url, judge_attempts=1)
    key = auth.create_key(home, "r", [Scope.SCORE_REWARD, Scope.SCORE_COMPONENTS])
    app = create_app(settings)
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client,
    ):
        assert (await client.get("/readyz", headers=headers)).status_code == 200
        server.write = lambda body: "I would rather not say."
        (result,) = (await client.post("/v1/score", json=MESSAGE, headers=headers)).json()["results"]
        assert result == {
            "id": "q",
            "status": "failed",
            "error": {"code": "scorer_failed", "retryable": True},
        }
        server.write = verdict_of
        (result,) = (await client.post("/v1/score", json=MESSAGE, headers=headers)).json()["results"]
        assert result["status"] == "scored"
        assert result["scores"]["s_cf"] == 1.0  # the equations judge, without one equation, would say 0


@pytest.mark.anyio
async def test_a_service_whose_judge_is_away_is_not_ready_and_names_it_in_its_log(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = write_settings(home, "http://127.0.0.1:1", judge_attempts=1)
    key = auth.create_key(home, "r", [Scope.SCORE_REWARD])
    app = create_app(settings)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client,
    ):
        reply = await client.get("/readyz", headers={"authorization": f"Bearer {key}"})
    assert reply.status_code == 503
    assert "judge" not in reply.text
    assert app.state.service.readiness.reason == "scoring the golden question failed"
    lines = [json.loads(SafeFormatter().format(record)) for record in caplog.records]
    (line, *_) = [line for line in lines if line["event"] == "the judge did not answer"]
    assert (line["server"], line["reason"]) == ("http://127.0.0.1:1", "ConnectError")


def test_an_llm_judge_without_an_address_does_not_start(home: Path) -> None:
    (home / "settings.toml").write_text('[scorer]\njudge = "llm"\njudge_model = "m"\n')
    with pytest.raises(StartError, match="judge_url"):
        load_scorer(load_settings_of(home))


@pytest.mark.parametrize("judge", ["nli", "llm"])
def test_a_judge_without_a_model_is_refused_in_one_line(home: Path, judge: str) -> None:
    (home / "settings.toml").write_text(f'[scorer]\njudge = "{judge}"\n')
    with pytest.raises(StartError, match="judge_model") as caught:
        load_settings_of(home)
    assert "\n" not in str(caught.value)


def test_an_nli_judge_that_is_nowhere_does_not_start(home: Path) -> None:
    (home / "settings.toml").write_text(
        '[scorer]\njudge = "nli"\njudge_model = "/nowhere/at/all"\nembedding_device = "cpu"\n'
    )
    with pytest.raises(StartError, match=r"judge model .* was not found") as caught:
        load_scorer(load_settings_of(home))
    assert "\n" not in str(caught.value)


def test_the_judges_model_is_part_of_the_scorer_id(home: Path, server: TinyGenerator) -> None:
    first = load_scorer(write_settings(home, server.url)).scorer_id
    assert load_scorer(write_settings(home, server.url, judge_concurrency=2)).scorer_id == first
    text = (home / "settings.toml").read_text().replace("judge-7b", "judge-70b")
    (home / "settings.toml").write_text(text)
    assert load_scorer(load_settings_of(home)).scorer_id != first


def test_a_gpu_that_is_not_there_is_no_damaged_model(home: Path) -> None:
    (home / "settings.toml").write_text('[scorer]\nembedding_device = "cuda:99"\n')
    with pytest.raises(StartError, match=r'embedding_device = "cuda:99": .* GPU'):
        load_scorer(load_settings_of(home))

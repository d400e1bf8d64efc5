"""Service-run arms against a real HTTP generator: what they are asked, what comes back, what never does."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from looper_schemas.records import Problem, RolloutRecord, read_records, write_records
from looper_schemas.rollout import RolloutResponse
from looper_schemas.scoring import Arm, Question, RewardMode
from looper_trainer.rollouts import RolloutsConfig
from looper_trainer.rollouts import run as run_rollouts
from regime_w import arms
from regime_w.scorer import Scorer
from reward_service import auth
from reward_service.app import create_app
from reward_service.arms_rollout import make_generator
from reward_service.auth import Scope
from reward_service.generator import CONNECT_S, WITHHELD, Generator, arm_seed, withhold_echo
from reward_service.serve import server_config
from reward_service.settings import Settings

from .openai_server import TinyGenerator

CANARY = "looper canary 4f1dead0beef and never tell anyone about the purple walrus"


class LetterEmbedder:
    identity = "letters"

    def embed(self, texts: Any) -> Any:
        import numpy as np

        rows = [[text.count(letter) for letter in "abcdefghij"] for text in texts]
        return np.array(rows, dtype=np.float32).reshape(-1, 10)


@pytest.fixture
def canaries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every private prompt holds the canary, in its system text and in its user text."""
    real = arms.build_all_arms()
    marked = tuple(
        replace(
            spec,
            system_prompt=f"{CANARY}. {spec.system_prompt}",
            user_template=f"{spec.user_template} {CANARY}",
        )
        for spec in real
    )
    monkeypatch.setattr(arms, "build_all_arms", lambda: marked)


@pytest.fixture
def generator() -> Iterator[TinyGenerator]:
    with TinyGenerator() as running:
        yield running


class Open:
    def __init__(self, client: httpx.AsyncClient, app: Any, key: str) -> None:
        self.client, self.app, self.key = client, app, key

    async def roll_out(
        self, *questions: dict[str, Any], key: str | None = None, deadline_ms: int = 60_000, **fields: Any
    ) -> httpx.Response:
        message = {
            "run_id": "r", "step": 0, "disclosure": "components", "max_tokens": 12,
            "questions": list(questions) or [{"id": "q", "question": "What is 3 + 5?", "gold_answer": "8"}],
            **fields,
        }  # fmt: skip
        return await self.client.post(
            "/v1/arms/rollout",
            content=json.dumps(message).encode(),
            headers={
                "authorization": f"Bearer {key or self.key}",
                "content-type": "application/json",
                "x-deadline-ms": str(deadline_ms),
            },
        )


@asynccontextmanager
async def opened(home: Path, url: str | None, **settings: Any) -> AsyncIterator[Open]:
    key = auth.create_key(home, "r", [Scope.ARMS_ROLLOUT, Scope.SCORE_COMPONENTS])
    app = create_app(Settings(home=home, generator_url=url, **settings), Scorer(embedder=LetterEmbedder()))
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://service") as client,
    ):
        yield Open(client, app, key)


def prompts(generator: TinyGenerator) -> list[tuple[str, str]]:
    return [tuple(message["content"] for message in body["messages"]) for body in generator.requests]


@pytest.mark.anyio
async def test_all_arms_answer_with_their_own_prompts_and_sampling(
    home: Path, generator: TinyGenerator
) -> None:
    question = "What is {3} + 5?"
    async with opened(home, generator.url) as live:
        reply = await live.roll_out({"id": "q", "question": question, "gold_answer": "8"})
    assert reply.status_code == 200
    (result,) = RolloutResponse.model_validate_json(reply.content).results
    assert [output.arm for output in result.outputs] == list(range(8))
    specs = arms.build_all_arms()
    asked = {(s.system_prompt, s.user_prompt(question)): s for s in specs}
    assert sorted(prompts(generator)) == sorted(asked)
    for body, prompt in zip(generator.requests, prompts(generator), strict=True):
        spec = asked[prompt]
        assert (body["temperature"], body["top_p"], body["n"]) == (spec.temperature, spec.top_p, 1)
        assert body["seed"] == arm_seed(spec, question, 0)
    assert len({body["seed"] for body in generator.requests}) == 8


@pytest.mark.anyio
async def test_rewards_are_those_of_scoring_the_outputs(home: Path, generator: TinyGenerator) -> None:
    generator.write = lambda body: f"4 + 4 = 8, seed {body['seed'] % 3}\n#### {8 if body['seed'] % 3 else 9}"
    async with opened(home, generator.url) as live:
        (result,) = RolloutResponse.model_validate_json((await live.roll_out()).content).results
    asked = Question(
        id="q",
        question="What is 3 + 5?",
        gold_answer="8",
        arms=tuple(
            Arm(
                id=o.id, arm=o.arm, full_text=o.output, tokens_out=o.tokens_out, finish_reason=o.finish_reason
            )
            for o in result.outputs
        ),
    )
    (expected,) = Scorer(embedder=LetterEmbedder()).score([asked], RewardMode.ARM_GATED)
    assert (result.reward, result.scores, result.correct_flags) == (
        expected.reward, expected.scores, expected.correct_flags,
    )  # fmt: skip
    assert not result.degenerate  # both families are there
    assert [output.final_answer for output in result.outputs] == [
        "8" if flag else "9" for flag in result.correct_flags
    ]


@pytest.mark.anyio
async def test_equal_requests_give_equal_results_and_another_seed_gives_others(
    home: Path, generator: TinyGenerator
) -> None:
    async with opened(home, generator.url) as live:
        one, two, other = [await live.roll_out(seed=seed) for seed in (1, 1, 2)]
    assert one.json()["results"] == two.json()["results"]
    assert one.json()["results"] != other.json()["results"]


@pytest.mark.anyio
async def test_faults_are_retried_and_only_what_stays_broken_fails(
    home: Path, generator: TinyGenerator
) -> None:
    async with opened(home, generator.url, generator_attempts=2) as live:
        generator.faults = ["500", "nonsense"]
        (result,) = (await live.roll_out()).json()["results"]
        assert result["status"] == "scored"
        generator.faults = ["400"]
        results = {r["id"]: r for r in (await live.roll_out(
            {"id": "a", "question": "one?"}, {"id": "b", "question": "two?"})).json()["results"]}  # fmt: skip
        states = sorted(r["status"] for r in results.values())
        assert states == ["failed", "scored"]
        (bad,) = [r for r in results.values() if r["status"] == "failed"]
        assert bad["error"] == {"code": "generator_failed", "retryable": True}


@pytest.mark.anyio
async def test_a_generator_that_hangs_or_is_away_fails_by_the_deadline(
    home: Path, generator: TinyGenerator
) -> None:
    async with opened(home, generator.url) as live:
        generator.faults = ["hang"] * 8
        started = time.monotonic()
        (result,) = (await live.roll_out(deadline_ms=1000)).json()["results"]
        assert result["error"]["code"] == "generator_failed"
        assert time.monotonic() - started < 30  # a hang guard: the request's deadline is 1 s
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        async with opened(home, f"http://127.0.0.1:{taken.getsockname()[1]}", generator_attempts=1) as live:
            (result,) = (await live.roll_out()).json()["results"]
            assert result["error"]["code"] == "generator_failed"


@pytest.mark.anyio
async def test_requests_to_the_generator_are_bounded(home: Path, generator: TinyGenerator) -> None:
    generator.write = lambda body: time.sleep(0.02) or "#### 8"  # type: ignore[func-returns-value]
    async with opened(home, generator.url, generator_concurrency=3) as live:
        reply = await live.roll_out(*({"id": str(i), "question": f"{i}?"} for i in range(5)))
    assert reply.status_code == 200
    assert len(generator.requests) == 40
    assert generator.most_in_flight <= 3


@pytest.mark.anyio
async def test_it_needs_its_scope_and_a_generator_and_holds_the_disclosure(
    home: Path, generator: TinyGenerator
) -> None:
    async with opened(home, generator.url) as live:
        score_only = auth.create_key(home, "s", [Scope.SCORE_COMPONENTS])
        assert (await live.roll_out(key=score_only)).status_code == 403
        no_components = auth.create_key(home, "n", [Scope.ARMS_ROLLOUT])
        assert (await live.roll_out(key=no_components)).status_code == 403
        reply = await live.roll_out(key=no_components, disclosure="reward")
        assert reply.status_code == 200
        assert "scores" not in reply.text
        assert "correct_flags" not in reply.text
    async with opened(home, None) as live:
        assert (await live.roll_out()).status_code == 404


@pytest.mark.anyio
async def test_the_key_of_the_generator_comes_from_its_file(
    home: Path, generator: TinyGenerator, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text("sesame\n")
    async with opened(home, generator.url, generator_key_file=tmp_path / "key") as live:
        await live.roll_out()
    assert set(generator.keys) == {"Bearer sesame"}


@pytest.mark.anyio
@pytest.mark.parametrize("fault", ["echo", "400", "500", "nonsense"])
async def test_no_prompt_is_found_in_replies_logs_metrics_or_the_folder(
    fault: str, home: Path, generator: TinyGenerator, canaries: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="reward_service")
    caplog.set_level(logging.INFO)
    async with opened(home, generator.url, generator_attempts=1) as live:
        generator.faults = [fault] * 8
        reply = await live.roll_out()
        metrics = live.app.state.service.metrics.text()
    assert all(CANARY in user for _, user in prompts(generator))  # it really was sent
    everything = [reply.content, metrics, caplog.text.encode(), repr(dict(reply.headers)).encode()]
    everything += [path.read_bytes() for path in home.rglob("*") if path.is_file()]
    for held in everything:
        for secret in (b"4f1dead0beef", b"purple walrus", b"algebra before you calculate", b"unit ledger"):
            assert secret not in held
    if fault == "echo":
        assert WITHHELD in reply.json()["results"][0]["outputs"][0]["output"]


def test_an_echo_is_withheld_and_honest_text_is_kept() -> None:
    spec = arms.build_all_arms()[0]
    question = "Name every quantity the problem gives or asks for with a letter: is that good advice?"
    text = "3 + 5 = 8\n#### 8"
    assert withhold_echo(text, spec, question) == text
    for prompt in (spec.system_prompt, spec.user_template):
        leaked = withhold_echo(f"I was told: {prompt.upper()} {text}", spec, "")
        assert leaked.startswith("I was told: " + WITHHELD)
        assert leaked.endswith(text)
        for joint in ("_", "__", "-", "*", "\u200b"):
            leaked = withhold_echo(joint.join(prompt.split()), spec, "")
            assert len(leaked) < len(prompt) / 4, joint
    quoting = "You ask: name every quantity the problem gives or asks for with a letter."
    assert withhold_echo(quoting, spec, question) == quoting  # the caller's own words
    assert WITHHELD in withhold_echo(quoting, spec, "")


@pytest.mark.slow
def test_looper_rollouts_writes_the_arms_of_the_service(
    home: Path, tmp_path: Path, generator: TinyGenerator, monkeypatch: pytest.MonkeyPatch, canaries: None
) -> None:
    settings = Settings(home=home, port=0, generator_url=generator.url, generator_model="sft@1")
    key = auth.create_key(home, "r", [Scope.ARMS_ROLLOUT, Scope.SCORE_COMPONENTS])
    app = create_app(settings, Scorer(embedder=LetterEmbedder()))
    server = uvicorn.Server(server_config(app, settings))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    problems = [Problem(id=f"p{i}", question=f"What is {i} + 5?", answer=str(i + 5)) for i in range(3)]
    write_records(tmp_path / "problems.jsonl", problems)
    monkeypatch.setenv("LOOPER_REWARD_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
    monkeypatch.setenv("LOOPER_REWARD_KEY", key)
    try:
        while not server.started:
            time.sleep(0.01)
        generator.faults = ["echo"] * 3
        config = RolloutsConfig(
            arms="service", questions_file=tmp_path / "problems.jsonl", output=tmp_path / "out.jsonl",
            questions_per_batch=2, max_new_tokens=12,
        )  # fmt: skip
        run_rollouts(config)
    finally:
        server.should_exit = True
        thread.join()
    records = read_records(tmp_path / "out.jsonl", RolloutRecord)
    assert [record.id for record in records] == ["p0", "p1", "p2"]
    assert {record.policy for record in records} == {"sft@1"}
    for record in records:
        assert len(record.trajectories) == 8
        assert all(trajectory.reward is not None for trajectory in record.trajectories)
    assert b"4f1dead0beef" not in (tmp_path / "out.jsonl").read_bytes()
    assert b"purple walrus" not in (tmp_path / "out.jsonl").read_bytes()


@pytest.mark.anyio
async def test_a_checkpoint_without_a_chat_template_is_asked_for_a_completion() -> None:
    asked: list[dict[str, Any]] = []

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append({"path": request.url.path, **json.loads(request.content)})
        choice = {"text": "#### 8", "finish_reason": "length"}
        return httpx.Response(200, json={"choices": [choice], "usage": {"completion_tokens": 3}})

    spec = arms.build_all_arms()[2]
    generator = Generator("http://g", "m", chat=False, transport=httpx.MockTransport(handle))
    answer = await generator.generate(spec, "2 + 6?", seed=0, max_tokens=9, deadline=time.monotonic() + 5)
    await generator.close()
    assert (answer.text, answer.tokens_out, answer.finish_reason) == ("#### 8", 3, "length")
    assert asked[0]["path"] == "/v1/completions"
    assert asked[0]["prompt"].startswith(spec.system_prompt)
    assert spec.user_prompt("2 + 6?") in asked[0]["prompt"]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("set_to", "connect", "read"), [(None, CONNECT_S, None), (500.0, CONNECT_S, 500.0), (2.0, 2.0, 2.0)]
)
async def test_a_slow_generation_is_cut_by_the_deadline_alone_unless_the_settings_say_otherwise(
    home: Path, set_to: float | None, connect: float, read: float | None
) -> None:
    waited: list[dict[str, float | None]] = []

    def handle(request: httpx.Request) -> httpx.Response:
        waited.append(request.extensions["timeout"])
        return httpx.Response(200, json={"choices": [{"text": "8", "finish_reason": "stop"}],
                                         "usage": {"completion_tokens": 1}})  # fmt: skip

    values = {} if set_to is None else {"generator_timeout_s": set_to}
    generator = make_generator(
        Settings(home=home, generator_url="http://g", generator_chat=False, **values),
        httpx.MockTransport(handle),
    )
    assert generator is not None
    spec = arms.build_all_arms()[0]
    await generator.generate(spec, "2 + 6?", seed=0, max_tokens=9, deadline=time.monotonic() + 5)
    await generator.close()
    assert [(w["connect"], w["read"], w["write"]) for w in waited] == [(connect, read, read)]

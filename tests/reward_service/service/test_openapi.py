"""The document against the service it describes: its routes, and replies checked by a schema library."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from reward_service.app import create_app
from reward_service.openapi import document
from reward_service.settings import Settings

from .openai_server import TinyGenerator
from .test_arms_rollout import LetterEmbedder, Scorer, auth, opened


@pytest.fixture
def generator() -> Iterator[TinyGenerator]:
    with TinyGenerator(lambda body: "3 + 5 = 8\n#### 8") as running:
        yield running


def validator_of(described: dict[str, Any], schema: dict[str, Any]) -> Any:
    jsonschema_rs = pytest.importorskip("jsonschema_rs")
    return jsonschema_rs.Draft202012Validator({**schema, "components": described["components"]})


@pytest.mark.parametrize("url", [None, "http://127.0.0.1:1"])
def test_the_document_has_the_routes_of_the_service(home: Path, url: str | None) -> None:
    auth.create_key(home, "k", [auth.Scope.SCORE_REWARD])
    settings = Settings(home=home, generator_url=url)
    app = create_app(settings, Scorer(embedder=LetterEmbedder()))
    served = {
        (route.path, method.lower())
        for route in app.routes
        for method in route.methods or ()  # type: ignore[attr-defined]
    }
    described = document(settings)["paths"]
    assert {(path, method) for path, methods in described.items() for method in methods} == served
    assert ("/v1/arms/rollout" in described) is (url is not None)


@pytest.mark.anyio
@pytest.mark.parametrize("disclosure", ["reward", "components"])
@pytest.mark.parametrize("fault", [None, "400"])
async def test_replies_of_the_arms_route_are_as_described(
    home: Path, generator: TinyGenerator, disclosure: str, fault: str | None
) -> None:
    described = document(Settings(home=home, generator_url=generator.url))
    route = described["paths"]["/v1/arms/rollout"]["post"]
    generator.faults = [fault] if fault else []
    async with opened(home, generator.url) as live:
        reply = await live.roll_out(disclosure=disclosure)
    assert reply.status_code == 200
    assert reply.json()["results"][0]["status"] == ("failed" if fault else "scored")
    valid = validator_of(described, route["responses"]["200"]["content"]["application/json"]["schema"])
    valid.validate(reply.json())
    assert not valid.is_valid({**reply.json(), "prompt": "x"})


@pytest.mark.anyio
async def test_requests_are_taken_as_described(home: Path, generator: TinyGenerator) -> None:
    settings = Settings(home=home, generator_url=generator.url, max_questions=2, max_text_chars=50)
    described = document(settings)
    route = described["paths"]["/v1/arms/rollout"]["post"]
    valid = validator_of(described, route["requestBody"]["content"]["application/json"]["schema"])
    good = {"id": "q", "question": "What is 3 + 5?"}
    async with opened(home, generator.url, max_questions=2, max_text_chars=50) as live:
        for change, status in (
            ({}, 200),
            ({"seed": -1}, 422),
            ({"max_tokens": 0}, 422),
            ({"arms": 8}, 422),
            ({"questions": []}, 422),
            ({"questions": [good, {**good, "id": "r"}, {**good, "id": "s"}]}, 413),
            ({"questions": [{**good, "question": "x" * 51}]}, 413),
        ):
            message = {
                "run_id": "r",
                "step": 0,
                "disclosure": "components",
                "max_tokens": 12,
                "questions": [good],
                **change,
            }
            reply: httpx.Response = await live.client.post(
                "/v1/arms/rollout",
                content=json.dumps(message),
                headers={"authorization": f"Bearer {live.key}", "content-type": "application/json"},
            )
            assert reply.status_code == status
            assert valid.is_valid(message) is (status == 200)
            content = route["responses"][str(status)]["content"]
            ((kind, body),) = content.items()
            assert reply.headers["content-type"].startswith(kind)
            validator_of(described, body["schema"]).validate(reply.json())

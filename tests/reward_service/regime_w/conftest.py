"""Real models and real solutions for the tests that need them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from regime_w.embedding import TransformerEmbedder

MODEL = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture(scope="session")
def float32_embedder() -> TransformerEmbedder:
    return TransformerEmbedder(MODEL, backend="float32", device="cpu", streams=1)


@pytest.fixture(scope="session", params=["packed-float32", "packed-bf16", "packed-int16", "packed-int8"])
def packed_embedder(request: pytest.FixtureRequest) -> TransformerEmbedder:
    if "int" in request.param:
        pytest.importorskip("numba")
    return TransformerEmbedder(MODEL, backend=request.param, device="cpu", streams=2)


@pytest.fixture(scope="session")
def fixed_embedder() -> TransformerEmbedder:
    return TransformerEmbedder(MODEL, backend="fixed-float32", device="cpu", streams=1)


@pytest.fixture(scope="session")
def real_questions() -> list[dict[str, Any]]:
    """657 questions with 4 labelled solutions each; see `LOOPER_DATA`."""
    beside_the_repository = Path(__file__).parents[4] / "shared" / "data"
    folder = Path(os.environ.get("LOOPER_DATA") or beside_the_repository)
    path = folder / "model_solutions" / "half.jsonl"
    if not path.is_file():
        pytest.skip("no model_solutions/half.jsonl: set LOOPER_DATA to the folder that holds model_solutions")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

"""Every number that scoring depends on, in one frozen object.

A `Scorer` digests these settings into its `scorer_id`, so that two services with different settings can
never be mistaken for each other.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

UnitFloat = Annotated[float, Field(ge=0.0, le=1.0)]


EmbeddingBackend = Literal[
    "auto",
    "float32",
    "packed-float32",
    "packed-bf16",
    "packed-int16",
    "packed-int8",
    "fixed-float32",
]


class Frozen(BaseModel):
    """Base of the settings: immutable, closed, finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Weights(Frozen):
    """Weights of the three components in s_wm; they sum to 1."""

    end: UnitFloat = 0.4
    path: UnitFloat = 0.3
    cf: UnitFloat = 0.3

    @model_validator(mode="after")
    def _sum_to_one(self) -> Self:
        if not math.isclose(self.end + self.path + self.cf, 1.0, abs_tol=1e-9):
            raise ValueError("the weights end + path + cf must sum to 1")
        return self


class LengthPenalty(Frozen):
    """L = max(floor, -per_token * max(0, tokens - free_tokens))."""

    per_token: Annotated[float, Field(ge=0.0)] = 0.001
    free_tokens: Annotated[int, Field(ge=0)] = 512
    floor: Annotated[float, Field(le=0.0)] = -0.5


class RewardSettings(Frozen):
    """Base rewards, the weight of coherence, and the length penalty (None: off)."""

    correct: float = 1.0
    wrong: float = -0.5
    coherence: Annotated[float, Field(ge=0.0)] = 0.7
    length_penalty: LengthPenalty | None = None


# Settings that decide how fast scores come, not what they are.
FREE_SETTINGS = frozenset(
    {
        "embedding_model",  # its files are part of the embedder's identity
        "judge_model",  # its files, or its name, are part of the judge's
        "judge_cache_entries",
        "embedding_streams",
        "embedding_cache_entries",
        "arm_cache_entries",
        "arm_cache_bytes",
        "score_cache_entries",
    }
)


class RegimeWSettings(Frozen):
    """All settings of a `Scorer`.

    `copies_threshold`: two arms with at least this 5-gram Jaccard similarity are copies (None: no rule).
    `judge`: what compares arms: their equations; `nli`, a cross-encoder (`judge_model`: its folder or hub
    name); `llm`, a language model (`judge_model`: its name at the endpoint, which stands for its weights in
    the `scorer_id`: give other weights another name).
    `embedding_model`: a folder, a hub name, or the name of the model that an installed package carries.
    `embedding_backend`: see `backends.py` for what each one needs and how far it is from float32: the default
    is within .0015 in s_path, `packed-int8`, the fast mode of a CPU, within .01.
    `embedding_streams`: threads that embed (None: one a usable core, one on a GPU); as many are the `nli`
    judge's.
    `*_cache_*`: bounds of what is remembered; no value depends on them, so they are not in the `scorer_id`.
    """

    weights: Weights = Weights()
    reward: RewardSettings = RewardSettings()
    copies_threshold: Annotated[float, Field(gt=0.0, le=1.0)] | None = 0.9
    judge: Literal["equations", "nli", "llm"] = "equations"
    judge_model: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    judge_cache_entries: Annotated[int, Field(ge=0)] = 65_536
    embedding_model: Annotated[str, Field(min_length=1)] = "sentence-transformers/all-MiniLM-L6-v2"
    embedding_backend: EmbeddingBackend = "auto"
    embedding_device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$")] = "auto"
    embedding_streams: Annotated[int, Field(ge=1, le=256)] | None = None
    embedding_cache_entries: Annotated[int, Field(ge=0)] = 20_000
    arm_cache_entries: Annotated[int, Field(ge=0)] = 20_000
    arm_cache_bytes: Annotated[int, Field(ge=0)] = 2**27
    score_cache_entries: Annotated[int, Field(ge=0)] = 8_192

    @model_validator(mode="after")
    def _judge_has_its_model(self) -> Self:
        if (self.judge_model is None) is not (self.judge == "equations"):
            raise ValueError("judge_model goes with the judges nli and llm, which need it")
        return self

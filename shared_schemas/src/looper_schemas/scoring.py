"""Wire contract 1.0 between trainers and a coherence-reward service (`POST /v1/score`, `GET /v1/info`).

Every model is frozen, forbids unknown fields and holds finite floats only, so that a malformed message is
an error at the boundary and never a number inside a training run. Results are keyed by id: their order
carries no meaning. Bounds here are the widest any service may accept; `ServiceInfo.limits` states the
bounds of a particular one, and a client splits its batches by those.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from looper_schemas.problems import ProblemCode

CONTRACT_VERSION: Literal["1.0"] = "1.0"

MAX_QUESTIONS = 4096
MAX_ARMS = 256
MAX_TEXT_CHARS = 400_000
MAX_ID_CHARS = 200
MAX_ANSWER_CHARS = 10_000


class WireModel(BaseModel):
    """Base of every message: immutable, closed, finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


# Enumerations arrive as JSON strings; the rest of the model stays strict.
_from_json = Field(strict=False)

_UNSENDABLE = re.compile("[\x00\ud800-\udfff]")
ValueT = TypeVar("ValueT")


def clean_text(value: ValueT) -> ValueT | str:
    """`value` as the wire may carry it: in a string, NUL and lone surrogates become U+FFFD.

    Byte-level tokenizers decode some samples to such characters, and strict JSON readers refuse them.
    """
    return _UNSENDABLE.sub("\ufffd", value) if isinstance(value, str) else value


Identifier = Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS)]
Text = Annotated[str, BeforeValidator(clean_text), Field(max_length=MAX_TEXT_CHARS)]
Unit = Annotated[float, Field(ge=0.0, le=1.0)]


class Purpose(StrEnum):
    """Why scores are wanted; services may limit and log by it."""

    TRAIN = "train"
    ROLLOUT = "rollout"
    EVAL = "eval"


class RewardMode(StrEnum):
    """How one question's scores become rewards of its arms."""

    QUESTION = "question"
    ARM = "arm"
    ARM_GATED = "arm_gated"


class Disclosure(StrEnum):
    """How much a reply reveals: the reward alone, or its components too."""

    REWARD = "reward"
    COMPONENTS = "components"


class FinishReason(StrEnum):
    """Why generation of a completion ended."""

    STOP = "stop"
    LENGTH = "length"


class Arm(WireModel):
    """One answer to a question: a policy sample (`arm` is None) or a service-run arm (opaque index)."""

    id: Identifier
    arm: Annotated[int, Field(ge=0, lt=MAX_ARMS)] | None = None
    answer: Annotated[str, BeforeValidator(clean_text), Field(max_length=MAX_ANSWER_CHARS)] | None = None
    reasoning: Text | None = None
    full_text: Text | None = None
    tokens_out: Annotated[int, Field(ge=0, le=10_000_000)] | None = None
    finish_reason: Annotated[FinishReason, _from_json] | None = None

    @model_validator(mode="after")
    def _has_text(self) -> Self:
        if self.reasoning is None and self.full_text is None:
            raise ValueError("an arm needs reasoning or full_text")
        return self


class Question(WireModel):
    """A question, its gold answer where known, and the arms that answer it (possibly none)."""

    id: Identifier
    question: Text
    gold_answer: Annotated[str, Field(max_length=MAX_ANSWER_CHARS)] | None = None
    arms: Annotated[tuple[Arm, ...], Field(max_length=MAX_ARMS, strict=False)]

    @model_validator(mode="after")
    def _arm_ids_are_unique(self) -> Self:
        if len({arm.id for arm in self.arms}) != len(self.arms):
            raise ValueError("arm ids repeat")
        return self


class ScoreRequest(WireModel):
    """Body of `POST /v1/score`."""

    contract: Literal["1.0"] = CONTRACT_VERSION
    run_id: Identifier
    step: Annotated[int, Field(ge=0, le=2**53)]
    purpose: Annotated[Purpose, _from_json]
    scorer_id: Identifier | None = None
    reward_mode: Annotated[RewardMode, _from_json] = RewardMode.ARM_GATED
    disclosure: Annotated[Disclosure, _from_json] = Disclosure.REWARD
    questions: Annotated[tuple[Question, ...], Field(min_length=1, max_length=MAX_QUESTIONS, strict=False)]

    @model_validator(mode="after")
    def _question_ids_are_unique(self) -> Self:
        if len({question.id for question in self.questions}) != len(self.questions):
            raise ValueError("question ids repeat")
        return self


class Scores(WireModel):
    """The coherence components of one question; None where fewer than two arms define no pair."""

    s_end: Unit | None
    s_path: Unit | None
    s_cf: Unit | None
    s_wm: Unit


class ArmReward(WireModel):
    """The reward of one arm, keyed by the arm's id."""

    id: Identifier
    reward: float


class ScoredQuestion(WireModel):
    """A question whose every arm has a reward. `scores` and `correct_flags` need disclosure `components`."""

    id: Identifier
    status: Literal["scored"] = "scored"
    reward: float
    degenerate: bool
    scores: Scores | None = None
    correct_flags: Annotated[tuple[bool | None, ...], Field(strict=False)] | None = None
    arms: Annotated[tuple[ArmReward, ...], Field(strict=False)]


class QuestionError(WireModel):
    """Why a question has no score. It is never to be read as a reward of zero."""

    code: Annotated[ProblemCode, _from_json]
    retryable: bool


class FailedQuestion(WireModel):
    """A question that could not be scored."""

    id: Identifier
    status: Literal["failed"] = "failed"
    error: QuestionError


QuestionResult = Annotated[ScoredQuestion | FailedQuestion, Field(discriminator="status")]


class ScoreResponse(WireModel):
    """Body of a 200 reply, also when some questions failed."""

    contract: Literal["1.0"] = CONTRACT_VERSION
    request_id: Identifier
    scorer_id: Identifier
    request_digest: Identifier
    results: Annotated[tuple[QuestionResult, ...], Field(strict=False)]


class Limits(WireModel):
    """What one request to this service may hold."""

    max_questions: Annotated[int, Field(ge=1)]
    max_arms: Annotated[int, Field(ge=1)]
    max_text_chars: Annotated[int, Field(ge=1)]
    max_body_bytes: Annotated[int, Field(ge=1)]


class RewardRange(WireModel):
    """Closed interval that every reward of a mode lies in, without the optional length penalty's floor."""

    low: float
    high: float


class ServiceInfo(WireModel):
    """Body of `GET /v1/info`."""

    contract_min: Literal["1.0"] = CONTRACT_VERSION
    contract_max: Literal["1.0"] = CONTRACT_VERSION
    scorer_id: Identifier
    limits: Limits
    reward_modes: Annotated[tuple[Annotated[RewardMode, _from_json], ...], Field(strict=False)]
    ranges: dict[str, RewardRange]

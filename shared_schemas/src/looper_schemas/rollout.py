"""`POST /v1/arms/rollout` of contract 1.0: questions in; the service has its arms answer them, and scores.

The service prompts a generator of its own in as many ways as it has arms. A caller sees what each arm wrote
and its reward, under an opaque index; how an arm is prompted never leaves the service, so a stretch of text
in which a model repeats its prompt is withheld from the output.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from looper_schemas.scoring import (
    CONTRACT_VERSION,
    MAX_ANSWER_CHARS,
    MAX_ARMS,
    MAX_QUESTIONS,
    Disclosure,
    FailedQuestion,
    FinishReason,
    Identifier,
    Purpose,
    RewardMode,
    ScoredQuestion,
    Text,
    WireModel,
)

_from_json = Field(strict=False)


class OpenQuestion(WireModel):
    """A question for the service's arms, and its gold answer where known."""

    id: Identifier
    question: Annotated[Text, Field(min_length=1)]
    gold_answer: Annotated[str, Field(max_length=MAX_ANSWER_CHARS)] | None = None


class RolloutRequest(WireModel):
    """Body of `POST /v1/arms/rollout`. Equal requests have equal seeds; `seed` gives other samples."""

    contract: Literal["1.0"] = CONTRACT_VERSION
    run_id: Identifier
    step: Annotated[int, Field(ge=0, le=2**53)]
    purpose: Annotated[Purpose, _from_json] = Purpose.ROLLOUT
    scorer_id: Identifier | None = None
    reward_mode: Annotated[RewardMode, _from_json] = RewardMode.ARM_GATED
    disclosure: Annotated[Disclosure, _from_json] = Disclosure.REWARD
    seed: Annotated[int, Field(ge=0, le=2**53)] = 0
    max_tokens: Annotated[int, Field(ge=1, le=32_768)] = 512
    questions: Annotated[
        tuple[OpenQuestion, ...], Field(min_length=1, max_length=MAX_QUESTIONS, strict=False)
    ]

    @model_validator(mode="after")
    def _question_ids_are_unique(self) -> Self:
        if len({question.id for question in self.questions}) != len(self.questions):
            raise ValueError("question ids repeat")
        return self


class ArmOutput(WireModel):
    """What one arm wrote. `id` is the arm's in `ScoredQuestion.arms`, `arm` its opaque index."""

    id: Identifier
    arm: Annotated[int, Field(ge=0, lt=MAX_ARMS)]
    output: Text
    final_answer: str | None
    finish_reason: Annotated[FinishReason, _from_json]
    tokens_out: Annotated[int, Field(ge=0)]


class RolledOut(ScoredQuestion):
    """A question that every arm has answered, scored."""

    outputs: Annotated[tuple[ArmOutput, ...], Field(strict=False)]

    @model_validator(mode="after")
    def _every_arm_has_both(self) -> Self:
        if sorted(output.id for output in self.outputs) != sorted(arm.id for arm in self.arms):
            raise ValueError("outputs do not match arms")
        return self


class RolloutResponse(WireModel):
    """Body of a 200 reply, also when some questions failed. `generator` names what answered."""

    contract: Literal["1.0"] = CONTRACT_VERSION
    request_id: Identifier
    scorer_id: Identifier
    request_digest: Identifier
    generator: Identifier
    results: Annotated[
        tuple[Annotated[RolledOut | FailedQuestion, Field(discriminator="status")], ...], Field(strict=False)
    ]

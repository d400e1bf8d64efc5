"""How questions are asked: presets, prompts, sampling. A digest of all of it marks every record.

Two records may be compared, or stand in one file, only when their digests say that the same model was
asked in the same way. What cannot change an answer (batch size, device, number of questions) is not in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from looper_schemas.prompt import PROMPT_TEMPLATE, TARGET_TEMPLATE
from looper_trainer.errors import UserError


class Shot(BaseModel):
    """A worked example put before the question."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    question: str
    solution: str
    answer: str


class Settings(BaseModel):
    """Everything about asking that can change an answer, but for the model itself.

    `template` holds `{q}`; `shot_target` holds `{cot}` and `{a}`. `temperature` 0 is greedy decoding.
    `stop` strings end an answer where they first appear. `engine` runs local weights; engines round
    differently, so that greedy answers of two of them part now and then.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    preset: str = "looper"
    engine: Literal["transformers", "vllm", "vllm-in-process"] = "transformers"
    template: str = PROMPT_TEMPLATE
    chat: bool = False
    system: str | None = None
    shots: tuple[Shot, ...] = ()
    shot_target: str = " " + TARGET_TEMPLATE
    shot_separator: str = "\n\n"
    stop: tuple[str, ...] = ()
    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=0)] = 0
    dtype: str = "auto"

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if "{q}" not in self.template:
            raise ValueError("template must contain {q}, the place of the question")
        if self.system is not None and not self.chat:
            raise ValueError("a system prompt needs chat")
        return self

    def digest(self, model_identity: str) -> str:
        """SHA-256 that marks records of the model `model_identity` asked in this way."""
        # A setting that is younger than the first records counts where it is used.
        left_out = {"preset"} | ({"engine"} if self.engine == "transformers" else set())
        payload = {"model": model_identity, "settings": self.model_dump(mode="json", exclude=left_out)}
        return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()

    def question_seed(self, question_id: str, sample: int = 0) -> int:
        """The seed of one answer: the same whatever the order or number of questions and samples.

        Samples of a question have seeds that count up by one, which vLLM takes in a single request.
        """
        digest = hashlib.sha256(f"{self.seed}/{question_id}".encode()).digest()
        return int.from_bytes(digest[:6], "big") + sample

    def prompt(self, question: str) -> str:
        """The text that asks `question`, after the worked examples. In chat, the text of one user turn."""
        if self.chat:
            return self.template.replace("{q}", question)
        return "".join(self._shot(shot) for shot in self.shots) + self.template.replace("{q}", question)

    def messages(self, question: str) -> list[dict[str, str]]:
        """The conversation that asks `question`: system prompt, worked examples, question."""
        turns = [{"role": "system", "content": self.system}] if self.system is not None else []
        for shot in self.shots:
            turns.append({"role": "user", "content": self.template.replace("{q}", shot.question)})
            turns.append({"role": "assistant", "content": self._target(shot).strip()})
        return [*turns, {"role": "user", "content": self.prompt(question)}]

    def _target(self, shot: Shot) -> str:
        # One pass over the template: a "{a}" inside a solution is plain text.
        before, _, rest = self.shot_target.partition("{cot}")
        between, _, after = rest.partition("{a}")
        return before + shot.solution + between + shot.answer + after

    def _shot(self, shot: Shot) -> str:
        return self.template.replace("{q}", shot.question) + self._target(shot) + self.shot_separator


# Sources: deepseek-r1, its model card (no system prompt, T 0.6, top_p 0.95, boxed answer); platinum-official,
# the prompt column of madrylab/platinum-bench; lm-eval-cot, lm-eval's gsm8k_cot task (its eight worked
# examples are not shipped: give your own with --few-shot, from training data).
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "looper": {},
    "deepseek-r1": {
        "template": "{q}\nPlease reason step by step, and put your final answer within \\boxed{}.",
        "chat": True,
        "temperature": 0.6,
        "top_p": 0.95,
        "max_new_tokens": 16384,
    },
    "platinum-official": {
        "template": "Solve the following math word problem.\n\n{q}\n\nThink step-by-step. Then, provide the "
        'final answer as a single integer in the format "Answer: XXX" with no extra formatting.',
        "chat": True,
        "max_new_tokens": 4096,
    },
    "lm-eval-cot": {
        "template": "Q: {q}\nA:",
        "shot_target": " {cot} The answer is {a}.",
        "stop": ("Q:", "</s>", "<|im_end|>"),
    },
}


def resolve_settings(preset: str, **changes: Any) -> Settings:
    """The settings of `preset`, with those `changes` that are not None.

    Raises:
        UserError: an unknown preset or a value out of range.
    """
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    values = {
        "preset": preset,
        **PRESETS[preset],
        **{key: value for key, value in changes.items() if value is not None},
    }
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        option = "--" + "-".join(str(part) for part in first["loc"]).replace("_", "-")
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{option}: {message}" if first["loc"] else message) from None


def changed_fields(old: Settings, new: Settings) -> list[str]:
    """Names of the settings in which two runs differ."""
    return [
        name
        for name in Settings.model_fields
        if name != "preset" and getattr(old, name) != getattr(new, name)
    ]

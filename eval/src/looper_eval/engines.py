"""What answers questions: the protocol of engines, and the choice among them.

`transformers` answers in this process, in fixed batches; `vllm` through a supervised or given vLLM server;
`vllm-in-process` with vLLM's own engine; a place `URL#MODEL` is asked over OpenAI's HTTP interface. All of
them hand over each answer as soon as they have it, so that an interruption loses little.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from pydantic import BaseModel, ValidationError

from looper_eval.models import ModelSpec, locate
from looper_eval.settings import Settings
from looper_trainer.errors import UserError

if TYPE_CHECKING:
    from looper_trainer.sampling.vllm import VLLMSettings

_LOCAL = "answering with a local checkpoint needs `pip install 'looper-eval[local]'`"


class Ask(NamedTuple):
    """A question, with one seed for each answer that is wanted to it."""

    question: str
    seeds: tuple[int, ...]


class Answer(NamedTuple):
    """One completion: its text without special tokens, why it ended (None: not told), its tokens if known."""

    text: str
    finish_reason: Literal["stop", "length"] | None
    tokens_out: int | None


Answered = list[tuple[int, list[Answer]]]
"""(place of an ask, counted through all batches; its answers in the order of its seeds)."""


class Engine(Protocol):
    """Answers questions."""

    def answers(self, batches: Sequence[Sequence[Ask]]) -> Iterator[Answered]:
        """The answers to every ask, as soon as they are whole, in any order.

        An engine whose answers depend on their company (padding moves the last bits of logits) answers
        batch by batch; others take all batches as one. What was answered before a failure is handed over
        before the failure is raised.
        """
        ...

    def close(self) -> None:
        """Release the model or the connections."""
        ...


@dataclass(frozen=True)
class EngineOptions:
    """How a model is run, as far as it changes no answer beyond float rounding."""

    device: str = "auto"
    batch_size: int = 32
    vllm: dict[str, Any] = field(default_factory=dict)
    """Fields of `VLLMSettings`."""
    logs: Path | None = None
    """Folder for the log of a vLLM server of ours; without it the log goes when the server does."""


def open_engine(spec: ModelSpec, settings: Settings, options: EngineOptions) -> Engine:
    """The engine that answers for `spec`, with the model loaded.

    Raises:
        UserError: the model cannot be loaded or the endpoint is not one.
    """
    if spec.is_endpoint:
        from looper_eval.endpoint import EndpointEngine

        return EndpointEngine(spec, settings, concurrency=options.batch_size)
    try:
        if settings.engine == "transformers":
            from looper_eval.local import open_local

            return open_local(spec, settings, device=options.device, batch_size=options.batch_size)
        if settings.engine == "vllm":
            from looper_eval.served import ServedEngine

            return ServedEngine(spec, settings, vllm_settings(options, settings), options.logs)
        from looper_eval.in_process import open_in_process

        return open_in_process(spec, settings, vllm_settings(options, settings))
    except ImportError as error:
        if settings.engine == "vllm-in-process" and (error.name or "").partition(".")[0] == "vllm":
            raise UserError(
                "no vLLM in this interpreter: pip install 'looper-trainer[vllm]', or use --engine vllm "
                "with --vllm python=INTERPRETER"
            ) from None
        raise UserError(_LOCAL) from None


def require_whole(spec: ModelSpec) -> None:
    """Refuse a folder whose weights are cut short or not all there, without loading them.

    Raises:
        UserError: they are.
    """
    if spec.is_endpoint:
        return
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UserError(_LOCAL) from None
    place = locate(spec)
    files = _weights(spec, Path(place.base))
    if place.adapter and (adapter := place.adapter / "adapter_model.safetensors").exists():
        files.add(adapter)
    for file in sorted(files):
        try:
            with safe_open(file, framework="np"):
                pass
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"model {spec.name}: {file} is no whole file of weights ({error}); copy the folder again"
            ) from None


class _Index(BaseModel):
    """`model.safetensors.index.json`: which file holds which tensor."""

    weight_map: dict[str, str]


def _weights(spec: ModelSpec, folder: Path) -> set[Path]:
    """The safetensors that `transformers` reads in `folder`; others may lie beside them."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        return {whole}
    if index.exists():
        try:
            shards = _Index.model_validate_json(index.read_bytes()).weight_map.values()
        except ValidationError:
            raise UserError(
                f"model {spec.name}: {index} is no index of weights; copy the folder again"
            ) from None
        return {folder / shard for shard in shards}
    return set() if any(folder.glob("pytorch_model*.bin")) else set(folder.glob("*.safetensors"))


def vllm_settings(options: EngineOptions, settings: Settings) -> VLLMSettings:
    """vLLM's settings from `--vllm KEY=VALUE` texts.

    Raises:
        UserError: an unknown key or a value out of range.
    """
    from looper_trainer.sampling.vllm import VLLMSettings

    values: dict[str, Any] = {"max_num_seqs": 256, "connections": 256, "dtype": settings.dtype}
    for key, value in options.vllm.items():
        values[key] = tuple(value.split(",")) if key in {"urls", "extra_args"} else value
    try:
        return VLLMSettings.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"--vllm {where}: {first['msg']}") from None


def cut_at_stop(answer: Answer, stop: Sequence[str]) -> Answer:
    """`answer` up to the first stop string; a cut answer has ended, however the engine ended it."""
    places = [place for place in (answer.text.find(text) for text in stop) if place >= 0]
    return Answer(answer.text[: min(places)], "stop", answer.tokens_out) if places else answer


def encode(tokenizer: Any, settings: Settings, question: str, eos_ids: frozenset[int]) -> list[int]:
    """Token ids of the prompt that asks `question`; a chat template writes its special tokens itself."""
    ids: list[int]
    if settings.chat:
        ids = tokenizer.apply_chat_template(
            settings.messages(question), add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return ids
    ids = tokenizer(settings.prompt(question))["input_ids"]
    while len(ids) > 1 and ids[-1] in eos_ids:  # some tokenizers append EOS
        ids = ids[:-1]
    return ids


def require_chat_template(tokenizer: Any, settings: Settings) -> None:
    """Refuse chat settings for a model that has no chat template."""
    if settings.chat and not getattr(tokenizer, "chat_template", None):
        raise UserError("this model's tokenizer has no chat template; leave --chat and chat presets out")

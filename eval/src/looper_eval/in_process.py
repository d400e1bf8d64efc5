"""Answers from vLLM's engine in this process.

Every request is handed to the engine at once and its answer taken as soon as it is whole, which is what
`LLM.generate` does, only that it keeps all answers to the end.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from typing import Any

from looper_eval.engines import Answer, Answered, Ask, cut_at_stop, encode, require_chat_template
from looper_eval.models import ModelSpec, adapter_rank, locate
from looper_eval.settings import Settings
from looper_trainer.errors import CheckpointError, UserError
from looper_trainer.sampling.vllm import VLLMSettings

_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def engine_arguments(settings: VLLMSettings) -> dict[str, Any]:
    """Arguments of `vllm.LLM` that mean what `settings` mean for a server."""
    arguments: dict[str, Any] = {
        "dtype": settings.dtype,
        "seed": settings.seed,
        "max_num_seqs": settings.max_num_seqs,
    }
    if settings.gpu_memory_utilization is not None:
        arguments["gpu_memory_utilization"] = settings.gpu_memory_utilization
    if settings.max_model_len is not None:
        arguments["max_model_len"] = settings.max_model_len
    if settings.compilation == "eager":
        arguments["enforce_eager"] = True
    elif settings.compilation == "graphs":
        arguments["compilation_config"] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    return arguments


def open_in_process(spec: ModelSpec, settings: Settings, options: VLLMSettings) -> InProcessEngine:
    """The engine of the checkpoint, hub model or adapter that `spec` names.

    Raises:
        UserError: it cannot be loaded.
        ImportError: there is no vLLM in this interpreter.
    """
    # A fork of a process that has run torch can hang.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    import vllm

    place = locate(spec)
    arguments = engine_arguments(options)
    if place.adapter is not None:
        wanted = adapter_rank(place.adapter)
        rank = next((known for known in _LORA_RANKS if known >= wanted), None)
        if rank is None:
            raise UserError(f"{place.adapter}: vLLM takes ranks up to {_LORA_RANKS[-1]}, not {wanted}")
        arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}
    try:
        llm = vllm.LLM(model=place.base, **arguments)
    except (OSError, ValueError, RuntimeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
        raise CheckpointError(f"{place.base}: vLLM cannot load the model: {reason}") from None
    return InProcessEngine(llm, settings, adapter=None if place.adapter is None else str(place.adapter))


class InProcessEngine:
    """Answers from `llm`, a `vllm.LLM`; `adapter` is a folder with a LoRA adapter of its model."""

    def __init__(self, llm: Any, settings: Settings, adapter: str | None = None) -> None:
        self._llm, self._settings, self._lora = llm, settings, None
        self._tokenizer = llm.get_tokenizer()
        self._runs = 0
        require_chat_template(self._tokenizer, settings)
        if adapter is not None:
            from vllm.lora.request import LoRARequest

            self._lora = LoRARequest("adapter", 1, adapter)

    def answers(self, batches: Sequence[Sequence[Ask]]) -> Iterator[Answered]:
        """See `Engine.answers`."""
        engine, settings = self._llm.llm_engine, self._settings
        asks = [ask for batch in batches for ask in batch]
        found: list[list[Answer | None]] = [[None] * len(ask.seeds) for ask in asks]
        waiting: dict[str, tuple[int, int]] = {}
        self._runs += 1
        eos_ids = frozenset({self._tokenizer.eos_token_id})
        for place, ask in enumerate(asks):
            prompt = {"prompt_token_ids": encode(self._tokenizer, settings, ask.question, eos_ids)}
            for number, seed in enumerate(ask.seeds):
                name = f"{self._runs}-{place}-{number}"
                waiting[name] = place, number
                engine.add_request(name, prompt, self._params(seed), lora_request=self._lora)
        try:
            while engine.has_unfinished_requests():
                whole: Answered = []
                for output in _step(engine, waiting):
                    if not output.finished:
                        continue
                    place, number = waiting.pop(output.request_id)
                    found[place][number] = self._answer(output.outputs[0])
                    group = [answer for answer in found[place] if answer is not None]
                    if len(group) == len(found[place]):
                        whole.append((place, group))
                if whole:
                    yield whole
        finally:
            if waiting:
                engine.abort_request(list(waiting))

    def close(self) -> None:
        """Drop the engine, so that the next one finds its memory free."""
        del self._llm
        gc.collect()

    def _params(self, seed: int) -> Any:
        import vllm
        from vllm.sampling_params import RequestOutputKind

        settings = self._settings
        sampled = settings.temperature > 0
        return vllm.SamplingParams(
            max_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p if sampled else 1.0,
            # A seed takes each row out of the common draw on a GPU, and greedy decoding needs none.
            seed=seed if sampled else None,
            stop=list(settings.stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _answer(self, output: Any) -> Answer:
        if output.finish_reason not in ("stop", "length"):
            raise UserError(f"vLLM broke off an answer: {output.finish_reason}")
        answer = Answer(output.text, output.finish_reason, len(output.token_ids))
        return cut_at_stop(answer, self._settings.stop)


def _step(engine: Any, waiting: dict[str, tuple[int, int]]) -> Any:
    """What `engine` has after its next step.

    Raises:
        UserError: its process is dead; nothing is `waiting` any more, since nobody can be told.
    """
    try:
        return engine.step()
    except Exception as error:
        if type(error).__name__ != "EngineDeadError":
            raise
        waiting.clear()
        raise UserError(
            "vLLM's engine died, its own words stand above (often memory: lower --vllm max_num_seqs or "
            "max_model_len); the same command goes on from here"
        ) from error

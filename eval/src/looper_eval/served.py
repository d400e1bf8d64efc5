"""Answers from vLLM over HTTP, through the trainer's sampler: a server of ours, or running ones by URL.

A LoRA adapter is loaded at run time, so that one server of the base answers for base and adapters alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx

from looper_eval.engines import Answer, Answered, Ask, cut_at_stop, encode, require_chat_template
from looper_eval.models import ModelSpec, adapter_rank, locate
from looper_eval.settings import Settings
from looper_trainer.errors import UserError
from looper_trainer.sampling.base import SamplingParams
from looper_trainer.sampling.vllm import VLLMSampler, VLLMSettings


class ServedEngine:
    """Answers through `VLLMSampler`, each question as soon as it is whole.

    Without `vllm.urls` a server is started for the model, with adapters off where the model is none: they
    cost a tenth and more of the throughput. A server given by URL must serve the model's base.
    """

    def __init__(
        self, spec: ModelSpec, settings: Settings, vllm: VLLMSettings, logs: Path | None = None
    ) -> None:
        from transformers import AutoTokenizer

        place = locate(spec)
        self._settings = settings
        self._tokenizer = AutoTokenizer.from_pretrained(place.base)
        require_chat_template(self._tokenizer, settings)
        if vllm.urls:
            for url in vllm.urls:
                require_same_model(url, spec, place.base)
        elif place.adapter is None:
            vllm = vllm.model_copy(update={"extra_args": (*vllm.extra_args, "--no-enable-lora")})
        else:
            vllm = vllm.model_copy(update={"max_lora_rank": adapter_rank(place.adapter)})
        self._sampler = VLLMSampler(place.base, vllm, folder=logs)
        self._sampler.__enter__()
        try:
            if place.adapter is not None:
                self._sampler.load_adapter(place.adapter, version=1)
        except BaseException:
            self._sampler.close()
            raise

    def answers(self, batches: Sequence[Sequence[Ask]]) -> Iterator[Answered]:
        """See `Engine.answers`."""
        settings = self._settings
        asks = [ask for batch in batches for ask in batch]
        params = SamplingParams(settings.max_new_tokens, settings.temperature, settings.top_p)
        eos_ids = frozenset({self._tokenizer.eos_token_id})
        prompts = [encode(self._tokenizer, settings, ask.question, eos_ids) for ask in asks]
        for place, group in self._sampler.sample_iter(prompts, params, [ask.seeds for ask in asks]):
            yield [
                (
                    place,
                    [
                        cut_at_stop(Answer(one.text, one.finish_reason, len(one.token_ids)), settings.stop)
                        for one in group
                    ],
                )
            ]

    def close(self) -> None:
        """Stop the server if it is ours."""
        self._sampler.close()


def require_same_model(url: str, spec: ModelSpec, base: str) -> None:
    """Refuse a server that serves another model than the one whose name the records would bear.

    Raises:
        UserError: it does, or does not say what it serves.
    """
    try:
        cards = httpx.get(f"{url}/v1/models", timeout=30.0, trust_env=False).raise_for_status().json()["data"]
        served = [card for card in cards if card.get("parent") is None]
        names = {str(card.get("root") or card["id"]) for card in served} | {
            str(card["id"]) for card in served
        }
    except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--vllm urls={url}: is no vLLM server that answers: {error}") from None
    if base not in names and not any(_same_folder(base, name) for name in names):
        raise UserError(
            f"model {spec.name}: vLLM at {url} serves {', '.join(sorted(names))}, not {base}; start it on "
            "that folder, or ask it by name with --model NAME=URL/v1#MODEL"
        )


def _same_folder(first: str, second: str) -> bool:
    return Path(first).is_dir() and Path(first).resolve() == Path(second).resolve()

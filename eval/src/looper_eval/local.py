"""Answers from a `transformers` checkpoint, or a LoRA adapter over one, in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from looper_eval.engines import Answer, Answered, Ask, cut_at_stop, encode, require_chat_template
from looper_eval.models import ModelSpec, locate
from looper_eval.settings import Settings
from looper_trainer.errors import CheckpointError
from looper_trainer.sampling.base import SamplingParams
from looper_trainer.sampling.transformers import (
    TransformersSampler,
    load_pretrained,
    load_sampler,
    one_line,
    resolve_device,
    resolve_dtype,
)


def open_local(spec: ModelSpec, settings: Settings, *, device: str, batch_size: int) -> TransformersEngine:
    """The engine of the checkpoint, hub model or adapter that `spec` names.

    Raises:
        UserError: it cannot be loaded.
    """
    place = locate(spec)
    if place.adapter is None:
        sampler = load_sampler(place.base, device=device, dtype=settings.dtype, batch_size=batch_size)
        return TransformersEngine(sampler, settings)
    from peft import PeftModel

    where = resolve_device(device)
    base, tokenizer = load_pretrained(place.base, resolve_dtype(settings.dtype, where))
    try:
        model = PeftModel.from_pretrained(base, str(place.adapter))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{place.adapter}: cannot load the adapter: {one_line(error)}") from None
    return TransformersEngine(
        TransformersSampler(model.to(where).eval(), tokenizer, batch_size=batch_size), settings
    )


class TransformersEngine:
    """Answers from a sampler of this process, one batch after the other."""

    def __init__(self, sampler: TransformersSampler, settings: Settings) -> None:
        self._sampler = sampler
        self._settings = settings
        require_chat_template(sampler.tokenizer, settings)

    def answers(self, batches: Sequence[Sequence[Ask]]) -> Iterator[Answered]:
        """See `Engine.answers`."""
        settings = self._settings
        params = SamplingParams(settings.max_new_tokens, settings.temperature, settings.top_p)
        place = 0
        for batch in batches:
            prompts = [
                encode(self._sampler.tokenizer, settings, ask.question, self._sampler.eos_ids)
                for ask in batch
            ]
            groups = self._sampler.sample(prompts, params, [ask.seeds for ask in batch])
            yield [
                (
                    place + index,
                    [
                        cut_at_stop(Answer(one.text, one.finish_reason, len(one.token_ids)), settings.stop)
                        for one in group
                    ],
                )
                for index, group in enumerate(groups)
            ]
            place += len(batch)

    def close(self) -> None:
        """Drop the model, so that the next one finds its memory free."""
        del self._sampler

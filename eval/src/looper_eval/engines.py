"""Engines answer prompts: a `transformers` checkpoint in this process, or an OpenAI-compatible endpoint."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import httpx
import stamina

from looper_eval.models import ModelSpec
from looper_eval.settings import Settings
from looper_trainer.errors import UserError
from looper_trainer.sampling.base import SamplingParams

if TYPE_CHECKING:
    from looper_trainer.sampling.transformers import TransformersSampler

API_KEY_VARIABLE = "LOOPER_EVAL_API_KEY"
_ATTEMPTS = 6
_TIMEOUT = httpx.Timeout(600.0, connect=10.0)


class Answer(NamedTuple):
    """One completion: its text without special tokens, why it ended, its length in tokens where known."""

    text: str
    finish_reason: Literal["stop", "length"]
    tokens_out: int | None


class Engine(Protocol):
    """Answers one batch of questions."""

    def answer(self, questions: Sequence[str], seeds: Sequence[int]) -> list[Answer]:
        """One answer to each question, in order."""
        ...

    def close(self) -> None:
        """Release the model or the connections."""
        ...


def open_engine(spec: ModelSpec, settings: Settings, *, device: str, batch_size: int) -> Engine:
    """The engine that answers for `spec`, with the model loaded.

    Raises:
        UserError: the model cannot be loaded or the endpoint is not one.
    """
    if spec.is_endpoint:
        return EndpointEngine(spec, settings, concurrency=batch_size)
    try:
        from looper_trainer.sampling.transformers import load_sampler
    except ImportError:
        raise UserError(
            "answering with a local checkpoint needs `pip install 'looper-eval[local]'`"
        ) from None
    sampler = load_sampler(spec.place, device=device, dtype=settings.dtype, batch_size=batch_size)
    return TransformersEngine(sampler, settings)


def cut_at_stop(answer: Answer, stop: Sequence[str]) -> Answer:
    """`answer` up to the first stop string; a cut answer has ended, however the engine ended it."""
    places = [place for place in (answer.text.find(text) for text in stop) if place >= 0]
    return Answer(answer.text[: min(places)], "stop", answer.tokens_out) if places else answer


class TransformersEngine:
    """Answers from a sampler of this process."""

    def __init__(self, sampler: TransformersSampler, settings: Settings) -> None:
        self._sampler = sampler
        self._settings = settings
        if settings.chat and not getattr(sampler.tokenizer, "chat_template", None):
            raise UserError("this model's tokenizer has no chat template; leave --chat and chat presets out")

    def answer(self, questions: Sequence[str], seeds: Sequence[int]) -> list[Answer]:
        """See `Engine.answer`."""
        settings = self._settings
        params = SamplingParams(settings.max_new_tokens, settings.temperature, settings.top_p)
        groups = self._sampler.sample(
            [self._encode(text) for text in questions], params, [[seed] for seed in seeds]
        )
        answers = [Answer(one.text, one.finish_reason, len(one.token_ids)) for (one,) in groups]
        return [cut_at_stop(answer, settings.stop) for answer in answers]

    def close(self) -> None:
        """Drop the model, so that the next one finds its memory free."""
        del self._sampler

    def _encode(self, question: str) -> list[int]:
        if not self._settings.chat:
            return self._sampler.encode(self._settings.prompt(question))
        # The template writes the special tokens itself.
        ids: list[int] = self._sampler.tokenizer.apply_chat_template(
            self._settings.messages(question), add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return ids


class EndpointEngine:
    """Answers from an OpenAI-compatible server, one question a request, up to `concurrency` at a time.

    The place is `URL#MODEL`, for example `http://127.0.0.1:8000/v1#ppo`. Transport errors, 408, 429 and 5xx
    are tried again with jitter; an API key is read from the environment.
    """

    def __init__(self, spec: ModelSpec, settings: Settings, *, concurrency: int) -> None:
        url, _, model = spec.place.partition("#")
        if not model:
            raise UserError(
                f"model {spec.name}: write an endpoint as URL#MODEL, e.g. http://127.0.0.1:8000/v1#my-model"
            )
        self._spec, self._settings, self._model = spec, settings, model
        key = os.environ.get(API_KEY_VARIABLE)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(base_url=url.rstrip("/") + "/", headers=headers, timeout=_TIMEOUT)
        self._threads = ThreadPoolExecutor(max_workers=concurrency)

    def answer(self, questions: Sequence[str], seeds: Sequence[int]) -> list[Answer]:
        """See `Engine.answer`."""
        return list(self._threads.map(self._one, questions, seeds))

    def close(self) -> None:
        """Close the connections."""
        self._threads.shutdown(cancel_futures=True)
        self._client.close()

    def _one(self, question: str, seed: int) -> Answer:
        settings = self._settings
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "seed": seed % 2**31,
        }
        if settings.stop:
            body["stop"] = list(settings.stop)
        if settings.chat:
            reply = self._post("chat/completions", body | {"messages": settings.messages(question)})
        else:
            reply = self._post("completions", body | {"prompt": settings.prompt(question)})
        try:
            choice = reply["choices"][0]
            text = choice["message"]["content"] if settings.chat else choice["text"]
            tokens = reply.get("usage", {}).get("completion_tokens")
            ended: Literal["stop", "length"] = "length" if choice.get("finish_reason") == "length" else "stop"
        except (KeyError, IndexError, TypeError, AttributeError):
            raise UserError(
                f"model {self._spec.name}: the endpoint's reply is not an OpenAI completion"
            ) from None
        return cut_at_stop(
            Answer(text or "", ended, tokens if isinstance(tokens, int) else None), settings.stop
        )

    def _post(self, route: str, body: dict[str, Any]) -> Any:
        try:
            for attempt in stamina.retry_context(on=_worth_retrying, attempts=_ATTEMPTS, timeout=None):
                with attempt:
                    response = self._client.post(route, json=body)
                    response.raise_for_status()
                    return response.json()
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            raise UserError(
                f"model {self._spec.name}: the endpoint answers {status} to {error.request.url}"
            ) from None
        except (httpx.HTTPError, ValueError) as error:
            raise UserError(f"model {self._spec.name}: cannot reach {self._spec.place}: {error}") from None
        raise AssertionError("unreachable: retry_context ends by return or raise")


def _worth_retrying(error: Exception) -> bool:
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in {408, 429} or error.response.status_code >= 500
    return isinstance(error, httpx.TransportError)

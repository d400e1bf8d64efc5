"""Answers from an OpenAI-compatible server: vLLM by URL (an adapter by its name), or any other."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Literal

import httpx
import stamina

from looper_eval.engines import Answer, Answered, Ask, cut_at_stop
from looper_eval.models import ModelSpec
from looper_eval.settings import Settings
from looper_trainer.errors import UserError

API_KEY_VARIABLE = "LOOPER_EVAL_API_KEY"
_ATTEMPTS = 6
_TIMEOUT = httpx.Timeout(600.0, connect=10.0)


class EndpointEngine:
    """Answers from an OpenAI-compatible server, one answer a request, up to `concurrency` at a time.

    The place is `URL#MODEL`, for example `http://127.0.0.1:8000/v1#ppo`. Transport errors, 408, 429 and 5xx
    are tried again with jitter, which is said once until the server answers again; an API key is read from
    the environment.
    """

    def __init__(self, spec: ModelSpec, settings: Settings, *, concurrency: int) -> None:
        url, _, model = spec.place.partition("#")
        self._spec, self._settings, self._model = spec, settings, model
        self._concurrency = concurrency
        self._limit_name = "max_tokens"
        key = os.environ.get(API_KEY_VARIABLE)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        self._client = httpx.Client(
            base_url=url.rstrip("/") + "/", headers=headers, timeout=_TIMEOUT, limits=limits
        )
        self._threads = ThreadPoolExecutor(max_workers=concurrency)
        self._away = False
        logging.getLogger("stamina").addHandler(logging.NullHandler())  # it would name no endpoint

    def answers(self, batches: Sequence[Sequence[Ask]]) -> Iterator[Answered]:
        """See `Engine.answers`."""
        asks = [ask for batch in batches for ask in batch]
        found: list[list[Answer | None]] = [[None] * len(ask.seeds) for ask in asks]
        jobs = iter([(place, number) for place, ask in enumerate(asks) for number in range(len(ask.seeds))])
        running: dict[Future[Answer], tuple[int, int]] = {}
        failure: BaseException | None = None
        while True:
            while failure is None and len(running) < self._concurrency and (job := next(jobs, None)):
                place, number = job
                ask = asks[place]
                running[self._threads.submit(self._one, ask.question, ask.seeds[number])] = job
            if not running:
                break
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                place, number = running.pop(done)
                if error := done.exception():
                    failure = failure or error
                    continue
                found[place][number] = done.result()
                whole = [answer for answer in found[place] if answer is not None]
                if len(whole) == len(found[place]):
                    yield [(place, whole)]
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Close the connections."""
        self._threads.shutdown(cancel_futures=True)
        self._client.close()

    def _one(self, question: str, seed: int) -> Answer:
        settings = self._settings
        body: dict[str, Any] = {
            "model": self._model,
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
            for attempt in stamina.retry_context(on=self._tries_again, attempts=_ATTEMPTS, timeout=None):
                with attempt:
                    limit = {self._limit_name: self._settings.max_new_tokens}
                    response = self._client.post(route, json=body | limit)
                    if response.status_code == 400 and "max_completion_tokens" in response.text:
                        # Some services know the limit by its newer name only.
                        self._limit_name = "max_completion_tokens"
                        limit = {self._limit_name: self._settings.max_new_tokens}
                        response = self._client.post(route, json=body | limit)
                    response.raise_for_status()
                    self._away = False
                    return response.json()
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            raise UserError(
                f"model {self._spec.name}: the endpoint answers {status} to {error.request.url}"
            ) from None
        except (httpx.HTTPError, ValueError) as error:
            raise UserError(f"model {self._spec.name}: cannot reach {self._spec.place}: {error}") from None
        raise AssertionError("unreachable: retry_context ends by return or raise")

    def _tries_again(self, error: Exception) -> bool:
        if not _worth_retrying(error):
            return False
        if not self._away:
            self._away = True
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            print(f"model {self._spec.name}: {reason}; trying again", file=sys.stderr, flush=True)
        return True


def _worth_retrying(error: Exception) -> bool:
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in {408, 429} or error.response.status_code >= 500
    return isinstance(error, httpx.TransportError)

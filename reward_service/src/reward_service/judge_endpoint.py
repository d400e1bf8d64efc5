"""The endpoint behind the judge `llm`: an OpenAI-compatible server, asked from the scoring threads.

A scoring thread waits here; it is the judge's own threads that talk to the server, as many at a time as the
settings allow. Nothing of a prompt or a reply is logged, and no redirect or proxy is followed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

import httpx
from pydantic import ValidationError

from regime_w.judges import JudgeError
from regime_w.llm_judge import Prompt
from reward_service.errors import StartError
from reward_service.generator import (
    MOST_REPLY_BYTES,
    Completion,
    connection,
    may_do_better,
    read_key,
    wait_before,
)
from reward_service.settings import Settings

logger = logging.getLogger(__name__)

_MOST_TOKENS = 32  # a verdict has a dozen
_SEED = 1
_FIRST_WAIT_S = 0.25


class JudgeEndpoint:
    """Answers of one model on one server; safe to call from many threads.

    Args:
        url: base address, without /v1.
        model: its name there, which stands for its weights in `identity`.
        key: bearer key of the server, if it wants one.
        concurrency: requests at a time.
        timeout_s: of one attempt.
        attempts: how often a request is made at most.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None = None,
        concurrency: int = 32,
        timeout_s: float = 30.0,
        attempts: int = 3,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.identity = f"openai|{model}|{_SEED}|{_MOST_TOKENS}"
        self.concurrency = concurrency
        self._url = url
        self._model = model
        self._attempts = attempts
        self._sleep = sleep
        self._pool = ThreadPoolExecutor(concurrency, "judge")
        self._http = httpx.Client(**connection(url, key, concurrency), timeout=timeout_s)

    def close(self) -> None:
        """End the threads and close the connections."""
        self._pool.shutdown(cancel_futures=True)
        self._http.close()

    def replies_to(self, prompts: Sequence[Prompt], schema: dict[str, Any]) -> list[str]:
        """The reply to every prompt, in order; once one has none, the others are not waited for.

        Raises:
            JudgeError: the server is away, refuses, or answers nonsense.
        """
        waiting = [self._pool.submit(self._answer, prompt, schema) for prompt in prompts]
        try:
            done, _ = wait(waiting, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            return [future.result() for future in waiting]
        finally:
            for future in waiting:
                future.cancel()

    def _answer(self, prompt: Prompt, schema: dict[str, Any]) -> str:
        body = {
            "model": self._model,
            "messages": [
                {"role": "system", "content": prompt.system},
                {"role": "user", "content": prompt.user},
            ],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "verdict", "strict": True, "schema": schema},
            },
            "temperature": 0.0,
            "seed": _SEED,
            "max_tokens": _MOST_TOKENS,
            "n": 1,
        }
        for attempt in range(self._attempts):
            if attempt:
                self._sleep(wait_before(attempt, _FIRST_WAIT_S))
            reply = self._attempt(body)
            if reply is not None:
                return reply
        raise JudgeError("the judge did not answer")

    def _attempt(self, body: dict[str, Any]) -> str | None:
        """The text of the reply; None when another attempt may do better.

        Raises:
            JudgeError: the server refuses this request, and would again.
        """
        try:
            content = bytearray()
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                status = response.status_code
                if status == 200:
                    for chunk in response.iter_bytes():
                        content += chunk
                        if len(content) > MOST_REPLY_BYTES:
                            raise JudgeError("the judge's reply is too long")
        except httpx.HTTPError as error:
            self._warn("the judge did not answer", reason=type(error).__name__)
            return None
        if status != 200:
            self._warn("the judge refused", status=status)
            if may_do_better(status):
                return None
            raise JudgeError("the judge refused")
        try:
            (choice,) = Completion.model_validate_json(bytes(content)).choices
        except ValidationError:
            self._warn("the judge's reply cannot be read")
            return None
        return "" if choice.message is None else choice.message.content or ""

    def _warn(self, event: str, **fields: object) -> None:
        logger.warning(event, extra={"server": self._url, **fields})


def make_respondent(settings: Settings) -> JudgeEndpoint | None:
    """The endpoint of the settings, if their judge is `llm`.

    Raises:
        StartError: judge_url is missing, or its key cannot be read.
    """
    if settings.scorer.judge != "llm":
        return None
    if settings.judge_url is None or settings.scorer.judge_model is None:
        raise StartError(f'scorer.judge = "llm" needs judge_url; set it in {settings.home / "settings.toml"}')
    return JudgeEndpoint(
        settings.judge_url,
        settings.scorer.judge_model,
        key=read_key(settings.judge_key_file, "judge_key_file"),
        concurrency=settings.judge_concurrency,
        timeout_s=settings.judge_timeout_s,
        attempts=settings.judge_attempts,
    )

"""Asks an OpenAI-compatible server (vLLM serving a checkpoint, say) what an arm's prompt makes of a question.

Nothing of a prompt leaves this module except to that server: no message, log or error holds any of it, and
`withhold_echo` takes out of an answer what repeats its prompt.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
from pydantic import BaseModel, Field, ValidationError

from looper_schemas.scoring import FinishReason, clean_text
from regime_w.arms import ArmSpec
from reward_service.errors import StartError

logger = logging.getLogger(__name__)

WITHHELD = "[…]"
ECHO_WORDS = 6  # as many words in a row of a prompt, not of the question, are an echo
_WORD = re.compile(r"[^\W_]+")  # an underscore joins words as a space does
_NAME = re.compile(r"\w+")
_MARK = re.compile(r"(?=\w*[0-9])(?=\w*[^\W\d_])\w{8,}")
_FIRST_WAIT_S = 0.5
CONNECT_S = 10.0  # to be connected to a server that is there
MOST_REPLY_BYTES = 2**24  # of a server's reply


class GeneratorFailed(Exception):
    """The server did not answer as it should, also when asked again."""


@dataclass(frozen=True)
class Generated:
    """What one arm wrote; `tokens_out` as the server counts."""

    text: str
    finish_reason: FinishReason
    tokens_out: int


class _Message(BaseModel):
    content: str | None = None
    reasoning_content: str | None = None  # vLLM's reasoning parsers split this off


class _Choice(BaseModel):
    message: _Message | None = None
    text: str | None = None
    finish_reason: Literal["stop", "length"]


class _Usage(BaseModel):
    completion_tokens: int = Field(ge=0)


class Completion(BaseModel):
    """A reply of an OpenAI-compatible server, as far as it is read here."""

    choices: list[_Choice] = Field(min_length=1, max_length=1)
    usage: _Usage


class Generator:
    """A client of one server, at most `concurrency` requests at a time. Belongs to one event loop.

    Args:
        url: base address, without /v1.
        model: its name there; also what a reply calls the generator.
        chat: /v1/chat/completions with a system and a user message; else /v1/completions with both texts.
        key: bearer key of the server, if it wants one.
        timeout_s: of one attempt; None: all that the question's deadline leaves. A reply comes whole, so this
            bounds a whole generation; a server that cannot be reached is given up sooner (CONNECT_S).
        attempts: how often a request is made at most.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        chat: bool = True,
        key: str | None = None,
        concurrency: int = 64,
        timeout_s: float | None = None,
        attempts: int = 3,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self._url = url
        self._chat = chat
        self._timeout = httpx.Timeout(timeout_s, connect=min(CONNECT_S, timeout_s or CONNECT_S))
        self._attempts = attempts
        self._clock = clock
        self._places = asyncio.Semaphore(concurrency)
        self._http = httpx.AsyncClient(**connection(url, key, concurrency), transport=transport)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def generate(
        self, spec: ArmSpec, question: str, *, seed: int, max_tokens: int, deadline: float
    ) -> Generated:
        """What the arm `spec` writes about `question`, by `deadline` (a time of the clock).

        Raises:
            GeneratorFailed: the server is away, refuses, or answers nonsense; or the time is up.
        """
        body = self._body(spec, question, seed, max_tokens)
        path = "/v1/chat/completions" if self._chat else "/v1/completions"
        try:
            async with asyncio.timeout(max(0.0, deadline - self._clock())), self._places:
                for attempt in range(self._attempts):
                    if attempt:
                        await asyncio.sleep(wait_before(attempt, _FIRST_WAIT_S))
                    reply = await self._attempt(path, body)
                    if reply is not None:
                        text = withhold_echo(clean_text(_text_of(reply)), spec, question)
                        finish = FinishReason(reply.choices[0].finish_reason)
                        return Generated(text, finish, reply.usage.completion_tokens)
        except TimeoutError:
            pass
        raise GeneratorFailed

    def _body(self, spec: ArmSpec, question: str, seed: int, max_tokens: int) -> dict[str, object]:
        user = spec.user_prompt(question)
        prompt: dict[str, object] = (
            {
                "messages": [
                    {"role": "system", "content": spec.system_prompt},
                    {"role": "user", "content": user},
                ]
            }
            if self._chat
            else {"prompt": f"{spec.system_prompt}\n\n{user}\n\nSolution:"}
        )
        return {
            **prompt,
            "model": self.model,
            "temperature": spec.temperature,
            "top_p": spec.top_p,
            "seed": arm_seed(spec, question, seed),
            "max_tokens": max_tokens,
            "n": 1,
        }

    async def _attempt(self, path: str, body: dict[str, object]) -> Completion | None:
        """The reply; None when another attempt may do better.

        Raises:
            GeneratorFailed: the server refuses this request, and would again.
        """
        try:
            content = bytearray()
            async with self._http.stream("POST", path, json=body, timeout=self._timeout) as response:
                status = response.status_code
                if status == 200:
                    async for chunk in response.aiter_bytes():
                        content += chunk
                        if len(content) > MOST_REPLY_BYTES:
                            raise GeneratorFailed
        except httpx.HTTPError as error:
            self._warn("the generator did not answer", reason=type(error).__name__)
            return None
        if status != 200:
            self._warn("the generator refused", status=status)
            if may_do_better(status):
                return None
            raise GeneratorFailed
        try:
            return Completion.model_validate_json(bytes(content))
        except ValidationError:
            self._warn("the generator's reply cannot be read")
            return None

    def _warn(self, event: str, **fields: object) -> None:
        logger.warning(event, extra={"server": self._url, **fields})


def connection(url: str, key: str | None, concurrency: int) -> dict[str, Any]:
    """What an HTTP client of a server at `url` is made with: its `key`, and no proxy of the environment."""
    return {
        "base_url": url,
        "headers": {"Authorization": f"Bearer {key}"} if key else {},
        "limits": httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
        "trust_env": False,
    }


def wait_before(attempt: int, first_s: float) -> float:
    """Seconds to wait before the attempt of that number, the second being 1."""
    return random.uniform(0.5, 1.0) * first_s * 2.0**attempt


def may_do_better(status: int) -> bool:
    """Whether a server that answers `status` may answer otherwise when asked again."""
    return status in (408, 425, 429) or status >= 500


def read_key(file: Path | None, setting: str) -> str | None:
    """The bearer key in `file`, if there is one.

    Raises:
        StartError: it cannot be read.
    """
    if file is None:
        return None
    try:
        return file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "no text"
        raise StartError(
            f"{file}: cannot be read ({why}); set {setting} to a file that holds the key"
        ) from None


def arm_seed(spec: ArmSpec, question: str, seed: int) -> int:
    """The seed of one sample, below 2**31: the arm's own, the question and the request's decide it."""
    digest = hashlib.blake2b(
        f"{spec.seed}\n{seed}\n{question}".encode("utf-8", "surrogatepass"), digest_size=8
    )
    return int.from_bytes(digest.digest(), "big") >> 33


def withhold_echo(text: str, spec: ArmSpec, question: str) -> str:
    """`text` with every stretch of at least ECHO_WORDS words of the arm's prompt replaced by WITHHELD.

    So is a single word of the prompt that mixes letters and digits, as marks and names of secrets do. Words
    are compared without case and punctuation. What the question itself says is no echo.
    """
    private = _grams(spec.system_prompt) | _grams(spec.user_template)
    private -= _grams(question)
    prompt = f"{spec.system_prompt} {spec.user_template}".casefold()
    marks = {name for name in _NAME.findall(prompt) if _MARK.fullmatch(name)}
    marks -= set(_NAME.findall(question.casefold()))
    if marks:
        text = re.sub("|".join(map(re.escape, sorted(marks))), WITHHELD, text, flags=re.IGNORECASE)
    words = list(_WORD.finditer(text))
    names = [match.group().casefold() for match in words]
    spans: list[tuple[int, int]] = []
    for i in range(len(names) - ECHO_WORDS + 1):
        if tuple(names[i : i + ECHO_WORDS]) in private:
            start, end = words[i].start(), words[i + ECHO_WORDS - 1].end()
            if spans and start <= spans[-1][1]:
                spans[-1] = (spans[-1][0], end)
            else:
                spans.append((start, end))
    for start, end in reversed(spans):
        text = text[:start] + WITHHELD + text[end:]
    return text


def _grams(text: str) -> set[tuple[str, ...]]:
    names: Sequence[str] = [word.casefold() for word in _WORD.findall(text)]
    return {tuple(names[i : i + ECHO_WORDS]) for i in range(len(names) - ECHO_WORDS + 1)}


def _text_of(reply: Completion) -> str:
    choice = reply.choices[0]
    if choice.message is None:
        return choice.text or ""
    thoughts = choice.message.reasoning_content
    return (f"{thoughts}\n" if thoughts else "") + (choice.message.content or "")

"""The public client of a reward service: text in, rewards out, nothing of how they are made.

What it promises a training run:
- A failed score is never a number. `score` gives a `ScoredQuestion` or a `FailedQuestion` for every id.
- Every call ends: one deadline covers all retries of a request, and waiting is announced meanwhile.
- A retry repeats the same `Idempotency-Key`, so that a reply lost on the way is not scored twice.
- Rewards cannot change in the middle of a run: the first scorer seen is pinned, another one is an error.
- Replies are checked (count, ids, finiteness, disclosure) before anything is made of them.
"""

from __future__ import annotations

import logging
import os
import random
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import httpx
import stamina
from pydantic import BaseModel, ValidationError

from looper_schemas import records
from looper_schemas.problems import PROBLEM_TYPE_PREFIX, Problem, ProblemCode
from looper_schemas.scoring import (
    Arm,
    Disclosure,
    FailedQuestion,
    FinishReason,
    Limits,
    Purpose,
    Question,
    QuestionError,
    RewardMode,
    ScoredQuestion,
    ScoreRequest,
    ScoreResponse,
    ServiceInfo,
)
from looper_trainer.errors import ConfigError, RewardRejected, RewardUnavailable, ScorerMismatch
from looper_trainer.sampling.base import Completion

__all__ = [
    "RewardClient",
    "RewardRejected",
    "RewardUnavailable",
    "ScorerMismatch",
    "Waiting",
    "announce",
    "as_question",
]

_FIRST_WAIT_S = 0.25
_LONGEST_WAIT_S = 15.0
_BAD_REPLIES_BEFORE_GIVING_UP = 3
_ROUNDS_FOR_FAILED_QUESTIONS = 3
_LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})

MessageT = TypeVar("MessageT", bound=BaseModel)


@dataclass(frozen=True)
class Waiting:
    """The client waits before it tries again. Times are in seconds."""

    reason: str
    attempt: int
    next_try_s: float
    waited_s: float
    gives_up_after_s: float

    def __str__(self) -> str:
        return (
            f"waiting for the reward service: {self.reason}; attempt {self.attempt} failed, next in "
            f"{self.next_try_s:.1f} s, {self.waited_s:.0f} of {self.gives_up_after_s:.0f} s waited"
        )


def as_question(problem: records.Problem, completions: Sequence[Completion]) -> Question:
    """`problem` with `completions` as its arms, whose ids are their places: "0", "1", ...

    The answer is left to the service: it reads texts by the same rules as `looper_schemas.answers`.
    """
    return Question(
        id=problem.id,
        question=problem.question,
        gold_answer=problem.answer,
        arms=tuple(
            Arm(
                id=str(index),
                full_text=completion.text,
                tokens_out=len(completion.token_ids),
                finish_reason=FinishReason(completion.finish_reason),
            )
            for index, completion in enumerate(completions)
        ),
    )


def announce(waiting: Waiting) -> None:
    """Say on standard error that the client waits."""
    print(waiting, file=sys.stderr, flush=True)


class RewardClient:
    """Synchronous client of one reward service for one run; a context manager.

    Args:
        url: base address of the service; plain http is refused beyond loopback unless `allow_http`.
        key: API key.
        run_id: names this run in the service's log.
        reward_mode: how scores become rewards of arms.
        disclosure: "reward", or "components" to get scores and correctness flags too.
        scorer_id: the scorer this run is pinned to; None pins the first one seen.
        timeout_s: longest wait for one reply.
        give_up_after_s: total deadline of one request, all its retries included.
        first_contact_s: the deadline instead, until the service has answered once (a wrong URL ends soon).
        on_wait: called before each wait; `announce` prints it.
        allow_http: permit plain http to a host that is not loopback.

    Raises:
        ConfigError: unusable url or key.
    """

    def __init__(
        self,
        url: str,
        key: str,
        *,
        run_id: str,
        reward_mode: RewardMode | str = RewardMode.ARM_GATED,
        disclosure: Disclosure | str = Disclosure.COMPONENTS,
        scorer_id: str | None = None,
        timeout_s: float = 120.0,
        give_up_after_s: float = 1800.0,
        first_contact_s: float = 30.0,
        on_wait: Callable[[Waiting], None] = announce,
        allow_http: bool = False,
    ) -> None:
        base = _checked_url(url, allow_http)
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError("the reward service's key is empty or not plain text; set LOOPER_REWARD_KEY")
        self.url = str(base)
        self.run_id = run_id
        self.reward_mode = RewardMode(reward_mode)
        self.disclosure = Disclosure(disclosure)
        self.scorer_id = scorer_id
        self.timeout_s = timeout_s
        self.give_up_after_s = give_up_after_s
        self.first_contact_s = min(first_contact_s, give_up_after_s)
        self.on_wait = on_wait
        self._answered = False
        self._closed = False
        self._info: ServiceInfo | None = None
        self._http = httpx.Client(
            base_url=base,
            headers={"Authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(timeout_s, connect=min(10.0, timeout_s)),
            trust_env=base.host not in _LOOPBACK_HOSTS,  # a proxy has no business with a local service
        )
        # Waiting is announced through on_wait; stamina's own warnings would say it twice.
        logging.getLogger("stamina").addHandler(logging.NullHandler())

    @classmethod
    def from_environment(
        cls,
        *,
        run_id: str,
        reward_mode: RewardMode | str = RewardMode.ARM_GATED,
        disclosure: Disclosure | str = Disclosure.COMPONENTS,
        scorer_id: str | None = None,
        timeout_s: float = 120.0,
        give_up_after_s: float = 1800.0,
        first_contact_s: float = 30.0,
        on_wait: Callable[[Waiting], None] = announce,
    ) -> Self:
        """A client of `LOOPER_REWARD_URL` with the key in `LOOPER_REWARD_KEY` or `LOOPER_REWARD_KEY_FILE`.

        `LOOPER_REWARD_ALLOW_HTTP=1` permits plain http to another host, for a private network.

        Raises:
            ConfigError: a variable is missing or unusable.
        """
        url = os.environ.get("LOOPER_REWARD_URL", "").strip()
        if not url:
            raise ConfigError("LOOPER_REWARD_URL is not set; set it to the reward service's address")
        return cls(
            url,
            _key_from_environment(),
            run_id=run_id,
            reward_mode=reward_mode,
            disclosure=disclosure,
            scorer_id=scorer_id,
            timeout_s=timeout_s,
            give_up_after_s=give_up_after_s,
            first_contact_s=first_contact_s,
            on_wait=on_wait,
            allow_http=os.environ.get("LOOPER_REWARD_ALLOW_HTTP") == "1",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; a wait in another thread ends at its next attempt."""
        self._closed = True
        self._http.close()

    def info(self) -> ServiceInfo:
        """What the service runs and allows; asked once, then remembered.

        Raises:
            RewardUnavailable, RewardRejected, ScorerMismatch: see `looper_trainer.errors`.
        """
        if self._info is None:
            info = self._exchange("GET", "/v1/info", ServiceInfo, lambda _: None, {}, None)
            self._pin(info.scorer_id)
            self._info = info
        return self._info

    def score(
        self, questions: Sequence[Question], *, step: int, purpose: Purpose
    ) -> dict[str, ScoredQuestion | FailedQuestion]:
        """The result of every question, by its id.

        Questions are sent in as few requests as the service's limits allow. Failed ones that may be
        retried are sent again, alone, up to three times; what still failed comes back as `FailedQuestion`.

        Args:
            questions: with distinct ids.
            step: the trainer's step, for the service's log.
            purpose: why.

        Raises:
            RewardUnavailable, RewardRejected, ScorerMismatch: see `looper_trainer.errors`.
            ValueError: ids repeat.
        """
        if len({question.id for question in questions}) != len(questions):
            raise ValueError("question ids repeat")
        info = self.info()
        if self.reward_mode not in info.reward_modes:
            raise RewardRejected(f"{self.url} does not offer reward mode {self.reward_mode}; choose another")
        results: dict[str, ScoredQuestion | FailedQuestion] = {}
        pending = []
        for question in questions:
            if _fits(question, info.limits):
                pending.append(question)
            else:
                error = QuestionError(code=ProblemCode.REQUEST_TOO_LARGE, retryable=False)
                results[question.id] = FailedQuestion(id=question.id, error=error)
        for again in range(_ROUNDS_FOR_FAILED_QUESTIONS + 1):
            if again:
                time.sleep(random.uniform(0, 2**again))
            for batch in _batches(pending, info.limits):
                results.update(self._score_batch(batch, step, purpose))
            pending = [question for question in pending if _worth_retrying(results[question.id])]
            if not pending:
                break
        return results

    def _score_batch(
        self, batch: Sequence[Question], step: int, purpose: Purpose
    ) -> dict[str, ScoredQuestion | FailedQuestion]:
        request = ScoreRequest(
            run_id=self.run_id,
            step=step,
            purpose=purpose,
            scorer_id=self.scorer_id,
            reward_mode=self.reward_mode,
            disclosure=self.disclosure,
            questions=tuple(batch),
        )
        headers = {"Content-Type": "application/json", "Idempotency-Key": uuid.uuid4().hex}
        body = request.model_dump_json().encode()

        def check(reply: ScoreResponse) -> None:
            _check_reply(reply, batch, self.disclosure)

        reply = self._exchange("POST", "/v1/score", ScoreResponse, check, headers, body)
        self._pin(reply.scorer_id)
        return {result.id: result for result in reply.results}

    def _pin(self, scorer_id: str) -> None:
        if self.scorer_id is None:
            self.scorer_id = scorer_id
        elif self.scorer_id != scorer_id:
            raise ScorerMismatch(
                f"{self.url} runs scorer {scorer_id}, but this run is pinned to {self.scorer_id}; start that "
                "scorer again, or begin a new run"
            )

    def _exchange(
        self,
        method: str,
        path: str,
        kind: type[MessageT],
        check: Callable[[MessageT], None],
        headers: dict[str, str],
        body: bytes | None,
    ) -> MessageT:
        """One checked reply of `kind`, however many attempts the deadline allows."""
        started = time.monotonic()
        attempts = bad_replies = 0

        def limit_s() -> float:
            return self.give_up_after_s if self._answered else self.first_contact_s

        def wait_before_next(error: Exception) -> float | bool:
            """stamina's hook: seconds until the next attempt, or False to let `error` out."""
            nonlocal attempts, bad_replies
            if not isinstance(error, _TryAgain) or self._closed:
                return False
            attempts += 1
            bad_replies += error.bad_reply
            if bad_replies >= _BAD_REPLIES_BEFORE_GIVING_UP:
                return False
            # Full jitter: many trainers that lost one service do not come back in step.
            wait_s = random.uniform(0, min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** min(attempts, 20)))
            wait_s = max(wait_s, error.retry_after_s)
            waited_s = time.monotonic() - started
            if waited_s + wait_s >= limit_s():
                return False
            self.on_wait(Waiting(error.reason, attempts, wait_s, waited_s, limit_s()))
            return wait_s

        try:
            for attempt in stamina.retry_context(on=wait_before_next, attempts=None, timeout=None):
                with attempt:
                    remaining_s = limit_s() - (time.monotonic() - started)
                    return self._attempt(method, path, kind, check, headers, body, max(remaining_s, 0.1))
        except _TryAgain as error:
            if error.bad_reply:
                raise RewardRejected(
                    f"{self.url} replies outside the contract ({error.reason}); check LOOPER_REWARD_URL and "
                    "the service's version"
                ) from error
            raise RewardUnavailable(
                f"no answer from the reward service at {self.url} within {limit_s():.0f} s ({error.reason}); "
                "start it or check LOOPER_REWARD_URL, then run the same command again"
            ) from error
        raise AssertionError("unreachable: stamina returns or raises")

    def _attempt(
        self,
        method: str,
        path: str,
        kind: type[MessageT],
        check: Callable[[MessageT], None],
        headers: dict[str, str],
        body: bytes | None,
        remaining_s: float,
    ) -> MessageT:
        limit_s = min(self.timeout_s, remaining_s)
        headers = {**headers, "X-Deadline-Ms": str(int(limit_s * 1000))}
        timeout = httpx.Timeout(limit_s, connect=min(10.0, limit_s))
        ends = time.monotonic() + limit_s
        content = bytearray()
        try:
            with self._http.stream(method, path, headers=headers, content=body, timeout=timeout) as response:
                for chunk in response.iter_bytes():
                    content += chunk
                    # httpx bounds each read; a reply in drops needs a bound of its own.
                    if time.monotonic() > ends:
                        raise _TryAgain(f"the reply took more than {limit_s:.0f} s")
                    if len(content) > _LONGEST_REPLY_BYTES:
                        raise RewardRejected(
                            f"{self.url}: the reply is longer than {_LONGEST_REPLY_BYTES} bytes"
                        )
        except httpx.RequestError as error:
            raise _TryAgain(_describe(error)) from error
        if response.status_code >= 400 or response.is_redirect:
            raise self._refusal(response, bytes(content))
        self._answered = True
        try:
            reply = kind.model_validate_json(bytes(content))
            check(reply)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise _TryAgain(f"{'.'.join(map(str, first['loc']))} {first['msg']}", bad_reply=True) from None
        except _BadReply as error:
            raise _TryAgain(str(error), bad_reply=True) from None
        return reply

    def _refusal(self, response: httpx.Response, content: bytes) -> Exception:
        """What an error reply means: to be tried again, or a `RewardError` that says what to do."""
        status = response.status_code
        try:
            problem = Problem.model_validate_json(content)
        except ValidationError:
            problem = None
        code = _code_of(problem)
        if code is ProblemCode.SCORER_MISMATCH:
            return ScorerMismatch(
                f"{self.url} runs another scorer than {self.scorer_id}, to which this run is pinned; start "
                "that scorer again, or begin a new run"
            )
        what = f"HTTP {status}" + (f" {code}" if code else "")
        if status in (408, 429) or status >= 500 or (problem is not None and problem.retryable):
            # A problem body is the service's own voice; a bare 502 may come from whatever stands before it.
            self._answered = self._answered or problem is not None
            return _TryAgain(what, retry_after_s=_retry_after_s(response))
        advice = {
            401: "it does not know the API key; check LOOPER_REWARD_KEY",
            403: f"the API key does not allow this (disclosure {self.disclosure}); use a key with that scope",
            404: "there is no reward service at this address; check LOOPER_REWARD_URL",
            413: "the request exceeds its limits; use smaller batches",
        }.get(status, "it refuses the request; check LOOPER_REWARD_URL and that its version fits this client")
        if code is ProblemCode.BUDGET_EXHAUSTED:
            advice = "the budget of the API key is used up; raise it or use another key"
        if response.is_redirect:
            advice = "the address redirects; set LOOPER_REWARD_URL to the service's own address"
        return RewardRejected(f"reward service at {self.url}: {what}: {advice}")


_LONGEST_REPLY_BYTES = 512 * 2**20


class _TryAgain(Exception):
    """An attempt failed in a way that another attempt may mend."""

    def __init__(self, reason: str, retry_after_s: float = 0.0, bad_reply: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after_s = retry_after_s
        self.bad_reply = bad_reply


class _BadReply(Exception):
    """A reply that is well-formed but does not answer the request."""


def _check_reply(reply: ScoreResponse, batch: Sequence[Question], disclosure: Disclosure) -> None:
    """Refuse a reply that does not answer exactly `batch`, or answers with less than was asked."""
    asked = {question.id: question for question in batch}
    if sorted(result.id for result in reply.results) != sorted(asked):
        raise _BadReply(f"{len(reply.results)} results do not match the {len(asked)} question ids")
    for result in reply.results:
        if isinstance(result, FailedQuestion):
            continue
        question = asked[result.id]
        if sorted(arm.id for arm in result.arms) != sorted(arm.id for arm in question.arms):
            raise _BadReply("arm ids of a result do not match those of its question")
        if result.correct_flags is not None and len(result.correct_flags) != len(question.arms):
            raise _BadReply("correct_flags of a result do not match its arms")
        if disclosure is Disclosure.COMPONENTS and (result.scores is None or result.correct_flags is None):
            raise _BadReply("components were asked for and are missing")


def _code_of(problem: Problem | None) -> ProblemCode | None:
    """The code that `problem` names, or None when another kind of server wrote it."""
    try:
        return None if problem is None else ProblemCode(problem.type.removeprefix(PROBLEM_TYPE_PREFIX))
    except ValueError:
        return None


def _worth_retrying(result: ScoredQuestion | FailedQuestion) -> bool:
    return isinstance(result, FailedQuestion) and result.error.retryable


def _fits(question: Question, limits: Limits) -> bool:
    texts = [question.question, *(t for arm in question.arms for t in (arm.reasoning, arm.full_text) if t)]
    return (
        len(question.arms) <= limits.max_arms
        and max(map(len, texts)) <= limits.max_text_chars
        and _size(question) + _ENVELOPE_BYTES <= limits.max_body_bytes
    )


def _size(question: Question) -> int:
    return len(question.model_dump_json().encode()) + 1


_ENVELOPE_BYTES = 2048  # everything in a request but its questions


def _batches(questions: Sequence[Question], limits: Limits) -> Iterator[list[Question]]:
    """`questions`, in order, in as few lists as `limits` allow."""
    batch: list[Question] = []
    used = _ENVELOPE_BYTES
    for question in questions:
        size = _size(question)
        if batch and (len(batch) == limits.max_questions or used + size > limits.max_body_bytes):
            yield batch
            batch, used = [], _ENVELOPE_BYTES
        batch.append(question)
        used += size
    if batch:
        yield batch


def _retry_after_s(response: httpx.Response) -> float:
    """Seconds that a `Retry-After` header asks for (RFC 9110 10.2.3); 0 without a readable one."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


def _describe(error: httpx.RequestError) -> str:
    if isinstance(error, httpx.ConnectError):
        return f"cannot connect: {error}"
    if isinstance(error, httpx.TimeoutException):
        return "no reply in time"
    return f"the connection broke: {type(error).__name__}"


def _checked_url(url: str, allow_http: bool) -> httpx.URL:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(f"LOOPER_REWARD_URL is no http(s) address: {url!r}")
    if parsed.userinfo:
        raise ConfigError("LOOPER_REWARD_URL holds a user or password; put the key into LOOPER_REWARD_KEY")
    if parsed.scheme == "http" and parsed.host not in _LOOPBACK_HOSTS and not allow_http:
        raise ConfigError(
            f"{parsed.host}: plain http would send the key and all texts in the clear; use https, or on a "
            "private network set LOOPER_REWARD_ALLOW_HTTP=1"
        )
    return parsed


def _key_from_environment() -> str:
    key = os.environ.get("LOOPER_REWARD_KEY", "").strip()
    if key:
        return key
    file = os.environ.get("LOOPER_REWARD_KEY_FILE", "").strip()
    if not file:
        raise ConfigError("no key: set LOOPER_REWARD_KEY, or LOOPER_REWARD_KEY_FILE to a file that holds it")
    try:
        return Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"LOOPER_REWARD_KEY_FILE: cannot read {file}") from None

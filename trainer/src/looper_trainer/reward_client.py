"""The public client of a reward service: text in, rewards out, nothing of how they are made.

What it promises a training run:
- A failed score is never a number. `score` gives a `ScoredQuestion` or a `FailedQuestion` for every id.
- Every call ends: one deadline covers all retries of a request, and waiting is announced meanwhile.
- A retry repeats the same `Idempotency-Key`, so that a reply lost on the way is not scored twice.
- Rewards cannot change in the middle of a run: the first scorer seen is pinned, another one is an error.
- Replies are checked (count, ids, finiteness, disclosure) before anything is made of them.
"""

from __future__ import annotations

import os
import random
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from looper_schemas import records
from looper_schemas.problems import ProblemCode
from looper_schemas.rollout import OpenQuestion, RolledOut, RolloutRequest, RolloutResponse
from looper_schemas.scoring import (
    Arm,
    Disclosure,
    FailedQuestion,
    FinishReason,
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
from looper_trainer.reward_batches import batches, check_reply, fits
from looper_trainer.reward_http import Announcer, BadReply, Exchanger, Waiting
from looper_trainer.sampling.base import Completion

__all__ = [
    "Announcer",
    "RewardClient",
    "RewardRejected",
    "RewardUnavailable",
    "ScorerMismatch",
    "Waiting",
    "as_question",
]

_ROUNDS_FOR_FAILED_QUESTIONS = 3


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
        on_wait: called before each wait; None: it is said on standard error now and then (`Announcer`).
        allow_http: permit plain http to a host that is not loopback.
        ca_file: PEM file of the authorities to trust instead of the usual ones.
        client_certificate: PEM file of the certificate chain to present to a service that wants one (mTLS).
        client_key: PEM file of its private key, without a password; None: it is in the same file.

    Raises:
        ConfigError: unusable url, key or file.
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
        on_wait: Callable[[Waiting], None] | None = None,
        allow_http: bool = False,
        ca_file: str | None = None,
        client_certificate: str | None = None,
        client_key: str | None = None,
    ) -> None:
        self.run_id = run_id
        self.reward_mode = RewardMode(reward_mode)
        self.disclosure = Disclosure(disclosure)
        self.scorer_id = scorer_id
        self._info: ServiceInfo | None = None
        self._http = Exchanger(
            url,
            key,
            timeout_s=timeout_s,
            give_up_after_s=give_up_after_s,
            first_contact_s=first_contact_s,
            on_wait=on_wait,
            allow_http=allow_http,
            ca_file=ca_file,
            client_certificate=client_certificate,
            client_key=client_key,
        )

    @property
    def url(self) -> str:
        """Base address of the service."""
        return self._http.url

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
        on_wait: Callable[[Waiting], None] | None = None,
    ) -> Self:
        """A client of `LOOPER_REWARD_URL` with the key in `LOOPER_REWARD_KEY` or `LOOPER_REWARD_KEY_FILE`.

        `LOOPER_REWARD_ALLOW_HTTP=1` permits plain http to another host, for a private network.
        `LOOPER_REWARD_CLIENT_CERTIFICATE` and `LOOPER_REWARD_CLIENT_KEY` name PEM files to present (mTLS).
        `SSL_CERT_FILE` counts for a service on loopback too, where no other network variable is heeded.

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
            ca_file=os.environ.get("SSL_CERT_FILE") or None,
            client_certificate=os.environ.get("LOOPER_REWARD_CLIENT_CERTIFICATE") or None,
            client_key=os.environ.get("LOOPER_REWARD_CLIENT_KEY") or None,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; a wait in another thread ends at its next attempt."""
        self._http.close()

    def info(self) -> ServiceInfo:
        """What the service runs and allows; asked once, then remembered.

        Raises:
            RewardUnavailable, RewardRejected, ScorerMismatch: see `looper_trainer.errors`.
        """
        if self._info is None:
            # A key that may not have what will be asked for is refused now, by a service that looks at this.
            headers = {"X-Disclosure": self.disclosure.value}
            info = self._http.exchange("GET", "/v1/info", ServiceInfo, lambda _: None, headers, None)
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
            if fits(question, info.limits):
                pending.append(question)
            else:
                error = QuestionError(code=ProblemCode.REQUEST_TOO_LARGE, retryable=False)
                results[question.id] = FailedQuestion(id=question.id, error=error)
        for again in range(_ROUNDS_FOR_FAILED_QUESTIONS + 1):
            if again:
                time.sleep(random.uniform(0, 2**again))
            for batch in batches(pending, info.limits):
                results.update(self._score_batch(batch, step, purpose))
            pending = [question for question in pending if _worth_retrying(results[question.id])]
            if not pending:
                break
        return results

    def roll_out(
        self, questions: Sequence[OpenQuestion], *, step: int, seed: int, max_tokens: int
    ) -> tuple[dict[str, RolledOut | FailedQuestion], str]:
        """What the service's own arms answer, by question id, and the service's name for what generated it.

        Failed questions that may be retried are asked again, alone, as `score` does.

        Raises:
            RewardUnavailable, RewardRejected, ScorerMismatch: see `looper_trainer.errors`.
        """
        info = self.info()
        results: dict[str, RolledOut | FailedQuestion] = {}
        generator = ""
        pending = list(questions)
        for again in range(_ROUNDS_FOR_FAILED_QUESTIONS + 1):
            if again:
                time.sleep(random.uniform(0, 2**again))
            for begin in range(0, len(pending), info.limits.max_questions):
                reply = self._roll_out_batch(
                    RolloutRequest(
                        run_id=self.run_id,
                        step=step,
                        scorer_id=self.scorer_id,
                        reward_mode=self.reward_mode,
                        disclosure=self.disclosure,
                        seed=seed,
                        max_tokens=max_tokens,
                        questions=tuple(pending[begin : begin + info.limits.max_questions]),
                    )
                )
                generator = reply.generator
                results.update({result.id: result for result in reply.results})
            pending = [question for question in pending if _worth_retrying(results[question.id])]
            if not pending:
                break
        return results, generator

    def _roll_out_batch(self, request: RolloutRequest) -> RolloutResponse:
        headers = {"Content-Type": "application/json", "Idempotency-Key": uuid.uuid4().hex}
        body = request.model_dump_json().encode()
        asked = sorted(question.id for question in request.questions)

        def check(reply: RolloutResponse) -> None:
            if sorted(result.id for result in reply.results) != asked:
                raise BadReply(f"{len(reply.results)} results do not match the {len(asked)} question ids")
            scored = [result for result in reply.results if isinstance(result, RolledOut)]
            components = self.disclosure is Disclosure.COMPONENTS
            if components and any(result.scores is None for result in scored):
                raise BadReply("components were asked for and are missing")

        reply = self._http.exchange("POST", "/v1/arms/rollout", RolloutResponse, check, headers, body)
        self._pin(reply.scorer_id)
        return reply

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
            check_reply(reply, batch, self.disclosure)

        reply = self._http.exchange("POST", "/v1/score", ScoreResponse, check, headers, body)
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


def _worth_retrying(result: ScoredQuestion | RolledOut | FailedQuestion) -> bool:
    return isinstance(result, FailedQuestion) and result.error.retryable


def _key_from_environment() -> str:
    key = os.environ.get("LOOPER_REWARD_KEY", "").strip()
    if key:
        return key
    file = os.environ.get("LOOPER_REWARD_KEY_FILE", "").strip()
    if not file:
        raise ConfigError(
            "no key for the reward service; set LOOPER_REWARD_KEY, or LOOPER_REWARD_KEY_FILE to a file that "
            "holds it"
        )
    try:
        return Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "no text"
        raise ConfigError(
            f"LOOPER_REWARD_KEY_FILE: cannot read {file} ({why}); set it to the path of a readable file that "
            "holds the key"
        ) from None

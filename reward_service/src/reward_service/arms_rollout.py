"""`POST /v1/arms/rollout`: every arm answers every question, and the answers are scored together.

A question is scored as soon as its last arm has answered, while others are still being generated. A question
of which one arm got no answer fails (`generator_failed`): fewer arms would be another score. The blocks in
which arms think of another situation are scored as such; what a caller sees of them is their text only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import httpx
from starlette.requests import Request
from starlette.responses import Response

from looper_schemas.problems import ProblemCode
from looper_schemas.rollout import ArmOutput, OpenQuestion, RolledOut, RolloutRequest, RolloutResponse
from looper_schemas.scoring import MAX_TEXT_CHARS, Arm, Disclosure, FailedQuestion, Question
from regime_w import arms
from regime_w.scorer import parse_arm
from reward_service.auth import Scope
from reward_service.batching import failed
from reward_service.endpoints import Service, Work, answer, read_message
from reward_service.errors import ProblemError
from reward_service.generator import Generated, Generator, GeneratorFailed, read_key
from reward_service.settings import Settings

_SCORING_SHARE = 0.15  # of the time of a request that is kept for scoring
_MARKS = (arms.COUNTERFACTUAL_OPEN, arms.COUNTERFACTUAL_CLOSE)


def make_generator(settings: Settings, transport: httpx.AsyncBaseTransport | None = None) -> Generator | None:
    """The generator of the settings, if they name one; a `transport` stands in for the network.

    Raises:
        StartError: its key cannot be read.
    """
    if settings.generator_url is None:
        return None
    return Generator(
        settings.generator_url,
        settings.generator_model,
        chat=settings.generator_chat,
        key=read_key(settings.generator_key_file, "generator_key_file"),
        concurrency=settings.generator_concurrency,
        timeout_s=settings.generator_timeout_s,
        attempts=settings.generator_attempts,
        transport=transport,
    )


async def arms_rollout(request: Request) -> Response:
    """The route; see `looper_schemas.rollout`."""
    count = len(arms.build_all_arms())
    return await answer(request, Scope.ARMS_ROLLOUT, _parse, lambda question: count, _work)


def _parse(body: bytes, settings: Settings) -> RolloutRequest:
    message = read_message(body, RolloutRequest)
    if len(message.questions) > settings.max_questions or any(
        len(question.question) > settings.max_text_chars for question in message.questions
    ):
        raise ProblemError(ProblemCode.REQUEST_TOO_LARGE)
    return message


async def _work(service: Service, message: RolloutRequest, account: str, deadline: float) -> Work:
    now = time.monotonic()
    generated_by = deadline - _SCORING_SHARE * (deadline - now)
    results = await asyncio.gather(
        *(
            _roll_out(service, message, question, account, generated_by, deadline)
            for question in message.questions
        )
    )

    def body(digest: str, reply_id: str) -> bytes:
        assert service.generator is not None
        response = RolloutResponse(
            request_id=reply_id,
            scorer_id=service.engine.scorer_id,
            request_digest=digest,
            generator=service.generator.model,
            results=tuple(results),
        )
        components = message.disclosure is Disclosure.COMPONENTS
        hidden = None if components else {"results": {"__all__": {"scores", "correct_flags"}}}
        return response.model_dump_json(exclude=hidden).encode()

    return Work(results, body)


async def _roll_out(
    service: Service,
    message: RolloutRequest,
    question: OpenQuestion,
    account: str,
    generated_by: float,
    deadline: float,
) -> RolledOut | FailedQuestion:
    assert service.generator is not None
    tasks = [
        asyncio.create_task(
            service.generator.generate(
                spec,
                question.question,
                seed=message.seed,
                max_tokens=message.max_tokens,
                deadline=generated_by,
            )
        )
        for spec in arms.build_all_arms()
    ]
    try:
        answers = await asyncio.gather(*tasks)
    except GeneratorFailed:
        return failed(question.id, ProblemCode.GENERATOR_FAILED)
    finally:
        for task in tasks:  # an arm less and the question has no score: the others need not go on
            task.cancel()
    asked = _as_question(question, answers)
    job = service.batcher.submit([asked], message.reward_mode, account=account)
    (result,) = await job.wait(max(0.0, deadline - time.monotonic()))
    if isinstance(result, FailedQuestion):
        return result
    return RolledOut(
        **{name: getattr(result, name) for name in type(result).model_fields},
        outputs=tuple(
            ArmOutput(
                id=arm.id,
                arm=index,
                output=_shown(generated.text),
                final_answer=parse_arm(arm).answer,
                finish_reason=generated.finish_reason,
                tokens_out=generated.tokens_out,
            )
            for index, (arm, generated) in enumerate(zip(asked.arms, answers, strict=True))
        ),
    )


def _as_question(question: OpenQuestion, answers: Sequence[Generated]) -> Question:
    return Question(
        id=question.id,
        question=question.question,
        gold_answer=question.gold_answer,
        arms=tuple(
            Arm(
                id=str(index),
                arm=index,
                full_text=generated.text[:MAX_TEXT_CHARS],
                tokens_out=generated.tokens_out,
                finish_reason=generated.finish_reason,
            )
            for index, generated in enumerate(answers)
        ),
    )


def _shown(text: str) -> str:
    for mark in _MARKS:
        text = text.replace(mark, "")
    return text[:MAX_TEXT_CHARS]

"""Which questions share a request, and which replies answer one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from looper_schemas.scoring import Disclosure, FailedQuestion, Limits, Question, ScoreResponse
from looper_trainer.reward_http import BadReply

_ENVELOPE_BYTES = 2048  # everything in a request but its questions


def fits(question: Question, limits: Limits) -> bool:
    """Whether `question` can be sent at all, alone in a request."""
    texts = [question.question, *(t for arm in question.arms for t in (arm.reasoning, arm.full_text) if t)]
    return (
        len(question.arms) <= limits.max_arms
        and max(map(len, texts)) <= limits.max_text_chars
        and _size(question) + _ENVELOPE_BYTES <= limits.max_body_bytes
    )


def _size(question: Question) -> int:
    return len(question.model_dump_json().encode()) + 1


def batches(questions: Sequence[Question], limits: Limits) -> Iterator[list[Question]]:
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


def check_reply(reply: ScoreResponse, batch: Sequence[Question], disclosure: Disclosure) -> None:
    """Refuse a reply that does not answer exactly `batch`, or answers with less than was asked."""
    asked = {question.id: question for question in batch}
    if sorted(result.id for result in reply.results) != sorted(asked):
        raise BadReply(f"{len(reply.results)} results do not match the {len(asked)} question ids")
    for result in reply.results:
        if isinstance(result, FailedQuestion):
            continue
        question = asked[result.id]
        if sorted(arm.id for arm in result.arms) != sorted(arm.id for arm in question.arms):
            raise BadReply("arm ids of a result do not match those of its question")
        if result.correct_flags is not None and len(result.correct_flags) != len(question.arms):
            raise BadReply("correct_flags of a result do not match its arms")
        if disclosure is Disclosure.COMPONENTS and (result.scores is None or result.correct_flags is None):
            raise BadReply("components were asked for and are missing")

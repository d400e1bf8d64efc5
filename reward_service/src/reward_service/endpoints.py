"""The routes. Every failure leaves as a `ProblemError`; the guard in `app.py` has settled who asks."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii as _quoted
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from looper_schemas.problems import ProblemCode
from looper_schemas.rollout import RolledOut, RolloutRequest
from looper_schemas.scoring import (
    Disclosure,
    FailedQuestion,
    RewardMode,
    ScoreRequest,
    ScoreResponse,
    ServiceInfo,
)
from reward_service.admission import Admission
from reward_service.arrival import receive_deadline
from reward_service.audit import AuditFile, AuditUnavailable, Value
from reward_service.auth import KeyRing, Principal, Scope
from reward_service.batching import Batcher, Engine, Result
from reward_service.errors import ProblemError
from reward_service.generator import Generator
from reward_service.ledger import Entry, Ledger
from reward_service.limits import KeyLimits
from reward_service.metrics import Metrics
from reward_service.readiness import Readiness
from reward_service.settings import Settings
from reward_service.state import Claim, Outcome, State, StateUnavailable, StoreKey
from reward_service.store import ReplyStore
from reward_service.strict_json import MalformedJson, parse_object

JSON = "application/json"
_JSON_TYPE = re.compile(r"application/json\s*(;\s*charset\s*=\s*\"?utf-8\"?\s*)?", re.IGNORECASE | re.ASCII)
_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,200}")
_MILLISECONDS = re.compile(r"[0-9]{1,9}")
_NOT_READY_RETRY_S = 5.0
# Scopes of which one is enough to be told as much.
_ENOUGH_FOR = {
    "reward": (Scope.SCORE_REWARD, Scope.ARMS_ROLLOUT),
    "components": (Scope.SCORE_COMPONENTS,),
}
_NO_ROOM = {ProblemCode.OVERLOADED}  # how questions end that the scorer had no memory for


@dataclass(frozen=True)
class Service:
    """What the routes share, made by `create_app`."""

    settings: Settings
    keys: KeyRing
    engine: Engine
    batcher: Batcher
    readiness: Readiness
    admission: Admission
    metrics: Metrics
    store: ReplyStore
    audit: AuditFile
    state: State
    ledger: Ledger
    limits: KeyLimits
    digest_key: bytes
    info: bytes  # body of GET /v1/info
    generator: Generator | None = None  # of POST /v1/arms/rollout, which is not there without one


def info_body(engine: Engine, settings: Settings) -> bytes:
    """Body of `GET /v1/info`: the contract, the scorer, the limits."""
    info = ServiceInfo(
        scorer_id=engine.scorer_id,
        limits=settings.limits,
        reward_modes=tuple(RewardMode),
        ranges={mode.value: engine.reward_range(mode) for mode in RewardMode},
    )
    return info.model_dump_json().encode()


async def livez(request: Request) -> Response:
    """The process runs and its event loop turns."""
    return Response(b'{"live":true}', media_type=JSON)


async def readyz(request: Request) -> Response:
    """Models are loaded, the golden vector matches and the audit can be written."""
    service = _service(request)
    if not (service.readiness.ready and await service.ledger.writable()):
        raise ProblemError(ProblemCode.NOT_READY, retry_after_s=_NOT_READY_RETRY_S)
    return Response(b'{"ready":true}', media_type=JSON)


async def info(request: Request) -> Response:
    """Contract range, scorer_id, limits, reward modes, ranges.

    A client that names in `X-Disclosure` what it will ask for learns here whether its key may have it.
    """
    wanted = _header(_headers(request), b"x-disclosure")
    if wanted is not None:
        if wanted not in _ENOUGH_FOR:
            raise ProblemError(ProblemCode.INVALID_REQUEST)
        if not any(_principal(request).may(scope) for scope in _ENOUGH_FOR[wanted]):
            raise ProblemError(ProblemCode.FORBIDDEN)
    return Response(_service(request).info, media_type=JSON)


async def score(request: Request) -> Response:
    """Score questions; see the wire contract in `looper_schemas.scoring`."""

    async def work(service: Service, message: ScoreRequest, account: str, deadline: float) -> Work:
        job = service.batcher.submit(message.questions, message.reward_mode, account=account)
        results = await job.wait(max(0.0, deadline - time.monotonic()))
        return Work(results, lambda digest, reply_id: _reply(service, message, digest, reply_id, results))

    return await answer(request, Scope.SCORE_REWARD, _parse, lambda question: len(question.arms), work)


@dataclass(frozen=True)
class Work:
    """What a request came to: a result a question, and the body from the request's digest and name."""

    results: Sequence[QuestionResult]
    body: Callable[[str, str], bytes]


Headers = dict[bytes, bytes | None]
MessageT = TypeVar("MessageT", ScoreRequest, RolloutRequest)
QuestionResult = Result | RolledOut


async def answer(
    request: Request,
    scope: Scope,
    parse: Callable[[bytes, Settings], MessageT],
    arms_of: Callable[[Any], int],
    work: Callable[[Service, MessageT, str, float], Awaitable[Work]],
) -> Response:
    """The way of every request for scores: allowed, read, limited, worked on, settled, answered.

    Args:
        scope: what the key needs; components need their own besides.
        parse: reads the body.
        arms_of: how many arms a question has scored. It costs as many items, at least one.
        work: does it for an account, by a deadline on the monotonic clock.

    Raises:
        ProblemError: it is not to be answered.
    """
    service, principal = _service(request), _principal(request)
    if not principal.may(scope):
        raise ProblemError(ProblemCode.FORBIDDEN)
    if not service.readiness.ready:
        raise ProblemError(ProblemCode.NOT_READY, retry_after_s=_NOT_READY_RETRY_S)
    headers = _headers(request)
    deadline = request.scope["state"]["arrived"] + _seconds_to_answer(headers, service.settings)
    idempotency_key = _idempotency_key(headers)
    key = None if idempotency_key is None else _store_key(service, principal, idempotency_key)
    announced = _announced_bytes(headers, service.settings)
    service.limits.refuse_in_debt(principal)
    with service.admission.body(principal.account, announced):
        if service.admission.full(principal.account) and _surely_new(service, key):
            raise service.admission.overloaded()  # before its body costs anything
        try:
            message = parse(await _read_body(request, service.settings), service.settings)
            _check(service, principal, message)
        except ProblemError:
            service.limits.count(principal)
            raise
        digest = _digest(service, message.model_dump_json())

        reply_id = _digest(service, _json_of(digest, principal.account, idempotency_key))[:32]
        arms = [arms_of(question) for question in message.questions]
        costs = [max(1, count) for count in arms]
        about = _about(service, principal, message, digest, reply_id, sum(arms))
        scored_here = False

        async def produce() -> bytes:
            nonlocal scored_here
            with service.admission.scoring(principal.account, sum(arms)) as place:
                async with service.limits.reserve(principal, sum(costs)):
                    done = await work(service, message, principal.account, deadline)
                    place.give_back()  # what waits for the disk takes no place from what waits for the scorer
                    failed = [result for result in done.results if isinstance(result, FailedQuestion)]
                    _note_scoring(request, about, len(failed))
                    service.metrics.scored(done.results)
                    if len(failed) == len(done.results) and {f.error.code for f in failed} == _NO_ROOM:
                        raise ProblemError(ProblemCode.OVERLOADED, retry_after_s=_NOT_READY_RETRY_S)
                    final = not any(result.error.retryable for result in failed)
                    claim = Claim(
                        account=principal.account,
                        cost=sum(
                            cost
                            for cost, result in zip(costs, done.results, strict=True)
                            if not (isinstance(result, FailedQuestion) and result.error.retryable)
                        ),
                        budget=principal.budget,
                        key=key if final else None,
                        digest=digest,
                        body=done.body(digest, reply_id),
                    )
                    outcome = await _settle(service, Entry({**about, "failed": len(failed)}, claim))
            scored_here = True
            if outcome.problem is not None:
                raise ProblemError(outcome.problem)
            return outcome.body

        try:
            body = await service.store.reply(
                key, digest, produce, lambda: _disconnected(request), deadline - time.monotonic()
            )
        except StateUnavailable:
            raise ProblemError(ProblemCode.NOT_READY, retry_after_s=_NOT_READY_RETRY_S) from None
        if body is not None and not scored_here:
            service.limits.repeat(principal)
            await _settle(service, Entry(about, None))
    return _Reply(body or b"")  # no body: nobody is there to read it


class _Reply(Response):
    """200 with a JSON body; `Response` itself takes several times as long to say so."""

    def __init__(self, body: bytes) -> None:
        self.background = None
        self.status_code = 200
        self.body = body
        self.raw_headers = [(b"content-length", b"%d" % len(body)), (b"content-type", JSON.encode())]


def _reply(
    service: Service, message: ScoreRequest, digest: str, reply_id: str, results: Sequence[Result]
) -> bytes:
    response = ScoreResponse(
        request_id=reply_id, scorer_id=service.engine.scorer_id, request_digest=digest, results=tuple(results)
    )
    components = message.disclosure is Disclosure.COMPONENTS
    # Without the right to components not even their names appear.
    hidden = None if components else {"results": {"__all__": {"scores", "correct_flags"}}}
    return response.model_dump_json(exclude=hidden).encode()


def _check(service: Service, principal: Principal, message: ScoreRequest | RolloutRequest) -> None:
    """Whether `message` may be answered to `principal`, and by this scorer.

    Raises:
        ProblemError: forbidden, scorer_mismatch.
    """
    if message.disclosure is Disclosure.COMPONENTS and not principal.may(Scope.SCORE_COMPONENTS):
        raise ProblemError(ProblemCode.FORBIDDEN)
    if message.scorer_id is not None and message.scorer_id != service.engine.scorer_id:
        raise ProblemError(ProblemCode.SCORER_MISMATCH)


def _about(
    service: Service,
    principal: Principal,
    message: ScoreRequest | RolloutRequest,
    digest: str,
    reply_id: str,
    arms: int,
) -> dict[str, Value]:
    """What the audit says of a request: hashes, counts and words of closed sets, none of its text."""
    return {
        "reply_id": reply_id,
        "digest": digest,
        "key_id": principal.key_id,
        "run": _digest(service, _json_of("run", message.run_id))[:32],
        "step": message.step,
        "purpose": message.purpose.value,
        "mode": message.reward_mode.value,
        "disclosure": message.disclosure.value,
        "questions": len(message.questions),
        "arms": arms,
        "scorer_id": service.engine.scorer_id,
    }


def _store_key(service: Service, principal: Principal, idempotency_key: str) -> StoreKey:
    return StoreKey(principal.account, _digest(service, _json_of("idempotency", idempotency_key)))


def _surely_new(service: Service, key: StoreKey | None) -> bool:
    """Whether a request must be worked on: it repeats neither one in flight nor one that was answered."""
    return key is None or (not service.store.in_flight(key) and service.state.surely_lacks(key))


async def _settle(service: Service, entry: Entry) -> Outcome:
    """Have `entry` on disk, or answer nothing.

    Raises:
        ProblemError: not_ready.
    """
    try:
        return await service.ledger.settle(entry)
    except (AuditUnavailable, StateUnavailable):
        raise ProblemError(ProblemCode.NOT_READY, retry_after_s=_NOT_READY_RETRY_S) from None


def _note_scoring(request: Request, about: Mapping[str, Value], failed: int) -> None:
    """Have the log line of `request` say what was scored."""
    named = {name: about[name] for name in ("reply_id", "questions", "arms")}
    request.scope["state"]["scored"] = {**named, "failed": failed}


def _digest(service: Service, text: str) -> str:
    """An opaque name of `text`: keyed, so that nobody outside can test a guess of it."""
    return hashlib.blake2b(text.encode(), key=service.digest_key, digest_size=32).hexdigest()


def _json_of(*values: str | None) -> str:
    """`json.dumps` of a list of strings, at a third of its cost."""
    return f"[{', '.join('null' if value is None else _quoted(value) for value in values)}]"


# --- reading a request ---------------------------------------------------------------------------------


def read_message(body: bytes, kind: type[MessageT]) -> MessageT:
    """The message of this kind in `body`.

    Raises:
        ProblemError: malformed_request, invalid_request.
    """
    try:
        return kind.model_validate(parse_object(body))
    except MalformedJson:
        raise ProblemError(ProblemCode.MALFORMED_REQUEST) from None
    except (ValidationError, RecursionError):
        raise ProblemError(ProblemCode.INVALID_REQUEST) from None


def _parse(body: bytes, settings: Settings) -> ScoreRequest:
    message = read_message(body, ScoreRequest)
    longest = settings.max_text_chars
    if len(message.questions) > settings.max_questions:
        raise ProblemError(ProblemCode.REQUEST_TOO_LARGE)
    for question in message.questions:
        if len(question.arms) > settings.max_arms or len(question.question) > longest:
            raise ProblemError(ProblemCode.REQUEST_TOO_LARGE)
        for arm in question.arms:
            if len(arm.reasoning or "") > longest or len(arm.full_text or "") > longest:
                raise ProblemError(ProblemCode.REQUEST_TOO_LARGE)
    return message


def _announced_bytes(headers: Headers, settings: Settings) -> int:
    """How much the body may take: what the client says, else the most it may send.

    With Transfer-Encoding the length means nothing (RFC 9112, 6.3).
    """
    if not _JSON_TYPE.fullmatch(_header(headers, b"content-type") or ""):
        raise ProblemError(ProblemCode.UNSUPPORTED_MEDIA_TYPE)
    if (_header(headers, b"content-encoding") or "identity").lower() != "identity":
        raise ProblemError(ProblemCode.UNSUPPORTED_MEDIA_TYPE)
    announced = _header(headers, b"content-length")
    if announced is None:
        return settings.max_body_bytes
    if not (announced.isascii() and announced.isdigit()):
        raise ProblemError(ProblemCode.MALFORMED_REQUEST)
    if len(announced) > 12 or int(announced) > settings.max_body_bytes:
        raise ProblemError(ProblemCode.REQUEST_TOO_LARGE)
    return settings.max_body_bytes if b"transfer-encoding" in headers else int(announced)


async def _read_body(request: Request, settings: Settings) -> bytes:
    body = bytearray()
    try:
        async with receive_deadline(request.scope, settings.receive_deadline_s):
            more = True
            while more:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ProblemError(ProblemCode.REQUEST_TIMEOUT)
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > settings.max_body_bytes:
                    raise ProblemError(ProblemCode.REQUEST_TOO_LARGE)
    except TimeoutError:
        raise ProblemError(ProblemCode.REQUEST_TIMEOUT) from None
    return bytes(body)


def _seconds_to_answer(headers: Headers, settings: Settings) -> float:
    """How long scoring may take, a little less than the client waits, so that the reply still reaches it."""
    milliseconds = _header(headers, b"x-deadline-ms")
    if milliseconds is None:
        return settings.default_deadline_s
    if not _MILLISECONDS.fullmatch(milliseconds) or int(milliseconds) == 0:
        raise ProblemError(ProblemCode.INVALID_REQUEST)
    seconds = min(int(milliseconds) / 1000, settings.max_deadline_s)
    return seconds - min(0.5, 0.1 * seconds)


def _idempotency_key(headers: Headers) -> str | None:
    key = _header(headers, b"idempotency-key")
    if key is not None and not _IDEMPOTENCY_KEY.fullmatch(key):
        raise ProblemError(ProblemCode.INVALID_REQUEST)
    return key


def _headers(request: Request) -> Headers:
    """The value of every header; None stands for several."""
    found: Headers = {}
    for name, value in request.scope["headers"]:
        found[name] = None if name in found else value
    return found


def _header(headers: Headers, name: bytes) -> str | None:
    """The one value of a header. A repeated one could mean two things to two readers, so it is refused."""
    if name not in headers:
        return None
    value = headers[name]
    if value is None:
        raise ProblemError(ProblemCode.INVALID_REQUEST)
    return value.decode("latin-1").strip()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _principal(request: Request) -> Principal:
    principal: Principal = request.scope["state"]["principal"]
    return principal

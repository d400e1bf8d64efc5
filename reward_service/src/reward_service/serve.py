"""`reward-service serve`: one process, one event loop, one scoring thread, HTTP/1.1 by h11."""

from __future__ import annotations

import errno
import gc
import signal
import socket
import sys

import uvicorn
from fastapi import FastAPI

from reward_service.app import create_app
from reward_service.auth import CREATE_COMMAND, KeyRing
from reward_service.errors import StartError
from reward_service.logs import configure_logging
from reward_service.metrics import MetricsListener
from reward_service.protocol import protocol_for
from reward_service.settings import Settings
from reward_service.tls import server_context


class _Server(uvicorn.Server):
    """Says `ready URL` on stdout when it is, and why not on stderr when it is not; then `metrics URL`."""

    def __init__(
        self, config: uvicorn.Config, app: FastAPI, url: str, metrics: MetricsListener | None
    ) -> None:
        super().__init__(config)
        self._app = app
        self._url = url
        self._metrics = metrics

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except OSError as error:  # another process began to listen between our bind and now
            raise _cannot_listen(self._url, error) from None
        readiness, settings = self._app.state.service.readiness, self._app.state.service.settings
        if readiness.ready:
            print(f"ready {self._url}", flush=True)
        else:
            judge = f" (its judge: {settings.judge_url})" if settings.scorer.judge == "llm" else ""
            print(
                f"not ready: {self._url} answers 503, because {readiness.reason}{judge}; see the log",
                file=sys.stderr,
                flush=True,
            )
        if self._metrics is not None:
            self._metrics.start(self._app.state.service.metrics)
            print(f"metrics {self._metrics.url}", flush=True)


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then finish what is being answered, for `drain_s` seconds at most.

    Raises:
        StartError: no key, port taken, or models that cannot be loaded. Nothing has been served then.
    """
    keys = KeyRing(settings.home)
    if not keys.any_active():
        raise StartError(f"no active key (`reward-service keys list`): run `{CREATE_COMMAND}`")
    listener = _bind(settings)
    metrics: MetricsListener | None = None
    try:
        if settings.metrics_port is not None:
            metrics = MetricsListener(settings.metrics_port, keys)
        scheme = "http" if server_context(settings) is None else "https"
        host, port = listener.getsockname()[:2]
        url = f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
        configure_logging()
        app = create_app(settings)
        tune_interpreter()
        # uvicorn repeats the signal to these handlers after it has drained: a wanted end is no failure.
        for wanted in (signal.SIGTERM, signal.SIGINT):
            signal.signal(wanted, lambda *_: None)
        _Server(server_config(app, settings), app, url, metrics).run(sockets=[listener])
    finally:
        listener.close()
        if metrics is not None:
            metrics.close()


def server_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """How uvicorn serves `app`: our h11 protocol, nothing that tells what runs here, nothing logged by it.

    Raises:
        StartError: TLS files cannot be used.
    """
    context = server_context(settings)
    return uvicorn.Config(
        app,
        ssl_context_factory=None if context is None else lambda config, default: context,
        http=protocol_for(settings),
        ws="none",
        loop="reward_service.tls:DeadlineLoop",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=settings.max_header_bytes,
        timeout_graceful_shutdown=max(1, round(settings.drain_s)),
    )


def tune_interpreter() -> None:
    """Suit the interpreter to one busy event loop beside threads that score and commit.

    Threads get the interpreter every half millisecond, not every five: they need it for moments only, and
    requests wait for them. What has been loaded by now stays, so the collector need not look at it again.
    It looks often, at little: 10,000 objects, most of them of closed connections, held all up for 10 ms.
    """
    sys.setswitchinterval(0.0005)
    gc.collect()
    gc.freeze()
    gc.set_threshold(1_000, 20, 50)


def _bind(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # With the protocol named, accepted sockets get TCP_NODELAY from asyncio; else each reply waits 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise _cannot_listen(f"{settings.host}:{settings.port}", error) from None
    return listener


def _cannot_listen(where: str, error: OSError) -> StartError:
    fix = "choose another --host"
    if error.errno == errno.EADDRINUSE:
        fix = "stop what uses it or choose another --port"
    elif error.errno == errno.EACCES:
        fix = "choose a --port above 1023"
    return StartError(f"cannot listen on {where} ({error.strerror}); {fix}")

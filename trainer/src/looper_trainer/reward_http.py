"""Checked exchanges with one HTTP service, each under one deadline: the lower half of the reward client.

An exchange is repeated on transport errors, 408, 429, 5xx, retryable problems and, a few times, on replies
that break the contract. Whatever else goes wrong is a `RewardError` that says what to do.
"""

from __future__ import annotations

import logging
import random
import ssl
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TypeVar
from urllib.request import getproxies, proxy_bypass

import httpx
import stamina
from pydantic import BaseModel, ValidationError

from looper_schemas.problems import Problem, ProblemCode
from looper_trainer.errors import ConfigError, RewardRejected, RewardUnavailable, ScorerMismatch

_FIRST_WAIT_S = 0.25
_LONGEST_WAIT_S = 15.0
_BAD_REPLIES_BEFORE_GIVING_UP = 3
_LONGEST_REPLY_BYTES = 512 * 2**20
_PROXIES = "HTTP_PROXY, HTTPS_PROXY, ALL_PROXY or NO_PROXY"
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


class Announcer:
    """Says on standard error that clients wait: for a reason at once, then every `every_s` seconds.

    Many requests wait for one service, each for many attempts; that is one piece of news.
    """

    def __init__(self, every_s: float = 30.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._every_s = every_s
        self._clock = clock
        self._lock = threading.Lock()
        self._said_at: dict[str, float] = {}

    def __call__(self, waiting: Waiting) -> None:
        """Say it, unless it was said just now."""
        now = self._clock()
        with self._lock:
            self._said_at = {why: at for why, at in self._said_at.items() if now - at < self._every_s}
            if waiting.reason in self._said_at:
                return
            self._said_at[waiting.reason] = now
        print(waiting, file=sys.stderr, flush=True)


class BadReply(Exception):
    """A reply that is well-formed but does not answer the request."""


class _TryAgain(Exception):
    """An attempt failed in a way that another attempt may mend."""

    def __init__(
        self, reason: str, retry_after_s: float = 0.0, bad_reply: bool = False, status: int | None = None
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.status = status  # of an error reply
        self.retry_after_s = retry_after_s
        self.bad_reply = bad_reply


class Exchanger:
    """HTTP connections to one service.

    Args:
        url: base address; plain http is refused beyond loopback unless `allow_http`.
        key: bearer key.
        timeout_s: longest wait for one reply.
        give_up_after_s: total deadline of one exchange, all its attempts included.
        first_contact_s: the deadline instead, until the service has answered once.
        on_wait: called before each wait; None: an `Announcer` of its own.
        allow_http: permit plain http to a host that is not loopback.
        ca_file: PEM file of the authorities to trust instead of the usual ones.
        client_certificate: PEM file of the certificate chain to present (mTLS).
        client_key: PEM file of its private key, without a password; None: it is in the same file.

    Raises:
        ConfigError: unusable url, key or file.
    """

    def __init__(
        self,
        url: str,
        key: str,
        *,
        timeout_s: float,
        give_up_after_s: float,
        first_contact_s: float,
        on_wait: Callable[[Waiting], None] | None,
        allow_http: bool,
        ca_file: str | None = None,
        client_certificate: str | None = None,
        client_key: str | None = None,
    ) -> None:
        base = _checked_url(url, allow_http)
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(
                "the service's key is empty or not plain text; set LOOPER_REWARD_KEY to the key alone, or "
                "LOOPER_REWARD_KEY_FILE to a file that holds it alone"
            )
        self.url = str(base)
        self.timeout_s = timeout_s
        self.give_up_after_s = give_up_after_s
        self.first_contact_s = min(first_contact_s, give_up_after_s)
        self.on_wait = on_wait or Announcer()
        self._answered = False
        self._closed = False
        local = base.host in _LOOPBACK_HOSTS
        verify = _tls(ca_file, client_certificate, client_key)
        try:
            self._http = httpx.Client(
                base_url=base,
                headers={"Authorization": f"Bearer {key}"},
                verify=verify,
                trust_env=not local,  # a proxy has no business with a local service
            )
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            socks = isinstance(error, ImportError)
            why = "SOCKS needs `pip install 'httpx[socks]'`" if socks else "one is no address of a proxy"
            raise ConfigError(f"the environment's proxies cannot be used ({why}); mend {_PROXIES}") from None
        self._proxied = (
            not local and not proxy_bypass(base.host) and bool({base.scheme, "all"} & getproxies().keys())
        )
        # Waiting is announced through on_wait; stamina's own warnings would say it twice.
        logging.getLogger("stamina").addHandler(logging.NullHandler())

    def close(self) -> None:
        """Close the connections; a wait in another thread ends at its next attempt."""
        self._closed = True
        self._http.close()

    def exchange(
        self,
        method: str,
        path: str,
        kind: type[MessageT],
        check: Callable[[MessageT], None],
        headers: dict[str, str],
        body: bytes | None,
    ) -> MessageT:
        """One reply of `kind` that passes `check`, however many attempts the deadline allows.

        Every attempt sends the same `headers` and `body`. `check` raises `BadReply` for a reply that is
        well-formed but does not answer the request.

        Raises:
            RewardUnavailable, RewardRejected, ScorerMismatch: see `looper_trainer.errors`.
        """
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
            raise RewardUnavailable(self._given_up(error, limit_s())) from error
        raise AssertionError("unreachable: stamina returns or raises")

    def _given_up(self, error: _TryAgain, limit_s: float) -> str:
        """What to say of the last attempt. A service that answers is not one that is away."""
        if error.status == 429:
            wait = f" for another {error.retry_after_s:.0f} s" if error.retry_after_s else ""
            return (
                f"the reward service at {self.url} limits the rate ({error.reason}){wait}; run the same "
                "command again after that, or use a key with a higher rate"
            )
        if error.status is not None:
            return (
                f"the reward service at {self.url} answers {error.reason}; see its log, then run the same "
                "command again"
            )
        fix = "start it or check LOOPER_REWARD_URL" + (
            f", or {_PROXIES} (a proxy is asked)" if self._proxied else ""
        )
        if "CERTIFICATE_VERIFY_FAILED" in error.reason:
            fix = "set SSL_CERT_FILE to the authority of its certificate"
        return (
            f"no answer from the reward service at {self.url} within {limit_s:.0f} s ({error.reason}); "
            f"{fix}, then run the same command again"
        )

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
                            f"{self.url}: the reply is longer than {_LONGEST_REPLY_BYTES} bytes; check "
                            "LOOPER_REWARD_URL"
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
        except BadReply as error:
            raise _TryAgain(str(error), bad_reply=True) from None
        return reply

    def _refusal(self, response: httpx.Response, content: bytes) -> Exception:
        """What an error reply means: to be tried again, or a `RewardError` that says what to do."""
        status = response.status_code
        try:
            problem = Problem.model_validate_json(content)
        except ValidationError:
            problem = None
        code = problem.code if problem is not None else None
        if code is ProblemCode.SCORER_MISMATCH:
            return ScorerMismatch(
                f"{self.url} runs another scorer than this run is pinned to; start that scorer again, or "
                "begin a new run"
            )
        what = f"HTTP {status}" + (f" {code}" if code else "")
        if status in (408, 429) or status >= 500 or (problem is not None and problem.retryable):
            # A problem body is the service's own voice; a bare 502 may come from whatever stands before it.
            self._answered = self._answered or problem is not None
            return _TryAgain(what, retry_after_s=_retry_after_s(response), status=status)
        advice = {
            401: "the API key is unknown, expired or revoked; check LOOPER_REWARD_KEY",
            403: "the API key lacks a scope (components need score:components, --disclosure reward needs "
            "score:reward, the service's own arms one of theirs); use a key that has it",
            404: "there is no reward service at this address; check LOOPER_REWARD_URL",
            413: "the request exceeds its limits; use smaller batches",
        }.get(status, "it refuses the request; check LOOPER_REWARD_URL and that its version fits this client")
        if code is ProblemCode.BUDGET_EXHAUSTED:
            advice = "the budget of the API key is used up; raise it or use another key"
        if response.is_redirect:
            advice = "the address redirects; set LOOPER_REWARD_URL to the service's own address"
        return RewardRejected(f"reward service at {self.url}: {what}: {advice}")


def _tls(ca_file: str | None, certificate: str | None, key: str | None) -> ssl.SSLContext | bool:
    """Whom to trust and what to present; True: the usual authorities and nothing."""
    if certificate is None:
        if key is not None:
            raise ConfigError(
                "LOOPER_REWARD_CLIENT_KEY is set without LOOPER_REWARD_CLIENT_CERTIFICATE; set both"
            )
        return True if ca_file is None else _trusting(ca_file)
    context = httpx.create_ssl_context() if ca_file is None else _trusting(ca_file)
    try:
        # The password callback keeps an encrypted key from asking on the terminal.
        context.load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        why = getattr(error, "strerror", None) or type(error).__name__
        raise ConfigError(
            f"{certificate}: cannot be presented ({why}); LOOPER_REWARD_CLIENT_CERTIFICATE and "
            "LOOPER_REWARD_CLIENT_KEY name PEM files that belong together, the key without a password"
        ) from None
    return context


def _trusting(ca_file: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(
            f"{ca_file}: is no file of trusted certificates ({error.strerror or error}); mend SSL_CERT_FILE"
        ) from None


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
        raise ConfigError(
            f"LOOPER_REWARD_URL is no http(s) address: {url!r}; give one such as https://HOST:PORT"
        )
    if parsed.userinfo:
        raise ConfigError("LOOPER_REWARD_URL holds a user or password; put the key into LOOPER_REWARD_KEY")
    if parsed.scheme == "http" and parsed.host not in _LOOPBACK_HOSTS and not allow_http:
        raise ConfigError(
            f"{parsed.host}: plain http would send the key and all texts in the clear; use https, or on a "
            "private network set LOOPER_REWARD_ALLOW_HTTP=1"
        )
    return parsed

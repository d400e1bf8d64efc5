"""`reward-service top`: what the service does now, in the terminal, from its own `/metrics`.

    reward-service keys create --name watcher --scopes metrics:read > watcher.key
    reward-service top --metrics-port 9090 --key-file watcher.key

Rates are differences between two looks; quantiles are bounds of the histogram's buckets between them.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from reward_service.errors import StartError
from reward_service.metrics import HOST, PATH

Labels = tuple[tuple[str, str], ...]
_CLEAR = "\x1b[H\x1b[2J"


@dataclass(frozen=True)
class Look:
    """Every sample of `/metrics` by name and labels, and when it was taken (seconds)."""

    samples: Mapping[tuple[str, Labels], float]
    taken: float

    def total(self, name: str, **labels: str) -> float:
        """The sum of the samples of a name that have these labels."""
        return math.fsum(value for value in self.of(name, **labels).values())

    def of(self, name: str, **labels: str) -> dict[Labels, float]:
        """The samples of a name that have these labels, by all their labels."""
        wanted = set(labels.items())
        return {have: v for (found, have), v in self.samples.items() if found == name and wanted <= set(have)}


def read(text: str, taken: float) -> Look:
    """A look from the text of `/metrics`."""
    families = text_string_to_metric_families(text)
    samples = {
        (one.name, tuple(sorted(one.labels.items()))): one.value for kind in families for one in kind.samples
    }
    return Look(samples, taken)


def fetch(port: int, key: str) -> Look:
    """A look at a running service.

    Raises:
        StartError: it does not answer, or not to this key.
    """
    url = f"http://{HOST}:{port}{PATH}"
    try:
        reply = httpx.get(url, headers={"Authorization": f"Bearer {key}"}, timeout=10, trust_env=False)
    except httpx.RequestError:
        raise StartError(f"nothing answers at {url}; start it with serve --metrics-port {port}") from None
    if reply.status_code != 200:
        raise StartError(f"{url} answers {reply.status_code}; use a key with the scope metrics:read")
    return read(reply.text, time.monotonic())


def lines(now: Look, before: Look | None) -> Iterator[str]:
    """What is shown; without an earlier look, totals in place of rates."""
    ready = "ready" if now.total("service_ready") else "NOT READY"
    memory = now.total("process_resident_memory_bytes") / 2**20
    waiting = now.total("service_waiting_items")
    size = now.total("service_waiting_bytes") / 1024
    inside = f"waiting {waiting:.0f} items, {size:.0f} KiB"
    yield f"{ready}   {inside}   memory {memory:.0f} MiB{_cpu(now, before)}"
    unit = "/s" if before else ""
    yield ""
    yield f"{'route':<24}{'requests' + unit:>14}{'p50 s':>9}{'p95 s':>9}{'p99 s':>9}"
    routes = sorted({dict(labels)["route"] for labels in now.of("service_requests_total")})
    for route in routes:
        rate = _rate(now, before, "service_requests_total", route=route)
        shown = "".join(f"{_quantile(now, before, route, share):>9}" for share in (0.5, 0.95, 0.99))
        yield f"{route:<24}{rate:>14.2f}{shown}"
    for title, name, label in (
        ("replies", "service_requests_total", "status"),
        ("questions", "service_questions_total", "result"),
        ("refused", "service_problems_total", "code"),
    ):
        values = sorted({dict(labels)[label] for labels in now.of(name)})
        rates = [(value, _rate(now, before, name, **{label: value})) for value in values]
        if rates:
            yield f"{title + unit:<24}" + "   ".join(f"{value} {rate:.2f}" for value, rate in rates)


def _rate(now: Look, before: Look | None, name: str, **labels: str) -> float:
    total = now.total(name, **labels)
    if before is None:
        return total
    # A service that was started again counts from zero.
    earlier = before.total(name, **labels)
    return (total - earlier if total >= earlier else total) / max(now.taken - before.taken, 1e-9)


def _cpu(now: Look, before: Look | None) -> str:
    if before is None:
        return ""
    return f"   CPU {100 * _rate(now, before, 'process_cpu_seconds_total'):.0f}%"


def _quantile(now: Look, before: Look | None, route: str, share: float) -> str:
    """The smallest bucket bound below which `share` of the requests in between lie."""
    found = now.of("service_request_seconds_bucket", route=route)
    earlier = before.of("service_request_seconds_bucket", route=route) if before else {}
    counts = sorted(
        (float(dict(labels)["le"]), max(0.0, count - earlier.get(labels, 0.0)))
        for labels, count in found.items()
    )
    total = counts[-1][1] if counts else 0.0
    if not total:
        return "-"
    bound = next(bound for bound, count in counts if count >= share * total)
    return f">{counts[-2][0]:g}" if math.isinf(bound) else f"<{bound:g}"


def run(port: int, key_file: Path, every_s: float, once: bool) -> None:
    """Show the service until interrupted; one look where `once` says so.

    Raises:
        StartError: see `fetch`, or the key file cannot be read.
    """
    try:
        (key,) = key_file.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        raise StartError(f"{key_file}: cannot read the key; give a file with one key in it") from None
    before: Look | None = None
    while True:
        now = fetch(port, key)
        text = "\n".join(lines(now, before))
        print((_CLEAR if sys.stdout.isatty() else "") + text, flush=True)
        if once:
            return
        before = now
        time.sleep(every_s)

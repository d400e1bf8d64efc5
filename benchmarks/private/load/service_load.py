"""The service under load, beside a no-op FastAPI endpoint in one run, on the generator's own cores.

    python benchmarks/private/load/service_load.py --keep

Over a stub scorer, with keys, limits, idempotency keys, logs and the fsynced audit as in production:
- throughput: closed loop, 256 connections; the service and the no-op endpoint in turn;
- overload: a scorer of a fixed speed; latency of admitted requests at a fifth of its capacity, and at 4 times
  its capacity over 1,024 connections, where only 200, 429 and 503 may be seen and memory must stay bounded;
  with room for the request that is scored, and beside it with room for one more;
- trickle: 500 connections that send a byte at a time while others are served.

The last run is kept in benchmarks/results/private/service_load.json. Exit code 1 when a promise is broken.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from generator import Tally, closed_loop, open_loop
from kept import ROOT, keep, stamp

from reward_service import auth
from reward_service.auth import Scope
from reward_service.home import prepare_home

CONNECTIONS = 256
OVERLOAD_CONNECTIONS = 1024
TRICKLERS = 500
SECONDS_AN_ARM = 0.002  # of the scorer under overload: 2 arms a request, so 250 requests/s
ARMS = 2
CAPACITY = 1 / (SECONDS_AN_ARM * ARMS)
OVERLOAD = {"seconds_a_batch": 0, "seconds_an_arm": SECONDS_AN_ARM, "batch_arms": ARMS}
# How many requests may be inside the scorer, the one being scored among them. A second one waits as long as
# an unloaded one is scored: it uses the scorer better, and takes most of what twice the latency leaves.
QUEUES = {"overload": 1, "overload_with_a_queue": 2}


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def running(script: Path, *arguments: str, ready: str | None) -> Iterator[subprocess.Popen[str]]:
    """A server process, once it says `ready`."""
    process = subprocess.Popen(
        [sys.executable, str(script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        if ready is not None:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == ready
        else:
            time.sleep(2)
        yield process
    finally:
        process.terminate()
        process.wait(30)


def requests(key: str) -> Callable[[], bytes]:
    """Requests of one question with two arms; no two are alike."""
    number = 0
    arms = [{"id": str(i), "full_text": f"3 + 5 = 8, said in {i} ways\n#### 8"} for i in range(ARMS)]
    body = {"contract": "1.0", "run_id": "load", "step": 0, "purpose": "train", "disclosure": "reward"}

    def one() -> bytes:
        nonlocal number
        number += 1
        question = {"id": f"q{number}", "question": "What is 3 + 5?", "gold_answer": "8", "arms": arms}
        text = json.dumps({**body, "step": number, "questions": [question]}).encode()
        head = (
            f"POST /v1/score HTTP/1.1\r\nHost: load\r\nAuthorization: Bearer {key}\r\n"
            f"Idempotency-Key: k{number}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
        )
        return head.encode() + text

    return one


def rss_mib(pid: int) -> int:
    """Resident memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) // 1024


def told(tally: Tally, seconds: float) -> dict[str, Any]:
    """A phase in figures: milliseconds are those of 200 replies."""
    return {
        "statuses": {str(status): count for status, count in sorted(tally.statuses.items(), key=str)},
        "answered_a_second": round(tally.statuses[200] / seconds, 1),
        "p50_ms": round(1000 * tally.percentile(0.5), 2),
        "p99_ms": round(1000 * tally.percentile(0.99), 2),
    }


async def trickled(port: int, key: str, seconds: float, request: Callable[[], bytes]) -> tuple[Tally, int]:
    """Others' requests while TRICKLERS connections send a byte every half second; how many were closed."""
    head = f"POST /v1/score HTTP/1.1\r\nHost: slow\r\nAuthorization: Bearer {key}\r\n".encode() * 20
    stop = asyncio.Event()
    closed = 0

    async def trickle(place: int) -> None:
        nonlocal closed
        while not stop.is_set():
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                await asyncio.sleep(place / TRICKLERS / 2)
                for at in range(len(head)):
                    if stop.is_set() or reader.at_eof():
                        break
                    writer.write(head[at : at + 1])
                    await writer.drain()
                    await asyncio.sleep(0.5)
                closed += reader.at_eof()
            except OSError:
                closed += 1
            writer.close()

    slow = [asyncio.create_task(trickle(place)) for place in range(TRICKLERS)]
    await asyncio.sleep(1)
    tally = await open_loop(port, 32, 100, seconds, request)
    stop.set()
    for task in slow:
        task.cancel()
    await asyncio.gather(*slow, return_exceptions=True)
    return tally, closed


def overloaded(
    stub: Path, home: Path, request: Callable[[], bytes], waiting: int, seconds: float
) -> dict[str, Any]:
    """A scorer of CAPACITY, unloaded and at 4 times its capacity, where `waiting` requests may be inside."""
    port = free_port()
    # One key has half of the queue.
    slow = json.dumps({**OVERLOAD, "max_waiting_arms": 2 * waiting * ARMS})
    with running(stub, str(home), str(port), slow, ready="ready") as process:
        asyncio.run(open_loop(port, 8, 20, 1, request))
        unloaded = asyncio.run(open_loop(port, 8, CAPACITY / 5, seconds, request))
        before = rss_mib(process.pid)
        loaded = asyncio.run(open_loop(port, OVERLOAD_CONNECTIONS, 4 * CAPACITY, seconds, request))
        after = rss_mib(process.pid)
        again = asyncio.run(open_loop(port, OVERLOAD_CONNECTIONS, 4 * CAPACITY, seconds, request))
        return {
            "capacity_a_second": CAPACITY,
            "connections": OVERLOAD_CONNECTIONS,
            "requests_inside": waiting,
            "unloaded": told(unloaded, seconds),
            "at_4_times": told(loaded, seconds),
            "at_4_times_again": told(again, seconds),
            "p99_ratio": round(
                max(loaded.percentile(0.99), again.percentile(0.99)) / unloaded.percentile(0.99), 2
            ),
            "rss_mib": {"before": before, "after": after, "after_again": rss_mib(process.pid)},
        }


def measure(folder: Path, seconds: float) -> dict[str, Any]:
    """All phases."""
    home = folder / "home"
    prepare_home(home)
    key = auth.create_key(home, "load", [Scope.SCORE_REWARD])
    one = requests(key)
    stub, noop = ROOT / "tests/faults/stub_service.py", Path(__file__).with_name("noop.py")
    result: dict[str, Any] = {"seconds_a_phase": seconds}

    port, noop_port = free_port(), free_port()
    fast = json.dumps({"seconds_a_batch": 0})
    with running(noop, str(noop_port), ready=None), running(stub, str(home), str(port), fast, ready="ready"):
        rates: dict[str, list[dict[str, Any]]] = {"no-op": [], "service": []}
        for _ in range(2):
            for name, where in (("no-op", noop_port), ("service", port)):
                tally = asyncio.run(closed_loop(where, CONNECTIONS, seconds, one))
                rates[name].append(told(tally, seconds))
        mean = {
            name: statistics.fmean(phase["answered_a_second"] for phase in phases)
            for name, phases in rates.items()
        }
        result["throughput"] = {
            "connections": CONNECTIONS,
            **rates,
            "requests_a_second": round(mean["service"], 1),
            "ratio_to_no_op": round(mean["service"] / mean["no-op"], 3),
        }

    for name, waiting in QUEUES.items():
        result[name] = overloaded(stub, home, one, waiting, seconds)

    port = free_port()
    with running(stub, str(home), str(port), fast, ready="ready"):
        tally, closed = asyncio.run(trickled(port, key, seconds, one))
        result["trickle"] = {
            "connections": TRICKLERS,
            "closed_by_the_service": closed,
            **told(tally, seconds),
        }
    return result


def broken(result: dict[str, Any]) -> list[str]:
    """The promises that the figures break."""
    overload, trickle = result["overload"], result["trickle"]
    phases = [result[name][phase] for name in QUEUES for phase in ("at_4_times", "at_4_times_again")]
    statuses = {status for phase in phases for status in phase["statuses"]} - {"skipped"}
    grown = max(result[name]["rss_mib"]["after_again"] - result[name]["rss_mib"]["after"] for name in QUEUES)
    checks = {
        "fewer than 1,500 requests a second": result["throughput"]["requests_a_second"] >= 1500,
        "overload: other replies than 200, 429, 503": statuses <= {"200", "429", "503"},
        "overload: p99 of the admitted above twice the unloaded": overload["p99_ratio"] <= 2,
        "overload: memory grows": grown <= 16,
        "trickle: p99 of the others is 100 ms or more": trickle["p99_ms"] < 100,
    }
    return [name for name, holds in checks.items() if not holds]


def prepare_generator() -> None:
    """Let this process open thousands of connections, and never stop for its own garbage."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, files[1]), files[1]))
    gc.disable()  # a pause of the generator would be taken for one of the service


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10, help="of each phase (default 10)")
    parser.add_argument("--keep", action="store_true", help="keep the result as the last one")
    options = parser.parse_args()
    stamped = stamp()
    prepare_generator()
    with tempfile.TemporaryDirectory() as folder:
        result = {**stamped, **measure(Path(folder), options.seconds)}
    result["promises_broken"] = broken(result)
    if options.keep:
        keep("service_load", result)
    else:
        print(json.dumps(result, indent=1))
    return 1 if result["promises_broken"] else 0


if __name__ == "__main__":
    sys.exit(main())

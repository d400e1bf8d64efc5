"""Whether the time that a refusal takes tells what was wrong with the key.

    python benchmarks/private/auth_timing.py --keep

Sends requests through ASGI with three keys that open nothing, in random order: a wrong prefix, an unknown
id, a known id with a wrong secret. Welch's t test for each pair (do their means differ?). Exit code 1 when a
p is at most 0.01. The last run is kept in benchmarks/results/private/auth_timing.json.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from scipy.stats import ttest_ind

sys.path.insert(0, str(Path(__file__).parent / "fuzz"))
from kept import keep, stamp
from target import Sent, opened

WARM_UP = 300


async def measure(home: Path, calls: int, seed: int) -> dict[str, list[float]]:
    """Microseconds of `calls` refusals of each kind."""
    async with opened(home) as target:
        _, key_id, secret, checksum = target.keys["full"].split("_")
        keys = {
            "wrong prefix": f"xx_{key_id}_{secret}_{checksum}",
            "unknown id": f"rw_{'f' * len(key_id)}_{secret}_{checksum}",
            "known id, wrong secret": f"rw_{key_id}_{secret[::-1]}_{checksum}",
        }
        order = [kind for kind in keys for _ in range(calls)]
        random.Random(seed).shuffle(order)
        times: dict[str, list[float]] = {kind: [] for kind in keys}
        gc.disable()
        for number, kind in enumerate([*itertools.islice(itertools.cycle(keys), WARM_UP), *order]):
            headers = [(b"authorization", f"Bearer {keys[kind]}".encode())]
            sent = Sent("GET", "/v1/info", b"", headers, [])
            started = time.perf_counter_ns()
            reply = await target.send(sent)
            took = time.perf_counter_ns() - started
            assert reply.status == 401
            if number >= WARM_UP:
                times[kind].append(took / 1000)
        gc.enable()
        return times


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=10_000, help="of each kind (default 10,000)")
    parser.add_argument("--seed", type=int, default=0, help="of the order (default 0)")
    parser.add_argument("--keep", action="store_true", help="keep the result as the last one")
    options = parser.parse_args()
    stamped = stamp()
    with tempfile.TemporaryDirectory() as folder:
        times = asyncio.run(measure(Path(folder) / "home", options.calls, options.seed))
    pairs = {
        f"{one} - {other}": ttest_ind(times[one], times[other], equal_var=False)
        for one, other in itertools.combinations(times, 2)
    }
    result = {
        **stamped,
        "seed": options.seed,
        "calls_of_each": options.calls,
        "microseconds": {
            kind: {
                "mean": round(statistics.fmean(them), 2),
                "median": round(statistics.median(them), 2),
                "standard_deviation": round(statistics.stdev(them), 2),
            }
            for kind, them in times.items()
        },
        "welch": {
            pair: {"t": round(float(test.statistic), 3), "p": round(float(test.pvalue), 4)}
            for pair, test in pairs.items()
        },
        "p_min": round(min(float(test.pvalue) for test in pairs.values()), 4),
    }
    if options.keep:
        keep("auth_timing", result)
    else:
        print(result)
    return 0 if result["p_min"] > 0.01 else 1


if __name__ == "__main__":
    sys.exit(main())

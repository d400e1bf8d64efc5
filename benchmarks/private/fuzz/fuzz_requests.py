"""Mutated requests through ASGI: no reply of 500 or above, no caller's text in any reply or log line.

    python benchmarks/private/fuzz/fuzz_requests.py --requests 1000000 --keep

The last long run is kept in benchmarks/results/private/fuzz_requests.json. Exit code 1 at the first fault;
it prints the request, which the same seed repeats.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from kept import keep, stamp
from mutations import Mutator
from target import Sent, opened

AT_A_TIME = 16
_SHM = Path("/dev/shm")  # where it exists, fsync costs nothing


class Fault(Exception):
    """A reply or a log line is wrong."""


async def fuzz(home: Path, requests: int, seed: int) -> dict[str, object]:
    """The counts of a run over `requests` requests.

    Raises:
        Fault: with the request that shows it.
    """
    statuses: Counter[int] = Counter()
    left = requests
    async with opened(home) as target:
        mutator = Mutator(seed, target.keys)

        async def work() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                sent: Sent = mutator.request()
                reply = await target.send(sent)
                statuses[reply.status] += 1
                fault = target.fault(sent, reply)
                if fault or target.log.leaks:
                    raise Fault(f"{fault or 'a leak in the log'}\n{sent}\n{reply}\n{target.log.leaks}")

        async with asyncio.TaskGroup() as workers:
            for _ in range(AT_A_TIME):
                workers.create_task(work())
        return {
            "requests": sum(statuses.values()),
            "statuses": {str(status): count for status, count in sorted(statuses.items())},
            "log_lines": target.log.lines,
            "faults": 0,
        }


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=5_000, help="how many (default 5,000)")
    parser.add_argument("--seed", type=int, default=0, help="of the generator (default 0)")
    parser.add_argument("--keep", action="store_true", help="keep the result as the last one")
    options = parser.parse_args()
    stamped, started = stamp(), time.process_time()
    with tempfile.TemporaryDirectory(dir=_SHM if _SHM.is_dir() else None) as folder:
        try:
            counts = asyncio.run(fuzz(Path(folder) / "home", options.requests, options.seed))
        except ExceptionGroup as group:
            print(group.exceptions[0])
            if not isinstance(group.exceptions[0], Fault):
                raise
            return 1
    result = {
        **stamped,
        "seed": options.seed,
        **counts,
        "cpu_seconds": round(time.process_time() - started, 1),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    if options.keep:
        keep("fuzz_requests", result)
    else:
        print(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())

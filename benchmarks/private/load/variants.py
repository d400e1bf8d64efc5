"""What each choice of decision 0057 is worth: the load figures with one thing different at a time.

    python benchmarks/private/load/variants.py --keep

All variants in turn, then all again in reverse, so that a machine that slows down favours none. The last run
is kept in benchmarks/results/private/service_load_variants.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from generator import closed_loop, open_loop
from kept import keep, stamp
from service_load import (
    ARMS,
    CAPACITY,
    CONNECTIONS,
    OVERLOAD,
    OVERLOAD_CONNECTIONS,
    free_port,
    prepare_generator,
    requests,
    running,
)

from reward_service import auth
from reward_service.auth import Scope
from reward_service.home import prepare_home

STUB = Path(__file__).with_name("varied_stub.py")
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "at most 4 ready sockets a turn": {"ready_a_turn": 4},
    "garbage collected every 10,000 objects": {"collect": [10_000, 20, 20]},
    "interpreter handed over every 5 ms": {"switch_interval_s": 0.005},
    "interpreter handed over every .05 ms": {"switch_interval_s": 0.00005},
    "checkpoints of SQLite in a thread": {"checkpoints_elsewhere": True},
    "one request inside": {"settings": {"max_waiting_arms": 2 * ARMS}},
}


def measure(variant: dict[str, Any], seconds: float) -> dict[str, float]:
    """Requests a second in a closed loop; p99 (ms) unloaded and at 4 times the capacity."""
    different = json.dumps(variant)
    slow = {**OVERLOAD, "max_waiting_arms": 4 * ARMS}  # one key has half of it
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        prepare_home(home)
        one = requests(auth.create_key(home, "load", [Scope.SCORE_REWARD]))
        port = free_port()
        fast = {"seconds_a_batch": 0}
        fast_variant = {name: value for name, value in variant.items() if name != "settings"}
        with running(STUB, str(home), str(port), json.dumps(fast), json.dumps(fast_variant), ready="ready"):
            closed = asyncio.run(closed_loop(port, CONNECTIONS, seconds, one))
        port = free_port()
        with running(STUB, str(home), str(port), json.dumps(slow), different, ready="ready"):
            asyncio.run(open_loop(port, 8, 20, 1, one))
            unloaded = asyncio.run(open_loop(port, 8, CAPACITY / 5, seconds, one))
            loaded = asyncio.run(open_loop(port, OVERLOAD_CONNECTIONS, 4 * CAPACITY, 2 * seconds, one))
    return {
        "requests_a_second": round(closed.statuses[200] / seconds, 1),
        "unloaded_p99_ms": round(1000 * unloaded.percentile(0.99), 2),
        "overload_p50_ms": round(1000 * loaded.percentile(0.5), 2),
        "overload_p99_ms": round(1000 * loaded.percentile(0.99), 2),
        "p99_ratio": round(loaded.percentile(0.99) / unloaded.percentile(0.99), 2),
        "admitted_a_second": round(loaded.statuses[200] / (2 * seconds), 1),
    }


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4, help="of a phase (default 4)")
    parser.add_argument("--only", default="", help="variants whose name this pattern is found in")
    parser.add_argument("--keep", action="store_true", help="keep the result as the last one")
    options = parser.parse_args()
    stamped = stamp()
    prepare_generator()
    chosen = [name for name in VARIANTS if re.search(options.only, name)]
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    for name in (*chosen, *reversed(chosen)):
        rounds[name].append(measure(VARIANTS[name], options.seconds))
        print(f"{name}: {rounds[name][-1]}", flush=True)
    result = {
        **stamped,
        "seconds_a_phase": options.seconds,
        "variants": {
            name: {
                "means": {
                    figure: round(statistics.fmean(once[figure] for once in both), 2) for figure in both[0]
                },
                "rounds": both,
            }
            for name, both in rounds.items()
        },
    }
    if options.keep:
        keep("service_load_variants", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())

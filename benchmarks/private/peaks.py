"""The rate of large matrix products on these cores, in float32, bfloat16 and 8 bits: a backend's ceiling.

    python benchmarks/private/peaks.py

Prints and writes benchmarks/results/private/peaks.json, GFLOP/s of all cores together.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from _servers import RESULTS, stamp
from throughput import peak_gflops


def main() -> int:
    result = {
        "note": stamp(),
        "gflops": {kind: round(peak_gflops(kind), 1) for kind in ("float32", "bfloat16", "int8")},
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "peaks.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

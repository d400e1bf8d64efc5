"""Print the tables of kept PPO runs: what decision 0068 quotes.

    python benchmarks/private/learning_tables.py [FILE]

Without FILE, those of `benchmarks/results/private/gsm8k_learning.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ppo_variants import tables

KEPT = Path(__file__).parents[1] / "results/private/gsm8k_learning.json"


def main() -> None:
    """The tables of the file named on the command line."""
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else KEPT
    kept = json.loads(file.read_text())
    together = [
        one | {"variant": f"{name.removesuffix('_seeds_together')}-{one['variant']}"}
        for name, found in kept.items()
        if name.endswith("_seeds_together")
        for one in found
    ]
    print("\n".join(tables(kept["runs"], together)))
    print("\n| several answers | questions | one | most frequent | any |\n|---|---|---|---|---|")
    for name, found in kept.items():
        if name.endswith("_answers"):
            print("\n".join(several_row(asked, one) for asked, one in found.items() if asked != "command"))


def several_row(asked: str, one: dict[str, Any]) -> str:
    """One line of the table of several answers to each question."""
    *_, any_of_them = one["pass_at"].values()
    return f"| {asked} | {one['n']} | {one['mean']:.1%} | {one['majority']:.1%} | {any_of_them:.1%} |"


if __name__ == "__main__":
    main()

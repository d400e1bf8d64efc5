"""How often the 95% intervals of `looper_eval.statistics` hold the truth at the size of GSM8K-Platinum.

For each accuracy the coverage of Wilson's interval is exact (a sum over all possible counts) and also
simulated; that of the paired difference is simulated for the accuracy, a gain and a share of discordant
pairs. Where several samples a question are drawn, the clustered interval of the mean and the interval of the
paired means are simulated, with questions of beta-distributed difficulty. Prints a markdown table;
`--out FILE` writes it. Takes a minute on one core.

    python benchmarks/interval_coverage.py --out benchmarks/results/interval_coverage.md
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.stats import binom

from looper_eval.statistics import (
    PairedTable,
    clustered_mean,
    paired_difference,
    paired_means,
    wilson_interval,
    z_value,
)

QUESTIONS = 1209
ACCURACIES = (0.05, 0.10, 0.25, 0.50, 0.75, 0.82, 0.90, 0.95, 0.98, 0.99)
GAINS = (0.0, 0.005, 0.02)
DISCORDANT = (0.02, 0.08, 0.20)
TARGET = (0.93, 0.97)
SAMPLES = 4
SPREAD = 2.0  # a + b of the beta distribution: questions are mostly hard or easy
CLUSTERED_ACCURACIES = (0.05, 0.25, 0.50, 0.82, 0.95, 0.99)


def exact_wilson_coverage(accuracy: float, questions: int) -> float:
    """The probability that Wilson's interval of a binomial count holds `accuracy`."""
    held = [
        count
        for count in range(questions + 1)
        if (interval := wilson_interval(count, questions)).low <= accuracy <= interval.high
    ]
    return float(binom.pmf(held, questions, accuracy).sum())


def simulated_wilson_coverage(
    accuracy: float, questions: int, draws: int, generator: np.random.Generator
) -> float:
    """The same by drawing counts."""
    counts, repeats = np.unique(generator.binomial(questions, accuracy, size=draws), return_counts=True)
    held = 0
    for count, repeat in zip(counts, repeats, strict=True):
        interval = wilson_interval(int(count), questions)
        held += int(repeat) * (interval.low <= accuracy <= interval.high)
    return held / draws


def simulated_paired_coverage(
    gain: float, discordant: float, questions: int, draws: int, generator: np.random.Generator
) -> float:
    """How often the interval of a paired difference holds `gain`; `discordant` is a share of all pairs."""
    gained, lost = (discordant + gain) / 2, (discordant - gain) / 2
    held = 0
    for up, down, rest in generator.multinomial(questions, [gained, lost, 1 - discordant], size=draws):
        result = paired_difference(
            PairedTable(both=int(rest), only_first=int(down), only_second=int(up), neither=0)
        )
        held += result.low <= gain <= result.high
    return held / draws


def simulated_clustered_coverage(
    accuracy: float, questions: int, draws: int, generator: np.random.Generator
) -> tuple[float, float]:
    """How often the intervals of the mean, and of the difference of two such models, hold the truth.

    Both models share the questions' difficulty, so that their answers are dependent within a question.
    """
    clusters = [index for index in range(questions) for _ in range(SAMPLES)]
    mean_held = pair_held = 0
    for _ in range(draws):
        chances = generator.beta(SPREAD * accuracy, SPREAD * (1 - accuracy), size=questions)
        first, second = (generator.binomial(SAMPLES, chances) for _ in range(2))
        values = [float(k < right) for right in first for k in range(SAMPLES)]
        found = clustered_mean(values, clusters)
        half = z_value(0.95) * found.standard_error
        mean_held += abs(found.mean - accuracy) <= half
        pair = paired_means(list(first / SAMPLES), list(second / SAMPLES), smallest=1 / SAMPLES)
        pair_held += pair.low <= 0.0 <= pair.high
    return mean_held / draws, pair_held / draws


def report(draws: int, seed: int) -> tuple[str, bool]:
    """The markdown report, and whether every coverage lies within the target."""
    generator = np.random.default_rng(seed)
    lines = [
        "# Coverage of the 95% intervals",
        "",
        f"n = {QUESTIONS} questions, {draws} draws, seed {seed}. Target: {TARGET[0]:.0%} to {TARGET[1]:.0%}.",
        "",
        "| accuracy | Wilson, exact | Wilson, simulated |",
        "|---|---|---|",
    ]
    coverages: list[float] = []
    for accuracy in ACCURACIES:
        exact = exact_wilson_coverage(accuracy, QUESTIONS)
        simulated = simulated_wilson_coverage(accuracy, QUESTIONS, draws, generator)
        coverages += [exact, simulated]
        lines.append(f"| {accuracy:.2f} | {exact:.2%} | {simulated:.2%} |")
    lines += ["", "| gain | discordant pairs | paired difference, simulated |", "|---|---|---|"]
    for gain in GAINS:
        for discordant in DISCORDANT:
            coverage = simulated_paired_coverage(gain, discordant, QUESTIONS, draws, generator)
            coverages.append(coverage)
            lines.append(f"| {gain:.3f} | {discordant:.2f} | {coverage:.2%} |")
    fewer = draws // 10
    lines += [
        "",
        f"{SAMPLES} samples a question, {fewer} draws:",
        "",
        "| accuracy | clustered mean | paired means |",
        "|---|---|---|",
    ]
    for accuracy in CLUSTERED_ACCURACIES:
        pair = simulated_clustered_coverage(accuracy, QUESTIONS, fewer, generator)
        coverages += pair
        lines.append(f"| {accuracy:.2f} | {pair[0]:.2%} | {pair[1]:.2%} |")
    good = all(TARGET[0] <= coverage <= TARGET[1] for coverage in coverages)
    lines += ["", f"All within the target: {'yes' if good else 'NO'}."]
    return "\n".join(lines) + "\n", good


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the report; the exit code is 1 when a coverage misses the target."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--draws", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    text, good = report(options.draws, options.seed)
    print(text, end="")
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""Signs that a run goes wrong: collapse of a consistency reward, and plain trouble.

A reward for agreement can be earned by agreeing on anything; the known signs are entropy and distinct answers
that fall, and coherence that rises while correctness does not (arXiv:2505.21444, 2603.08660, 2512.13070). The
thresholds here are alarms for a person, not decisions: nothing stops because of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median
from typing import Any, Literal, NamedTuple

Row = dict[str, Any]

WINDOW = 5  # rows at the beginning and at the end that are compared
ENTROPY_LEFT = 0.2  # share of the first entropy below which it has collapsed
COHERENCE_GAIN = 0.1  # rise of s_wm that should come with correctness
FEW_ANSWERS = 1.2  # distinct answers a question
DEV_LOSS = 0.05  # fall of dev accuracy below its best
FAILED_SHARE = 0.1
TRUNCATED_SHARE = 0.5
STALL_STEPS, STALL_AT_LEAST_S = 10.0, 120.0


class Alarm(NamedTuple):
    """One sign: a name to test by, how bad it is, and a sentence for a person."""

    name: str
    level: Literal["warning", "alarm"]
    text: str


def alarms(rows: Sequence[Row], silent_s: float | None = None, expected: int | None = None) -> list[Alarm]:
    """The signs in a run's metrics, the worst first.

    Args:
        rows: of `metrics.jsonl`, in order.
        silent_s: seconds since the last one was written; None if that is not known.
        expected: steps the run will have; once it has them, silence is no sign.
    """
    steps = [row for row in rows if row.get("step", 0) > 0]
    found = [
        *_collapse(steps),
        *_trouble(steps),
        *_dev(rows),
        *_stall(steps, silent_s, expected),
    ]
    return sorted(found, key=lambda alarm: alarm.level != "alarm")


def _numbers(rows: Sequence[Row], key: str) -> list[float]:
    return [row[key] for row in rows if isinstance(row.get(key), int | float)]


def _ends(rows: Sequence[Row], key: str) -> tuple[float, float] | None:
    """Means of the first and of the last rows that have `key`; None while they overlap."""
    values = _numbers(rows, key)
    if len(values) < 2 * WINDOW:
        return None
    return fmean(values[:WINDOW]), fmean(values[-WINDOW:])


def _collapse(steps: Sequence[Row]) -> list[Alarm]:
    found = []
    entropy = _ends(steps, "entropy")
    if entropy and entropy[1] < ENTROPY_LEFT * entropy[0]:
        text = (
            f"Entropy fell from {entropy[0]:.3f} to {entropy[1]:.3f} nats a token: the policy repeats itself."
        )
        found.append(Alarm("entropy", "alarm", text))
    coherence, correct = _ends(steps, "s_wm"), _ends(steps, "correct_rate")
    if coherence and correct and coherence[1] - coherence[0] >= COHERENCE_GAIN and correct[1] <= correct[0]:
        text = (
            f"Coherence rose from {coherence[0]:.2f} to {coherence[1]:.2f} and correctness did not "
            f"({correct[0]:.1%} to {correct[1]:.1%}): completions agree on wrong answers."
        )
        found.append(Alarm("wrong_consensus", "alarm", text))
    answers = _ends(steps, "distinct_answers_mean")
    if answers and answers[0] > 1.5 and answers[1] < FEW_ANSWERS and correct and correct[1] < 0.9:
        text = f"Distinct answers a question fell from {answers[0]:.2f} to {answers[1]:.2f}."
        found.append(Alarm("few_answers", "warning", text))
    return found


def _trouble(steps: Sequence[Row]) -> list[Alarm]:
    found = []
    last = steps[-WINDOW:]
    failed = sum(_numbers(last, "questions_failed"))
    asked = failed + sum(_numbers(last, "questions_scored"))
    if asked and failed / asked > FAILED_SHARE:
        text = f"{failed} of the last {asked} questions have no score: look at the reward service."
        found.append(Alarm("unscored", "alarm", text))
    truncated = _numbers(last, "truncation_rate")
    if truncated and fmean(truncated) > TRUNCATED_SHARE:
        text = f"{fmean(truncated):.0%} of the completions are cut off: raise max_new_tokens."
        found.append(Alarm("truncated", "warning", text))
    if steps and "policy_loss" in steps[-1] and steps[-1]["policy_loss"] is None:
        found.append(Alarm("not_finite", "alarm", "The last policy loss is not finite."))
    return found


def _dev(rows: Sequence[Row]) -> list[Alarm]:
    measured = _numbers(rows, "dev_accuracy")
    if len(measured) < 2 or max(measured) - measured[-1] < DEV_LOSS:
        return []
    text = f"Dev accuracy is {measured[-1]:.1%}, after {max(measured):.1%} at its best."
    return [Alarm("dev_accuracy", "warning", text)]


def _stall(steps: Sequence[Row], silent_s: float | None, expected: int | None) -> list[Alarm]:
    timed = [sum(row["seconds"].values()) for row in steps if isinstance(row.get("seconds"), dict)]
    if silent_s is None or not timed or (expected is not None and steps[-1]["step"] >= expected):
        return []
    if silent_s < max(STALL_AT_LEAST_S, STALL_STEPS * median(timed)):
        return []
    text = f"No step for {silent_s:.0f} s, where one takes {median(timed):.1f} s: is it over, or waiting?"
    return [Alarm("stalled", "warning", text)]

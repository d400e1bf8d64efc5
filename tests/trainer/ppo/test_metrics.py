"""The alarm for a policy that learns to agree with itself."""

from __future__ import annotations

from typing import Any

import pytest

from looper_trainer.ppo.metrics import collapses


def run_of(accuracies: list[float], coherences: list[float | None]) -> list[dict[str, Any]]:
    """Two steps before each evaluation, whose mean coherence is the one given."""
    lines: list[dict[str, Any]] = []
    for accuracy, coherence in zip(accuracies, coherences, strict=True):
        low, high = (None, None) if coherence is None else (coherence - 0.1, coherence + 0.1)
        lines += [{"s_wm": low}, {"s_wm": high, "dev_accuracy": accuracy}]
    return lines


@pytest.mark.parametrize(
    ("accuracies", "coherences", "alarm"),
    [
        ([0.5, 0.4, 0.2], [0.5, 0.6, 0.7], True),
        ([0.2, 0.5, 0.4, 0.2], [0.9, 0.5, 0.6, 0.7], True),  # only the last three count
        ([0.5, 0.4, 0.45], [0.5, 0.6, 0.7], False),  # accuracy recovers
        ([0.5, 0.4, 0.2], [0.5, 0.6, 0.6], False),  # coherence stands still
        ([0.5, 0.4, 0.2], [0.7, 0.6, 0.5], False),  # both fall
        ([0.5, 0.4], [0.5, 0.6], False),  # too early to tell
        ([0.5, 0.4, 0.2], [None, None, None], False),  # the service discloses no components
    ],
)
def test_the_alarm_sounds_when_coherence_rises_while_dev_accuracy_falls(
    accuracies: list[float], coherences: list[float | None], alarm: bool
) -> None:
    assert collapses(run_of(accuracies, coherences)) is alarm

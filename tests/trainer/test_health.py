"""Alarms on runs made by hand: each sign alone, and none on a run that goes well."""

from __future__ import annotations

from typing import Any

import pytest

from looper_trainer.health import alarms


def healthy(steps: int = 20) -> list[dict[str, Any]]:
    """Entropy falls a little, coherence and correctness rise together."""
    return [
        {
            "step": n,
            "entropy": 1.0 - 0.01 * n,
            "s_wm": 0.3 + 0.01 * n,
            "correct_rate": 0.2 + 0.01 * n,
            "distinct_answers_mean": 3.0 - 0.02 * n,
            "truncation_rate": 0.1,
            "questions_scored": 16,
            "questions_failed": 0,
            "policy_loss": 0.01,
            "seconds": {"sample": 4.0, "update": 1.0},
        }
        for n in range(1, steps + 1)
    ]


def names(rows: list[dict[str, Any]], **more: Any) -> list[str]:
    return [alarm.name for alarm in alarms(rows, **more)]


def test_a_run_that_goes_well_raises_nothing() -> None:
    assert names([{"step": 0, "dev_accuracy": 0.2}, *healthy()], silent_s=3.0, expected=100) == []
    assert names([]) == []


def test_too_few_steps_are_no_evidence_of_collapse() -> None:
    rows = [row | {"entropy": 1.0 if row["step"] < 3 else 0.0} for row in healthy(9)]
    assert names(rows) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda n: {"entropy": 1.0 if n < 8 else 0.1}, "entropy"),
        (lambda n: {"correct_rate": 0.2}, "wrong_consensus"),
        (lambda n: {"distinct_answers_mean": 3.0 if n < 8 else 1.0}, "few_answers"),
        (lambda n: {"truncation_rate": 0.1 if n < 15 else 0.9}, "truncated"),
        (lambda n: {"questions_failed": 4 if n > 17 else 0}, "unscored"),
        (lambda n: {"policy_loss": None if n == 20 else 0.1}, "not_finite"),
    ],
)
def test_each_sign_is_named(change: Any, expected: str) -> None:
    assert names([row | change(row["step"]) for row in healthy()]) == [expected]


def test_a_fall_of_dev_accuracy_below_its_best_is_a_warning() -> None:
    rows = [{"step": n, "dev_accuracy": value} for n, value in ((0, 0.30), (10, 0.42), (20, 0.36))]
    (alarm,) = alarms(rows)
    assert (alarm.name, alarm.level) == ("dev_accuracy", "warning")
    assert "36.0%" in alarm.text
    assert "42.0%" in alarm.text


def test_silence_is_a_sign_only_while_steps_are_missing() -> None:
    assert names(healthy(), silent_s=119.0, expected=100) == []
    assert names(healthy(), silent_s=200.0, expected=100) == ["stalled"]
    assert names(healthy(), silent_s=200.0, expected=20) == []


def test_a_text_where_a_number_belongs_counts_for_nothing() -> None:
    odd = {"questions_failed": "many", "questions_scored": "few", "truncation_rate": "high", "entropy": "low"}
    assert names([*healthy(), {"step": 21, **odd}]) == []


def test_the_worst_comes_first() -> None:
    rows = [row | {"truncation_rate": 0.9, "correct_rate": 0.2} for row in healthy()]
    assert [alarm.level for alarm in alarms(rows)] == ["alarm", "warning"]

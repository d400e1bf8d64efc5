"""The entailment judge over a stub whose probabilities are written down, worked by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from regime_w.judges import JudgeError
from regime_w.nli_judge import MOST_PIECES, NliJudge, Piece
from regime_w.scoring import ArmResult


class Table:
    """P(entailment) from a table, 0 elsewhere; a text's pieces are its parts between bars, a token a word."""

    identity = "table"
    concurrency = 1

    def __init__(self, table: dict[tuple[str, str], float]) -> None:
        self.table = table
        self.asked: list[tuple[str, str]] = []

    def pieces(self, text: str) -> list[Piece]:
        return [Piece(part, len(part.split())) for part in text.split("|")]

    def entailed(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        self.asked += pairs
        return [self.table.get(pair, 0.0) for pair in pairs]


def arm(text: str) -> ArmResult:
    return ArmResult("1", text)


def verdict(model: Table, a: str, b: str) -> float:
    (value,) = NliJudge(model).judge_pairs("q", [(arm(a), arm(b))])
    return value


def test_the_verdict_is_the_lower_of_both_directions() -> None:
    model = Table({("a", "b"): 0.9, ("b", "a"): 0.2})
    assert verdict(model, "a", "b") == verdict(model, "b", "a") == pytest.approx(0.2)
    assert sorted(model.asked) == [("a", "b"), ("a", "b"), ("b", "a"), ("b", "a")]


def test_pieces_count_by_length_with_their_best_premise() -> None:
    model = Table(
        {
            ("one", "x y z"): 0.5,  # of four tokens of the hypothesis, three
            ("two", "x y z"): 0.8,
            ("one", "w"): 0.4,  # and one
            ("x y z", "one"): 1.0,
            ("w", "two"): 0.6,
        }
    )
    forward = 3 / 4 * 0.8 + 1 / 4 * 0.4  # .7
    backward = 1 / 2 * 1.0 + 1 / 2 * 0.6  # .8
    assert min(forward, backward) == pytest.approx(0.7)
    assert verdict(model, "one|two", "x y z|w") == pytest.approx(0.7)


def test_a_text_that_says_everything_agrees_no_more_than_it_is_entailed() -> None:
    everything = Table({("all", "a"): 1.0, ("all", "b"): 1.0, ("a", "all"): 0.1, ("b", "all"): 0.05})
    assert verdict(everything, "all", "a") == pytest.approx(0.1)
    assert verdict(everything, "all", "b") == pytest.approx(0.05)


@pytest.mark.parametrize("empty", ["", " \n\t"])
def test_an_arm_without_reasoning_agrees_with_nothing_and_is_not_asked_about(empty: str) -> None:
    model = Table({("a", empty): 1.0, (empty, "a"): 1.0})
    assert verdict(model, "a", empty) == verdict(model, empty, empty) == 0.0
    assert model.asked == []


def test_what_is_not_read_counts_as_not_entailed() -> None:
    long = "|".join(["a"] * (2 * MOST_PIECES))
    assert verdict(Table({("a", "a"): 1.0}), long, "a") == pytest.approx(0.5)


def test_verdicts_are_kept_by_content_in_either_order_unless_asked_afresh() -> None:
    model = Table({("a", "b"): 0.9, ("b", "a"): 0.2})
    judge = NliJudge(model, entries=8)
    pairs = [(arm("a"), arm("b")), (arm("b"), arm("a")), (arm("a"), arm("b"))]
    assert judge.judge_pairs("q", pairs) == pytest.approx([0.2] * 3)
    assert judge.judge_pairs("another question", pairs[:1]) == pytest.approx([0.2])
    assert len(model.asked) == 2
    model.table["b", "a"] = 0.3
    assert judge.judge_pairs("q", pairs[:1], fresh=True) == pytest.approx([0.3])
    assert judge.judge_pairs("q", pairs[:1]) == pytest.approx([0.2])  # what was said first stands


@pytest.mark.parametrize("value", [float("nan"), 1.5, -0.1])
def test_what_is_no_probability_is_no_verdict_and_is_not_kept(value: float) -> None:
    model = Table({("a", "b"): value, ("b", "a"): value})
    judge = NliJudge(model, entries=8)
    with pytest.raises(JudgeError):
        judge.judge_pairs("q", [(arm("a"), arm("b"))])
    model.table = {("a", "b"): 0.5, ("b", "a"): 0.5}
    assert judge.judge_pairs("q", [(arm("a"), arm("b"))]) == pytest.approx([0.5])


def test_a_model_that_fails_is_no_verdict_and_its_message_is_not_passed_on() -> None:
    class Broken(Table):
        def entailed(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
            raise RuntimeError(f"cannot read {pairs[0][0]}")

    with pytest.raises(JudgeError) as caught:
        NliJudge(Broken({})).judge_pairs("q", [(arm("sesame"), arm("b"))])
    assert "sesame" not in str(caught.value)
    assert caught.value.__cause__ is None

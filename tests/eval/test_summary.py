"""The figures of a folder from hand-made records; expectations are counted by hand or come from scipy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from scipy.stats import binomtest

from looper_eval.cli import main
from looper_eval.summary import compare
from looper_eval.tables import markdown, sentence
from looper_trainer.errors import UserError

MakeResults = Callable[..., Path]
RIGHT, WRONG, CUT, NONE = (
    ("Answer: #### 5", "stop"),
    ("Answer: #### 4", "stop"),
    ("Answer: #### 5", "length"),
    ("Well.", "stop"),
)
# Ten questions of gold 5. Model a is right on 0-3, model b on 2-8, model c on 2-9.
A = [RIGHT] * 4 + [WRONG, WRONG, CUT, NONE, NONE, CUT]
B = [WRONG, CUT] + [RIGHT] * 7 + [NONE]
C = [WRONG, WRONG] + [RIGHT] * 8


def test_models_are_counted_and_truncated_or_unparsed_answers_are_wrong(make_results: MakeResults) -> None:
    summary = compare(make_results({"a": A, "b": B}, ["5"] * 10))
    a = summary.model("a")
    assert (a.n, a.correct, a.wrong, a.unparsed, a.truncated) == (10, 4, 2, 2, 2)
    assert a.accuracy == 0.4
    # The graders judge the text alone: two more answers of a say 5 where they were cut off.
    assert {name: share.correct for name, share in a.graders.items()} == {"robust": 6, "platinum": 6}
    b = summary.model("b")
    assert (b.correct, b.wrong, b.unparsed, b.truncated) == (7, 1, 1, 1)
    # 5 words an answer but for "Well.", which is 1.
    assert (a.tokens_mean, a.tokens_median, a.tokens_max) == (pytest.approx((8 * 3 + 2 * 1) / 10), 3.0, 3)


def test_intervals_and_tests_are_those_of_scipy_on_the_right_counts(make_results: MakeResults) -> None:
    summary = compare(make_results({"a": A, "b": B, "c": C}, ["5"] * 10))
    wilson = binomtest(4, 10).proportion_ci(method="wilson")
    assert summary.model("a").interval == pytest.approx((wilson.low, wilson.high))
    assert [(one.a, one.b) for one in summary.pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    first = summary.pairs[0]
    # a alone: 0, 1. b alone: 4 to 8. Both: 2, 3. Neither: 9.
    assert first.table.model_dump() == {"both": 2, "only_a": 2, "only_b": 5, "neither": 1}
    assert first.difference == pytest.approx(0.3)
    # Seven differences of size 1, mean .3: sum of squares 7 - 10 * .09 = 6.1; SE = sqrt(6.1 / 9 / 10).
    assert first.se == pytest.approx((6.1 / 90) ** 0.5)
    assert first.interval == pytest.approx((0.3 - 1.959964 * first.se, 0.3 + 1.959964 * first.se), abs=1e-6)
    assert first.p == pytest.approx(binomtest(2, 7).pvalue)
    p = [binomtest(2, 7).pvalue, binomtest(2, 8).pvalue, 1.0]  # pairs ab, ac, bc
    assert [one.p for one in summary.pairs] == pytest.approx(p)
    # Holm: the smallest (ac) times 3, then ab times 2, never less than the one before.
    assert summary.pairs[1].p_holm == pytest.approx(3 * p[1])
    assert summary.pairs[0].p_holm == pytest.approx(max(3 * p[1], 2 * p[0]))


def test_breakdown_levels_add_up_to_the_whole(make_results: MakeResults) -> None:
    solutions = ["<<1+1=2>>2"] * 4 + ["<<1+1=2>>2\n\n<<2+3=5>>5"] * 5 + ["\n".join(["1 + 1 = 2"] * 9)]
    summary = compare(make_results({"a": A, "b": B}, ["5"] * 10, solutions))
    rows = summary.breakdowns["solution lines"]
    assert [(row.level, row.n, row.models["a"].correct, row.models["b"].correct) for row in rows] == [
        ("1", 4, 4, 2),
        ("2", 5, 0, 5),
        ("8+", 1, 0, 0),
    ]
    assert [row.level for row in summary.breakdowns["calculator steps"]] == ["1", "2", "8+"]
    assert "cleaning status" not in summary.breakdowns


def test_other_graders_judge_the_recorded_text(
    make_results: MakeResults, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [
        ("#### 5.0", "stop"),
        ("Answer: 10 - 5 = 5", "stop"),
        ("#### 5", "length"),
        ("the 5 #### 6", "stop"),
    ]
    out = make_results({"a": texts}, ["5"] * 4)
    correct = {
        name: compare(out, name).models[0].correct
        for name in ("robust", "platinum", "lm-eval-strict", "lm-eval-flexible")
    }
    # robust: 5.0 is 5, the last stated number counts, a truncated answer does not.
    # The official rule reads 10 in the second, and 5 in the fourth: the first number of its last line.
    # lm-eval compares text: 5.0 is not 5; strict needs ####; flexible takes the last number.
    assert correct == {"robust": 2, "platinum": 3, "lm-eval-strict": 1, "lm-eval-flexible": 2}
    assert main(["compare", str(out), "--grader", "guess"]) == 2
    assert "unknown grader 'guess'; known: platinum, robust" in capsys.readouterr().err


def test_summary_file_is_recomputed_from_the_records(make_results: MakeResults) -> None:
    out: Path = make_results({"a": A, "b": B}, ["5"] * 10)
    expected = compare(out)
    (out / "summary.json").write_text("{}")
    assert main(["compare", str(out)]) == 0
    assert json.loads((out / "summary.json").read_text()) == expected.model_dump(mode="json")


def test_unfinished_models_are_named_and_left_out(make_results: MakeResults) -> None:
    out: Path = make_results({"a": A, "b": B}, ["5"] * 10)
    kept = (out / "b.jsonl").read_text().splitlines(keepends=True)[:9]
    (out / "b.jsonl").write_text("".join(kept))
    summary = compare(out)
    assert ([one.name for one in summary.models], summary.unfinished, summary.pairs) == (["a"], ("b",), ())
    (out / "a.jsonl").unlink()
    with pytest.raises(UserError, match="no such file"):
        compare(out)


def test_one_question_or_no_change_at_all_is_summarised(make_results: MakeResults) -> None:
    summary = compare(make_results({"a": [RIGHT], "b": [WRONG]}, ["5"]))
    assert summary.pairs == ()
    assert "#" in markdown(summary)


def test_sentence_claims_a_difference_only_when_the_corrected_p_does(make_results: MakeResults) -> None:
    summary = compare(
        make_results(
            {"a": [WRONG] * 12, "b": [RIGHT] * 8 + [WRONG] * 4, "c": [RIGHT] * 9 + [WRONG] * 3}, ["5"] * 12
        )
    )
    assert summary.pairs[0].p_holm == pytest.approx(2 * 0.5**7)  # 8 of 8 one-sided, doubled, times 2
    assert sentence(summary, "a", "b").startswith("b answers more questions correctly than a (+66.7 points")
    # One discordant pair: nothing is said about what a difference would need.
    assert "cannot be told apart" in sentence(summary, "b", "c")
    assert "missed" not in sentence(summary, "b", "c")


def test_sentence_without_a_claim_says_what_the_sample_could_not_show(make_results: MakeResults) -> None:
    # 100 questions, 7 fixed and 5 broken: (1.959964 + .841621) * sqrt(.12 / 100) = 9.7 points.
    a = [RIGHT] * 5 + [WRONG] * 7 + [RIGHT] * 88
    b = [WRONG] * 5 + [RIGHT] * 7 + [RIGHT] * 88
    summary = compare(make_results({"a": a, "b": b}, ["5"] * 100))
    assert "a true difference below 9.7 points would often be missed" in sentence(summary, "a", "b")

"""Several samples a question: asked once each, widened, counted with clustered errors and unbiased pass@k."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import statsmodels.api as sm
from scipy.stats import binomtest, ttest_rel

from looper_eval import statistics
from looper_eval.cli import main
from looper_eval.dataset import Dataset, EvalQuestion, questions_digest
from looper_eval.engines import Answer, Answered, Ask
from looper_eval.generate import Unfinished, answer_all, grade, load_answers
from looper_eval.manifest import ModelEntry, open_folder
from looper_eval.settings import Settings
from looper_eval.summary import Summary, compare
from looper_eval.tables import pass_table
from looper_schemas.records import to_line

SETTINGS = Settings(temperature=0.8, seed=5)
DIGEST = SETTINGS.digest("folder:x")
QUESTIONS = tuple(EvalQuestion(id=f"q/{n}", question=f"Number {n}?", answer="5") for n in range(12))


class Recording:
    """Says its seed, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Ask] = []

    def answers(self, batches: Sequence[Sequence[Ask]]) -> Iterator[Answered]:
        asks = [ask for batch in batches for ask in batch]
        self.asked += asks
        for place in reversed(range(len(asks))):  # in any order
            yield [(place, [Answer(f"seed {seed}\nAnswer: #### 5", "stop", 3) for seed in asks[place].seeds])]

    def close(self) -> None:
        pass


def run(path: Path, samples: int) -> Recording:
    engine = Recording()
    answer_all(path, QUESTIONS, SETTINGS, DIGEST, lambda: engine, batch_size=5, samples=samples)
    return engine


def test_every_sample_has_its_seed_and_more_samples_ask_only_for_the_new_ones(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    assert [len(ask.seeds) for ask in run(path, 1).asked] == [1] * 12
    first = path.read_bytes()
    engine = run(path, 4)
    assert path.read_bytes().startswith(first)
    for ask in engine.asked:
        assert len(ask.seeds) == 3
        assert ask.seeds[1] - ask.seeds[0] == ask.seeds[2] - ask.seeds[1] == 1  # one request for vLLM
    records = load_answers(path, QUESTIONS, DIGEST, 4)
    assert [(one.id, one.sample) for one in records] == [(q.id, s) for q in QUESTIONS for s in range(4)]
    assert len({one.output for one in records}) == 48
    assert [one.sample for one in load_answers(path, QUESTIONS, DIGEST, 2)] == [0, 1] * 12
    with pytest.raises(Unfinished, match="12 of 60 answers are missing"):
        load_answers(path, QUESTIONS, DIGEST, 5)


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.93])
def test_a_file_that_ends_within_a_question_asks_for_its_other_samples(tmp_path: Path, cut: float) -> None:
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    run(whole, 3)
    content = whole.read_bytes()
    torn.write_bytes(content[: int(cut * len(content))])
    kept = torn.read_bytes().count(b"\n")
    engine = run(torn, 3)
    assert sum(len(ask.seeds) for ask in engine.asked) == 36 - kept
    assert sorted(torn.read_bytes().splitlines()) == sorted(content.splitlines())


def summarised(out: Path, right: dict[str, list[list[bool]]]) -> Summary:
    """The summary of models whose samples are right as `right` says, question by question."""
    samples = len(next(iter(right.values()))[0])
    entries = {name: ModelEntry(place=name, identity=name) for name in right}
    dataset = Dataset("hand-made.jsonl", questions_digest(QUESTIONS), QUESTIONS)
    manifest = open_folder(out, dataset, SETTINGS, entries, samples)
    for name, groups in right.items():
        lines = [
            to_line(grade(item, Answer(f"#### {5 if flag else 6}", "stop", 2), manifest.digest(name), sample))
            for item, group in zip(QUESTIONS, groups, strict=True)
            for sample, flag in enumerate(group)
        ]
        (out / f"{name}.jsonl").write_text("".join(lines))
    return compare(out)


def drawn(seed: int, samples: int) -> list[list[bool]]:
    rng = random.Random(seed)
    chances = [rng.random() for _ in QUESTIONS]
    return [[rng.random() < chance for _ in range(samples)] for chance in chances]


def test_accuracy_and_its_error_are_statsmodels_cluster_robust_ones(tmp_path: Path) -> None:
    right = {"a": drawn(1, 4), "b": drawn(2, 4)}
    summary = summarised(tmp_path / "out", right)
    for name, groups in right.items():
        values = np.array([float(flag) for group in groups for flag in group])
        clusters = np.repeat(np.arange(len(groups)), 4)
        fit = sm.OLS(values, np.ones_like(values)).fit(
            cov_type="cluster", cov_kwds={"groups": clusters, "use_correction": False}
        )
        model = summary.model(name)
        assert model.n == 48
        assert model.accuracy == pytest.approx(fit.params[0])
        # Ours has the small-sample factor G / (G - 1).
        error = float(fit.bse[0]) * (12 / 11) ** 0.5
        assert model.standard_error == pytest.approx(error)
        assert model.interval[0] == pytest.approx(max(0, model.accuracy - 1.959964 * error), abs=1e-6)


def test_pass_at_k_is_the_mean_over_all_subsets_of_k_samples(tmp_path: Path) -> None:
    groups = drawn(3, 6)
    summary = summarised(tmp_path / "out", {"a": groups})
    assert list(summary.models[0].pass_at) == ["1", "2", "4", "6"]
    for k, value in summary.models[0].pass_at.items():
        naive = [mean(any(chosen) for chosen in itertools.combinations(group, int(k))) for group in groups]
        assert value == pytest.approx(mean(naive))


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        ("5 5 6 7", 1.0),
        ("5 6 6 7", 0.0),
        ("5 6 5 6", 0.5),  # two answers are as frequent: either would be given
        ("5 6 7 8", 0.25),
        ("5 5.0 6 6", 0.5),  # one number, written in two ways
        ("5 none none none", 1.0),  # what states no answer has no vote
        ("5 6! 6! 6!", 1.0),  # nor has what was cut off
        ("none none none none", 0.0),
    ],
)
def test_the_majority_of_the_samples_is_their_most_frequent_answer(
    outputs: str, expected: float, tmp_path: Path
) -> None:
    dataset = Dataset("hand-made.jsonl", questions_digest(QUESTIONS[:1]), QUESTIONS[:1])
    manifest = open_folder(tmp_path, dataset, SETTINGS, {"a": ModelEntry(place="a", identity="a")}, 4)
    answers = [
        Answer(
            "no idea" if word == "none" else f"#### {word.strip('!')}", "length" if "!" in word else "stop", 2
        )
        for word in outputs.split()
    ]
    lines = [
        to_line(grade(QUESTIONS[0], answer, manifest.digest("a"), sample))
        for sample, answer in enumerate(answers)
    ]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    (model,) = compare(tmp_path).models
    assert model.majority == expected
    columns, (row,) = pass_table(compare(tmp_path))
    assert (columns[-1], row[-1]) == ("maj@4", f"{100 * expected:.2f}%")


def test_models_are_compared_by_the_paired_t_test_on_question_means(tmp_path: Path) -> None:
    right = {"a": drawn(1, 4), "b": drawn(2, 4)}
    (pair,) = summarised(tmp_path / "out", right).pairs
    first, second = ([mean(map(float, group)) for group in right[name]] for name in "ab")
    expected = ttest_rel(second, first)
    assert pair.difference == pytest.approx(mean(second) - mean(first))
    assert pair.p == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval(0.95)
    assert pair.interval == pytest.approx((interval.low, interval.high))
    mostly = [[sum(group) > 2 for group in right[name]] for name in "ab"]
    assert pair.table.only_b == sum(b and not a for a, b in zip(*mostly, strict=True))


def test_models_without_any_difference_are_not_certain_to_be_equal() -> None:
    same = statistics.paired_means([0.5, 0.25, 1.0], [0.5, 0.25, 1.0], smallest=0.25)
    assert (same.difference, same.p) == (0.0, 1.0)
    assert same.low < 0 < same.high


def test_samples_that_all_fail_are_no_proof_beyond_their_questions(tmp_path: Path) -> None:
    summary = summarised(tmp_path / "out", {"a": [[False] * 4] * 12})
    wilson = binomtest(0, 12).proportion_ci(method="wilson")  # 12 questions, not 48 answers
    assert summary.models[0].interval == pytest.approx((wilson.low, wilson.high))


def test_report_and_card_of_several_samples_say_so(tmp_path: Path) -> None:
    out = tmp_path / "out"
    summarised(out, {"a": drawn(1, 4), "b": drawn(2, 4)})
    assert main(["report", str(out)]) == 0
    text = (out / "report.md").read_text()
    assert "12 questions, 4 samples each" in text
    assert "| model | pass@1 | pass@2 | pass@4 |" in text
    assert "paired t-test" in text
    assert "McNemar" not in text
    page = (out / "report.html").read_text()
    assert "b #4" in page
    assert main(["card", str(out), "--name", "b"]) == 0
    assert "4 samples each" in (out / "card-b.md").read_text()


def test_greedy_samples_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "q.jsonl"
    data.write_text(json.dumps({"question": "Q?", "answer": "#### 1"}) + "\n")
    call = [
        "run",
        "--model",
        "m=http://127.0.0.1:1/v1#m",
        "--dataset",
        str(data),
        "--out",
        str(tmp_path / "o"),
    ]
    assert main([*call, "--samples", "3"]) == 2
    assert "--samples above 1 needs --temperature" in capsys.readouterr().err
    assert main([*call, "--samples", "0"]) == 2
    assert not (tmp_path / "o").exists()

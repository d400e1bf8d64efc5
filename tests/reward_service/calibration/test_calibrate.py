"""From a file of rollouts to the report: labels, what is refused, every figure of a small case by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from looper_schemas.problems import ProblemCode
from looper_schemas.records import RolloutRecord, Trajectory, write_records
from looper_schemas.scoring import FailedQuestion, Question, QuestionError, RewardMode
from regime_w.embedding import Vectors
from regime_w.scorer import Analysis, Scorer
from regime_w.scoring import RegimeWScores
from regime_w.settings import RegimeWSettings
from reward_service.calibration.command import calibrate
from reward_service.calibration.rollouts import is_of_test_split, observe, plurality_is_right
from reward_service.cli import main
from reward_service.errors import StartError
from reward_service.settings import Settings


def record(name: str, *texts: str, gold: str = "8") -> RolloutRecord:
    trajectories = tuple(Trajectory(output=text, final_answer=None, reward=None) for text in texts)
    return RolloutRecord(
        id=name, question=f"What, {name}?", gold_answer=gold, trajectories=trajectories, policy="p"
    )


class Letters:
    identity = "letters"

    def embed(self, texts: Sequence[str]) -> Vectors:
        rows = [[text.count(letter) + 0.5 for letter in "abcdefgh"] for text in texts]
        return np.array(rows, dtype=np.float32).reshape(-1, 8)


# Three questions: two arms of three are right and agree; all are wrong, two alike; one of two is right.
RECORDS = [
    record("gsm8k/train/1", "ab 3 + 5 = 8\n#### 8", "ba 3 + 5 = 8, so 8\n#### 8", "fgh 3 * 5 = 15\n#### 15"),
    record("gsm8k/train/2", "abc 1 + 1 = 2\n#### 7", "cab 1 + 1 = 2 it is\n#### 7", "ggg\n#### 6"),
    record("gsm8k/train/3", "aaaa\n#### 8", "hhhh\n#### 9"),
]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gsm8k/test/17", True),
        ("gsm8k-test-0001", True),
        ("GSM8K_TEST_4", True),
        ("madrylab/gsm8k-platinum/3", True),
        ("test12", True),
        ("gsm8k/train/17", False),
        ("gsm8k/dev/17", False),
        ("contest/4", False),
        ("latest-9", False),
    ],
)
def test_a_test_split_is_known_by_a_word_of_the_id(name: str, expected: bool) -> None:
    assert is_of_test_split(name) is expected


def test_rows_are_what_the_scorer_says_of_each_arm() -> None:
    scorer = Scorer(RegimeWSettings(copies_threshold=None), embedder=Letters())
    observed = observe([*RECORDS, record("gsm8k/train/4", "#### 8")], scorer)
    assert observed.arm_labels_A.tolist() == [1, 1, 0, 0, 0, 0, 1, 0]
    assert observed.arm_groups_A.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert observed.question_labels_Q.tolist() == [1, 0, 1]  # of two answers given once, the first counts
    assert (observed.failed, observed.left_out) == (0, 1)
    assert observed.question_scores["s_end"].tolist() == pytest.approx([1 / 3, 1 / 3, 0.0])
    assert observed.arm_scores["s_end"].tolist() == [0.5, 0.5, 0.0, 0.5, 0.5, 0.0, 0.0, 0.0]
    assert observed.arm_scores["s_cf"].tolist() == [0.0] * 3 + [0.5, 0.5, 0.0] + [0.0] * 2
    for name in ("s_end", "s_path", "s_cf", "s_wm"):  # the mean of the shares is the score
        for q, group in enumerate(([0, 1, 2], [3, 4, 5], [6, 7])):
            assert observed.arm_scores[name][group].mean() == pytest.approx(observed.question_scores[name][q])
    gated = observed.rewards[RewardMode.ARM_GATED]
    assert gated[observed.arm_labels_A == 0].tolist() == [-0.5] * 5
    assert observed.rewards_without_gold[RewardMode.ARM_GATED].tolist() == [0.0] * 8
    arm = observed.rewards[RewardMode.ARM]
    assert arm.tolist() == pytest.approx(
        [
            (1.0 if label else -0.5) + 0.7 * share
            for label, share in zip(observed.arm_labels_A, observed.arm_scores["s_wm"], strict=True)
        ]
    )


def test_the_services_arms_are_told_by_their_place() -> None:
    seen: list[Question] = []

    class Spy:
        scorer_id = "spy"

        def analyse(self, questions: Sequence[Question]) -> list[FailedQuestion]:
            seen.extend(questions)
            error = QuestionError(code=ProblemCode.SCORER_FAILED, retryable=True)
            return [FailedQuestion(id=question.id, error=error) for question in questions]

    eight = record("q", *["#### 8"] * 8)
    assert observe([eight], Spy(), service_arms=True).failed == 1
    assert [arm.arm for arm in seen.pop().arms] == list(range(8))
    observe([eight], Spy())
    assert [arm.arm for arm in seen.pop().arms] == [None] * 8
    with pytest.raises(StartError, match="not those of the service"):
        observe(RECORDS, Spy(), service_arms=True)


def test_the_plurality_answer_is_the_most_frequent_one_and_of_several_the_first() -> None:
    def right(answers: Sequence[str | None], gold: str) -> bool:
        scores = RegimeWScores(None, None, None, 0.0, False, ())
        return plurality_is_right(Analysis(tuple(answers), tuple(a == gold for a in answers), scores))

    assert right(["1", "2", "2"], "2")
    assert not right(["1", "2", "2"], "1")
    assert right(["1", "2"], "1")
    assert right([None, None, None, "2"], "2")
    assert not right([None, None], "2")


@pytest.fixture
def report(tmp_path: Path) -> dict[str, Any]:
    rollouts = tmp_path / "rollouts.jsonl"
    write_records(rollouts, RECORDS)
    scorer = Scorer(RegimeWSettings(copies_threshold=None), embedder=Letters())
    said = calibrate(rollouts, tmp_path / "out", Settings(home=tmp_path), resamples=50, analyst=scorer)
    assert str(tmp_path / "out" / "calibration.html") in said
    report: dict[str, Any] = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert report["scorer_id"] == scorer.scorer_id
    return report


def test_every_figure_of_a_small_case_by_hand(report: dict[str, Any]) -> None:
    assert (report["questions"], report["arms"], report["arms_right"]) == (3, 8, 3)
    assert report["questions_whose_plurality_is_right"] == 2
    # s_end of arms: right ones .5 .5 0, wrong ones 0 .5 .5 0 0. Of 15 pairs: .5 beats 0 in 2 * 3 = 6, equals
    # .5 in 2 * 2; 0 equals 0 in 3 and loses to .5 in 2.
    arms = report["discrimination"]["arm"]
    assert arms["s_end"]["auroc"]["value"] == pytest.approx((6 + 0.5 * 4 + 0.5 * 3) / 15)
    # At threshold .5, 2 of 4 are right (recall 2/3); at 0, 3 of 8.
    assert arms["s_end"]["average_precision"]["value"] == pytest.approx(2 / 3 * 1 / 2 + 1 / 3 * 3 / 8)
    modes = report["reward_modes"]
    assert {mode: one["questions_with_right_and_wrong_arms"] for mode, one in modes.items()} == {
        "question": 2, "arm": 2, "arm_gated": 2,
    }  # fmt: skip
    assert modes["question"]["auroc_within_questions"] == 0.5
    assert modes["arm_gated"]["auroc_within_questions"] == 1.0
    assert modes["arm_gated"]["auroc_within_questions_without_gold"] == 0.5
    # In `question` every arm of questions 1 and 3 earns at least 1: two of five wrong arms.
    assert modes["question"]["wrong_arms_with_positive_reward"] == pytest.approx(2 / 5)
    assert modes["arm_gated"]["wrong_arms_with_positive_reward"] == 0.0
    assert modes["arm_gated"]["mean_reward_of_wrong_arms"] == -0.5
    risk = report["risk_coverage"]["s_end"]  # two questions of 1/3, one wrong; then the one of 0, right
    assert risk["coverage"] == pytest.approx([2 / 3, 1.0])
    assert risk["risk"] == pytest.approx([1 / 2, 1 / 3])
    assert risk["area"] == pytest.approx(2 / 3 * 1 / 2 + 1 / 3 * 1 / 3)
    assert risk["area_of_no_score"] == pytest.approx(1 / 3)
    assert risk["area_of_a_perfect_score"] == pytest.approx(1 / 3 * 1 / 3)
    histogram = report["histograms"]["s_end"]
    assert (histogram["right"][0], histogram["right"][10]) == (1, 2)
    assert (histogram["wrong"][0], histogram["wrong"][10]) == (3, 2)
    assert report["weights"]["as_set"] == {"s_end": 0.4, "s_path": 0.3, "s_cf": 0.3}
    assert report["weights"]["auroc"]["as set"]["value"] == arms["s_wm"]["auroc"]["value"]
    assert report["weights"]["auroc"]["fitted: s_end"]["value"] is None  # three questions make no five folds
    assert set(report["weights"]["fits"]) == {
        "fitted: s_end + s_path + s_cf", "fitted: s_path + s_cf", "fitted: s_end + s_cf",
        "fitted: s_end + s_path", "fitted: s_end", "fitted: s_path", "fitted: s_cf",
    }  # fmt: skip


def test_folds_and_weights_of_a_larger_file(tmp_path: Path) -> None:
    """Arms of one letter agree and are right; the other component is noise, so the fit leaves it out."""
    rng = np.random.default_rng(0)

    class Known:
        scorer_id = "known"

        def analyse(self, questions: Sequence[Question]) -> list[Analysis]:
            found = []
            for question in questions:
                correct = tuple("#### 8" in (arm.full_text or "") for arm in question.arms)
                parts = tuple((0.3 * c + 0.1 * rng.random(), rng.random(), 0.5) for c in correct)
                shares = tuple(0.4 * end + 0.3 * path + 0.15 for end, path, _ in parts)
                whole = np.mean(parts, axis=0).tolist()
                scores = RegimeWScores(*whole, float(np.mean(shares)), False, shares, parts)
                found.append(Analysis(tuple(str(c) for c in correct), correct, scores))
            return found

    rollouts = tmp_path / "rollouts.jsonl"
    texts = [f"#### {rng.choice([8, 9])}" for _ in range(120)]
    write_records(rollouts, [record(f"train/{i}", *texts[4 * i : 4 * i + 4]) for i in range(30)])
    calibrate(rollouts, tmp_path, Settings(home=tmp_path), resamples=20, analyst=Known())
    report = json.loads((tmp_path / "calibration.json").read_text())
    weights = report["weights"]
    assert weights["auroc"]["fitted: s_end"]["value"] == 1.0
    assert weights["auroc"]["fitted: s_path + s_cf"]["value"] < 0.7
    assert weights["auroc"]["as set"]["value"] < 1.0
    assert weights["fits"]["fitted: s_end + s_path + s_cf"]["as_weights"]["s_end"] > 0.9
    assert "after_logistic_scaling" in report["reliability"]["arm"]


class Page(HTMLParser):
    """Every tag, address and visible word of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_is_well_formed_and_loads_and_runs_nothing(report: dict[str, Any], tmp_path: Path) -> None:
    text = (tmp_path / "out" / "calibration.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.addresses == []
    assert "script" not in page.tags
    assert "url(" not in text
    assert not re.search(r"https?://", text)
    assert page.tags.count("svg") == 2 + 2 + 1 + 4  # intervals, reliability, risk, histograms
    words = " ".join(page.words)
    for figure in (
        report["discrimination"]["arm"]["s_wm"]["auroc"]["value"],
        report["risk_coverage"]["s_cf"]["area"],
    ):
        assert f"{figure:.3f}" in words
    assert "What, gsm8k" not in text  # no text of a question or an arm
    assert "NaN" not in text
    assert "nan" not in words


def test_a_name_of_a_file_cannot_speak_html(tmp_path: Path) -> None:
    rollouts = tmp_path / "<script>alert(1)<&script>.jsonl"
    write_records(rollouts, RECORDS)
    calibrate(rollouts, tmp_path, Settings(home=tmp_path), resamples=5, analyst=Scorer(embedder=Letters()))
    assert "script" not in Page((tmp_path / "calibration.html").read_text()).tags


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([record("gsm8k/test/1", "#### 8", "#### 9")], "test split"),
        ([record("a", "#### 8", "#### 8")], "all right or all wrong"),
        ([record("a", "#### 8")], "all right or all wrong"),
        ([], "holds no records"),
        (None, "no such file"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    records: list[RolloutRecord] | None,
    words: str,
) -> None:
    monkeypatch.setenv("REWARD_SERVICE_HOME", str(tmp_path / "home"))
    rollouts = tmp_path / "rollouts.jsonl"
    if records is not None:
        write_records(rollouts, records)
    with pytest.raises(SystemExit) as caught:
        main(["calibrate", str(rollouts), "--out", str(tmp_path / "out")])
    assert caught.value.code == 2
    written = capsys.readouterr()
    assert written.err.count("\n") == 1
    assert words in written.err
    assert not (tmp_path / "out").exists()


def test_the_command_scores_with_the_services_own_scorer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also a test split, when allowed."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "settings.toml").write_text('[scorer]\nembedding_device = "cpu"\n')
    monkeypatch.setenv("REWARD_SERVICE_HOME", str(home))
    rollouts = tmp_path / "rollouts.jsonl"
    write_records(rollouts, [record("gsm8k/test/1", "ab\n#### 8", "cd\n#### 9"), *RECORDS])
    main(["calibrate", str(rollouts), "--out", str(tmp_path / "out"), "--allow-test", "--resamples", "9"])
    assert "4 questions (0 more were not scored), 10 arms" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert report["scorer_id"] == Scorer(RegimeWSettings(embedding_device="cpu")).scorer_id
    assert report["resamples"] == 9

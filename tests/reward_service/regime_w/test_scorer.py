"""The scorer on questions of the wire contract: parsing, failures, determinism, identity."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from looper_schemas.problems import ProblemCode
from looper_schemas.scoring import Arm, FailedQuestion, Question, RewardMode, ScoredQuestion
from regime_w import scorer as scorer_module
from regime_w.embedding import Vectors
from regime_w.judges import EquationsJudge, Pairs
from regime_w.scorer import Scorer, parse_arm
from regime_w.scoring import ArmResult, JudgeError
from regime_w.settings import RegimeWSettings, RewardSettings, Weights

MODE = RewardMode.ARM_GATED


class LetterEmbedder:
    """Counts of letters: a tiny embedder that anyone can check. Fails on `poison`, or returns NaN for it."""

    identity = "letters"

    def __init__(self, poison: str | None = None, *, raises: bool = True) -> None:
        self.poison = poison
        self.raises = raises

    def embed(self, texts: Sequence[str]) -> Vectors:
        if self.raises and self.poison is not None and any(self.poison in text for text in texts):
            raise RuntimeError("poisoned")
        rows = np.array([[text.count(letter) for letter in "abcdefghij"] for text in texts], dtype=np.float32)
        rows = rows.reshape(-1, 10)
        for row, text in zip(rows, texts, strict=True):
            if self.poison is not None and self.poison in text:
                row[0] = math.nan
        return rows


def question(name: str, texts: Sequence[str], gold: str | None = "12") -> Question:
    arms = tuple(Arm(id=f"{name}{i}", full_text=text) for i, text in enumerate(texts))
    return Question(id=name, question="How many?", gold_answer=gold, arms=arms)


GOOD = question(
    "good", ["bad ace 4 * 6 = 24, 24 / 2 = 12\n#### 12", "cab 4 * 6 = 24\n#### 12", "gibe\n#### 7"]
)


def test_the_gold_answer_is_read_once_whatever_the_number_of_arms(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    own = scorer_module.extract_answer
    monkeypatch.setattr(scorer_module, "extract_answer", lambda text: read.append(text) or own(text))
    arms = tuple(
        Arm(id=str(i), answer=answer, full_text="") for i, answer in enumerate(["12.0", "$12", "7", "x"])
    )
    asked = Question(id="q", question="How many?", gold_answer="24/2", arms=arms)
    (result,) = Scorer(embedder=LetterEmbedder()).score([asked], MODE)
    assert scored(result).correct_flags == (True, True, False, False)
    assert read.count("24/2") == 1


def scored(result: ScoredQuestion | FailedQuestion) -> ScoredQuestion:
    assert isinstance(result, ScoredQuestion)
    return result


def test_one_question_by_hand() -> None:
    (result,) = Scorer(embedder=LetterEmbedder()).score([GOOD], MODE)
    result = scored(result)
    # Letters a..j of "bad ace": a2 b1 c1 d1 e1, of "cab": a1 b1 c1, of "gibe": b1 e1 g1 i1
    first, second, third = (2, 1, 1, 1, 1), (1, 1, 1), None
    cos_12 = (2 + 1 + 1) / math.sqrt(8 * 3)
    cos_13 = (1 + 1) / math.sqrt(8 * 4)
    cos_23 = 1 / math.sqrt(3 * 4)
    assert (sum(x * x for x in first), sum(x * x for x in second), third) == (8, 3, None)
    s_end, s_path, s_cf = 1 / 3, (cos_12 + cos_13 + cos_23) / 3, 1 / 3
    assert result.scores is not None
    assert result.scores.s_end == pytest.approx(s_end)
    assert result.scores.s_path == pytest.approx(s_path, abs=1e-7)
    assert result.scores.s_cf == pytest.approx(s_cf)  # {24} and {24} agree; the third has no equation
    assert result.scores.s_wm == pytest.approx(0.4 * s_end + 0.3 * s_path + 0.3 * s_cf, abs=1e-7)
    assert result.correct_flags == (True, True, False)
    share_1 = 0.4 * 0.5 + 0.3 * (cos_12 + cos_13) / 2 + 0.3 * 0.5
    share_2 = 0.4 * 0.5 + 0.3 * (cos_12 + cos_23) / 2 + 0.3 * 0.5
    rewards = [arm.reward for arm in result.arms]
    assert rewards == pytest.approx([1 + 0.7 * share_1, 1 + 0.7 * share_2, -0.5], abs=1e-7)
    assert [arm.id for arm in result.arms] == ["good0", "good1", "good2"]
    assert result.reward == pytest.approx(sum(rewards) / 3)
    assert not result.degenerate


def test_a_given_answer_counts_before_the_text() -> None:
    assert parse_arm(Arm(id="0", answer="$1,000", full_text="#### 5")).answer == "1000"
    assert parse_arm(Arm(id="0", answer="", full_text="#### 5")).answer is None


def test_without_a_given_answer_the_text_is_read_and_reasoning_stands_in_for_it() -> None:
    arm = parse_arm(Arm(id="0", full_text="2 + 3 = 5\nAnswer: #### 5"))
    assert (arm.answer, arm.reasoning) == ("5", "2 + 3 = 5")
    assert parse_arm(Arm(id="0", reasoning="2 + 3 = 5\n#### 5")) == arm
    both = parse_arm(Arm(id="0", reasoning="2 + 3 = 5", full_text="2 + 3 = 5\n#### 6"))
    assert both == ArmResult("6", "2 + 3 = 5")


def test_the_arm_index_decides_the_family() -> None:
    assert [parse_arm(Arm(id="0", arm=i, full_text="")).family for i in (0, 7)] == ["wolfram", "maudlin"]


def test_an_arm_index_that_the_service_does_not_have_is_an_invalid_question() -> None:
    strange = Question(id="q", question="?", arms=(Arm(id="0", arm=8, full_text="5"),))
    bad, good = Scorer(embedder=LetterEmbedder()).score([strange, GOOD], MODE)
    assert isinstance(bad, FailedQuestion)
    assert (bad.error.code, bad.error.retryable) == (ProblemCode.INVALID_REQUEST, False)
    scored(good)


@pytest.mark.parametrize("raises", [True, False])
def test_a_failing_embedder_fails_its_question_only_and_never_scores_zero(raises: bool) -> None:
    bad = question("bad", ["the poison in here\n#### 12", "fine\n#### 12"])
    scorer = Scorer(embedder=LetterEmbedder("poison", raises=raises))
    first, second, third = scorer.score([GOOD, bad, question("one", [])], MODE)
    assert isinstance(second, FailedQuestion)
    assert (second.error.code, second.error.retryable) == (ProblemCode.SCORER_FAILED, True)
    assert [first] == Scorer(embedder=LetterEmbedder()).score([GOOD], MODE)
    assert scored(third).degenerate


def test_a_failing_judge_fails_the_question_and_never_scores_zero() -> None:
    class Broken:
        identity = "broken"
        concurrency = 1

        def judge_pairs(self, question: str, pairs: Pairs, *, fresh: bool = False) -> list[float]:
            raise JudgeError("no verdict")

    (result,) = Scorer(embedder=LetterEmbedder(), judge=Broken()).score([GOOD], MODE)
    assert isinstance(result, FailedQuestion)
    assert result.error.retryable


def test_failures_log_nothing_that_the_caller_sent(caplog: pytest.LogCaptureFixture) -> None:
    secret = question("s", ["poison sesame", "poison sesame"])
    Scorer(embedder=LetterEmbedder("poison")).score([secret], MODE)
    assert caplog.records
    assert "sesame" not in caplog.text


@pytest.mark.parametrize("count", [0, 1])
def test_a_question_of_fewer_than_two_arms_is_degenerate(count: int) -> None:
    (result,) = Scorer(embedder=LetterEmbedder()).score([question("q", ["#### 12"] * count)], MODE)
    result = scored(result)
    assert result.scores is not None
    assert (result.scores.s_end, result.scores.s_path, result.scores.s_cf) == (None, None, None)
    assert (result.scores.s_wm, result.degenerate) == (0.0, True)
    assert result.reward == (1.0 if count else -0.5)


def test_no_answers_at_all() -> None:
    (result,) = Scorer(embedder=LetterEmbedder()).score([question("q", ["who knows", "nobody does"])], MODE)
    result = scored(result)
    assert result.scores is not None
    assert result.scores.s_end == 0.0
    assert result.correct_flags == (False, False)


def test_without_gold_nothing_is_known_to_be_correct() -> None:
    (result,) = Scorer(embedder=LetterEmbedder()).score([question("q", ["#### 12", "#### 12"], None)], MODE)
    assert scored(result).correct_flags == (None, None)
    assert scored(result).reward == 0.0


def test_a_batch_scores_as_each_question_alone_and_in_any_order() -> None:
    rng = random.Random(1)
    words = ["bad", "cab", "3", "+", "4", "=", "7", "face", "2", "*", "6", "=", "12", "jig"]
    batch = [
        question(
            f"q{i}", [" ".join(rng.choices(words, k=9)) + f"\n#### {rng.choice([7, 12])}" for _ in range(i)]
        )
        for i in range(7)
    ]
    for mode in RewardMode:
        together = Scorer(embedder=LetterEmbedder()).score(batch, mode)
        alone = [Scorer(embedder=LetterEmbedder()).score([q], mode)[0] for q in batch]
        assert together == alone
        assert Scorer(embedder=LetterEmbedder()).score(batch[::-1], mode) == together[::-1]


def test_the_order_of_arms_does_not_matter() -> None:
    scorer = Scorer(embedder=LetterEmbedder())
    for mode in RewardMode:
        (before,) = scorer.score([GOOD], mode)
        (after,) = scorer.score([GOOD.model_copy(update={"arms": GOOD.arms[::-1]})], mode)
        assert scored(after).scores == scored(before).scores
        assert scored(after).reward == scored(before).reward
        assert set(scored(after).arms) == set(scored(before).arms)


def test_no_questions_give_no_results() -> None:
    assert Scorer(embedder=LetterEmbedder()).score([], MODE) == []


def test_questions_of_several_requests_may_share_an_id() -> None:
    other = question("good", ["face 9 + 9 = 18\n#### 18", "jig\n#### 18"])
    scorer = Scorer(embedder=LetterEmbedder())
    assert scorer.score([GOOD, other], MODE) == [*scorer.score([GOOD], MODE), *scorer.score([other], MODE)]


def test_the_scorer_id_is_opaque_stable_and_follows_settings_models_and_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def identity(settings: RegimeWSettings | None = None, name: str = "letters") -> str:
        embedder = LetterEmbedder()
        embedder.identity = name
        return Scorer(settings, embedder=embedder).scorer_id

    first = identity()
    assert identity() == first
    assert set(first) <= set("0123456789abcdef")
    others = {
        identity(RegimeWSettings(weights=Weights(end=1.0, path=0.0, cf=0.0))),
        identity(RegimeWSettings(reward=RewardSettings(coherence=0.0))),
        identity(RegimeWSettings(copies_threshold=None)),
        identity(name="other"),
    }
    assert len(others | {first}) == 5
    assert identity(RegimeWSettings(embedding_cache_entries=1)) == first  # changes no score
    (tmp_path / "code.py").write_text("print('other code')")
    monkeypatch.setattr(scorer_module, "__file__", str(tmp_path / "scorer.py"))
    assert identity() not in others | {first}


def test_settings_change_scores() -> None:
    settings = RegimeWSettings(weights=Weights(end=1.0, path=0.0, cf=0.0))
    (result,) = Scorer(settings, embedder=LetterEmbedder(), judge=EquationsJudge()).score([GOOD], MODE)
    assert scored(result).scores is not None
    assert scored(result).scores.s_wm == pytest.approx(1 / 3)  # type: ignore[union-attr]


def test_the_reward_range_is_that_of_the_settings() -> None:
    settings = RegimeWSettings(reward=RewardSettings(correct=2.0, wrong=-1.0, coherence=0.5))
    bounds = Scorer(settings, embedder=LetterEmbedder()).reward_range(MODE)
    assert (bounds.low, bounds.high) == (-1.0, 2.5)


def test_a_question_that_comes_again_is_not_scored_again_and_answers_the_same_under_its_new_id() -> None:
    class Counting(LetterEmbedder):
        asked = 0

        def embed(self, texts: Sequence[str]) -> Vectors:
            Counting.asked += len(texts)
            return super().embed(texts)

    scorer = Scorer(RegimeWSettings(embedding_cache_entries=0), embedder=Counting())
    (first,) = scorer.score([GOOD], MODE)
    (again,) = scorer.score([GOOD.model_copy(update={"id": "again"})], MODE)
    assert again == scored(first).model_copy(update={"id": "again"})
    assert Counting.asked == 3
    scorer.score([GOOD], RewardMode.QUESTION)  # another mode is another result
    scorer.score([GOOD.model_copy(update={"gold_answer": "7"})], MODE)
    assert Counting.asked == 9


def test_a_fresh_score_uses_and_keeps_nothing_of_what_was_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = LetterEmbedder()
    scorer = Scorer(embedder=embedder)
    (before,) = scorer.score([GOOD], MODE)
    assert scorer.score([GOOD], MODE, fresh=True) == [before]
    monkeypatch.setattr(embedder, "embed", lambda texts: np.ones((len(texts), 10), dtype=np.float32))
    monkeypatch.setattr("regime_w.judges.results_of", lambda arm: frozenset((Fraction(1),)))
    monkeypatch.setattr(scorer_module, "parse_arm", lambda arm: ArmResult("7", arm.full_text or ""))
    (drifted,) = scorer.score([GOOD], MODE, fresh=True)
    scores = scored(drifted).scores
    assert scores is not None
    assert scores.model_dump() == pytest.approx({"s_end": 1.0, "s_path": 1.0, "s_cf": 1.0, "s_wm": 1.0})
    assert scorer.score([GOOD], MODE) == [before]


def test_a_failed_question_is_not_remembered() -> None:
    embedder = LetterEmbedder("bad")
    scorer = Scorer(embedder=embedder)
    assert isinstance(scorer.score([GOOD], MODE)[0], FailedQuestion)
    embedder.poison = None
    scored(scorer.score([GOOD], MODE)[0])


def test_results_with_warm_and_cold_memories_are_equal() -> None:
    warm = Scorer(embedder=LetterEmbedder())
    cold = RegimeWSettings(embedding_cache_entries=0, arm_cache_entries=0, score_cache_entries=0)
    mixed = question("mixed", [GOOD.arms[0].full_text or "", "jig 9 + 9 = 18\n#### 18"])
    for batch in ([GOOD], [mixed], [GOOD, mixed], [mixed, GOOD]):
        assert warm.score(batch, MODE) == Scorer(cold, embedder=LetterEmbedder()).score(batch, MODE)

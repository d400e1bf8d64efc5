"""`Scorer`: questions of the wire contract in, their scores and rewards out.

All arms of all questions of a call are embedded together. A part that fails makes its question *failed*,
never zero: a call that fails as a whole is tried again question by question, so that one bad text does not
take the others down.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import looper_schemas
from looper_schemas.answers import extract_answer, split_final_answer
from looper_schemas.problems import PROBLEMS, ProblemCode
from looper_schemas.scoring import (
    Arm,
    ArmReward,
    FailedQuestion,
    Question,
    QuestionError,
    RewardMode,
    RewardRange,
    ScoredQuestion,
    Scores,
)
from regime_w.arms import family_of
from regime_w.caches import CachedEmbedder, Memory, digest_of
from regime_w.embedding import Embedder, TransformerEmbedder, Vectors
from regime_w.judges import Judge, make_judge
from regime_w.reward import compute_reward, reward_range
from regime_w.scoring import ArmResult, RegimeWScores, compute_regime_w_scores
from regime_w.settings import FREE_SETTINGS, RegimeWSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Parsed:
    question: Question
    arms: tuple[ArmResult, ...]
    correct: tuple[bool | None, ...]


@dataclass(frozen=True)
class Analysis:
    """A question's n canonical answers, its n flags of correctness (None: no gold answer), and its scores."""

    answers: tuple[str | None, ...]
    correct: tuple[bool | None, ...]
    scores: RegimeWScores


class Scorer:
    """Scores questions; deterministic, and the same for a question alone and among others.

    `scorer_id` is a digest of the scoring code, the settings and the models: equal ids give equal rewards.
    `concurrency` calls of `score` with about `batch_arms` arms each keep the embedder busy.

    Raises:
        regime_w.model_files.EmbeddingUnavailable: the embedding model cannot be loaded.
        regime_w.judges.JudgeUnavailable: the judge cannot be made; `llm` has to be given.
    """

    def __init__(
        self,
        settings: RegimeWSettings | None = None,
        embedder: Embedder | None = None,
        judge: Judge | None = None,
    ) -> None:
        self.settings = settings or RegimeWSettings()
        self.concurrency = self.batch_arms = 1
        if embedder is None:
            embedder = TransformerEmbedder(
                self.settings.embedding_model,
                backend=self.settings.embedding_backend,
                device=self.settings.embedding_device,
                streams=self.settings.embedding_streams,
            )
            # While the streams work on some calls, others are parsed and scored.
            self.concurrency = embedder.streams + 2
            self.batch_arms = 8 if embedder.device == "cpu" else 256
        self._embedder = CachedEmbedder(embedder, self.settings.embedding_cache_entries)
        self._plain_embedder = embedder
        self._judge = judge or make_judge(self.settings)
        if self._judge.concurrency > 1:
            # A slow judge: the questions of one call wait for each other, those of several calls do not.
            self.concurrency = max(self.concurrency, self._judge.concurrency)
            self.batch_arms = min(self.batch_arms, 8)
        self.scorer_id = _scorer_id(self.settings, self._embedder.identity, self._judge.identity)
        self._arms: Memory[tuple[str | None, str]] = Memory(
            self.settings.arm_cache_entries, self.settings.arm_cache_bytes, lambda arm: len(arm[1])
        )
        entries = self.settings.score_cache_entries
        self._scores: Memory[ScoredQuestion] = Memory(entries, 64 * entries, lambda q: 1 + len(q.arms))

    def score(
        self, questions: Sequence[Question], mode: RewardMode, *, fresh: bool = False
    ) -> list[ScoredQuestion | FailedQuestion]:
        """One result a question, in order, with all components. Never raises for what a question holds.

        Question ids may repeat, so that a caller can score several requests together. With `fresh` nothing
        that was computed before is used, nor is the result kept: what a check of the scorer itself needs.
        """
        keys = [_content(question, mode) for question in questions]
        known = [None if fresh else self._scores.get(key) for key in keys]
        parsed = [
            self._parse(question, fresh) if kept is None else kept
            for question, kept in zip(questions, known, strict=True)
        ]
        embedder = self._plain_embedder if fresh else self._embedder
        vectors = iter(self._embed([p for p in parsed if isinstance(p, _Parsed)], embedder))
        results: list[ScoredQuestion | FailedQuestion] = []
        for question, key, part in zip(questions, keys, parsed, strict=True):
            if isinstance(part, ScoredQuestion):
                results.append(part.model_copy(update={"id": question.id}))
                continue
            result = self._score_one(part, next(vectors), mode, fresh) if isinstance(part, _Parsed) else part
            if isinstance(result, ScoredQuestion) and not fresh:
                self._scores.put(key, result)
            results.append(result)
        return results

    def analyse(self, questions: Sequence[Question]) -> list[Analysis | FailedQuestion]:
        """What the rewards of every mode are made of, a question each, in order; nothing is kept."""
        parsed = [self._parse(question, fresh=False) for question in questions]
        vectors = iter(self._embed([p for p in parsed if isinstance(p, _Parsed)], self._embedder))
        results: list[Analysis | FailedQuestion] = []
        for part in parsed:
            if isinstance(part, FailedQuestion):
                results.append(part)
                continue
            scores = self._components(part, next(vectors), fresh=False)
            if not isinstance(scores, FailedQuestion):
                results.append(Analysis(tuple(arm.answer for arm in part.arms), part.correct, scores))
            else:
                results.append(scores)
        return results

    def reward_range(self, mode: RewardMode) -> RewardRange:
        """The interval of every reward in `mode`, without the length penalty."""
        return reward_range(mode, self.settings.reward)

    def _parse(self, question: Question, fresh: bool) -> _Parsed | FailedQuestion:
        read = parse_arm if fresh else self._parse_arm
        try:
            arms = tuple(read(arm) for arm in question.arms)
        except IndexError:
            return _failed(question, ProblemCode.INVALID_REQUEST)
        # Both sides are canonical, and the gold answer, which may be long, is read once.
        gold = None if question.gold_answer is None else extract_answer(question.gold_answer)
        correct = tuple(
            None if question.gold_answer is None else arm.answer is not None and arm.answer == gold
            for arm in arms
        )
        return _Parsed(question, arms, correct)

    def _parse_arm(self, arm: Arm) -> ArmResult:
        """As `parse_arm`, each text once."""
        key = digest_of(
            *("-" if part is None else f"+{part}" for part in (arm.answer, arm.reasoning, arm.full_text))
        )
        kept = self._arms.get(key)
        if kept is not None:
            return ArmResult(kept[0], kept[1], family_of(arm.arm))
        result = parse_arm(arm)
        self._arms.put(key, (result.answer, result.reasoning))
        return result

    def _embed(self, parsed: Sequence[_Parsed], embedder: Embedder) -> list[Vectors | None]:
        """The (n, d) vectors of each question, in order; None where the embedder failed."""
        if not parsed:
            return []
        try:
            rows = embedder.embed([arm.reasoning for p in parsed for arm in p.arms])
        except Exception as error:
            # The kind of error only: its message might quote a text.
            logger.error("embedding %d questions together failed: %s", len(parsed), type(error).__name__)
            if len(parsed) == 1:
                return [None]
            return [part for p in parsed for part in self._embed([p], embedder)]
        return list(np.split(rows, np.cumsum([len(p.arms) for p in parsed])[:-1]))

    def _score_one(
        self, parsed: _Parsed, vectors: Vectors | None, mode: RewardMode, fresh: bool
    ) -> ScoredQuestion | FailedQuestion:
        question = parsed.question
        scores = self._components(parsed, vectors, fresh)
        if isinstance(scores, FailedQuestion):
            return scores
        rewards = compute_reward(
            mode,
            parsed.correct,
            scores.s_wm,
            scores.shares,
            [arm.tokens_out for arm in question.arms],
            gold_known=question.gold_answer is not None,
            settings=self.settings.reward,
        )
        return ScoredQuestion(
            id=question.id,
            reward=rewards.question,
            degenerate=scores.degenerate,
            scores=Scores(s_end=scores.s_end, s_path=scores.s_path, s_cf=scores.s_cf, s_wm=scores.s_wm),
            correct_flags=parsed.correct,
            arms=tuple(
                ArmReward(id=arm.id, reward=reward)
                for arm, reward in zip(question.arms, rewards.arms, strict=True)
            ),
        )

    def _components(
        self, parsed: _Parsed, vectors: Vectors | None, fresh: bool
    ) -> RegimeWScores | FailedQuestion:
        question = parsed.question
        if vectors is None:
            return _failed(question, ProblemCode.SCORER_FAILED)
        try:
            return compute_regime_w_scores(
                parsed.arms,
                vectors,
                lambda pairs: self._judge.judge_pairs(question.question, pairs, fresh=fresh),
                self.settings,
            )
        except Exception as error:
            logger.error("scoring a question failed: %s", type(error).__name__)
            return _failed(question, ProblemCode.SCORER_FAILED)


def parse_arm(arm: Arm) -> ArmResult:
    """What `arm` said. Its `answer` field counts where given; else the answer is sought in its text.

    Raises:
        IndexError: the service has no arm of this index.
    """
    full_text = arm.full_text if arm.full_text is not None else arm.reasoning or ""
    reasoning = arm.reasoning if arm.reasoning is not None else full_text
    answer = extract_answer(full_text if arm.answer is None else arm.answer)
    return ArmResult(answer=answer, reasoning=split_final_answer(reasoning)[0], family=family_of(arm.arm))


def _failed(question: Question, code: ProblemCode) -> FailedQuestion:
    return FailedQuestion(id=question.id, error=QuestionError(code=code, retryable=PROBLEMS[code].retryable))


def _content(question: Question, mode: RewardMode) -> bytes:
    """A name of everything that the scores of `question` depend on: all of it but its id."""
    return digest_of(mode.value, question.model_dump_json(exclude={"id"}))


def _scorer_id(settings: RegimeWSettings, *identities: str) -> str:
    """An opaque digest of everything that scores depend on."""
    digest = hashlib.blake2b(digest_size=16)
    folders = [Path(__file__).parent, Path(looper_schemas.__file__).parent]
    sources = [path for folder in folders for path in sorted(folder.glob("*.py")) if path.name != "demo.py"]
    parts = [
        *(path.read_bytes() for path in sources),
        settings.model_dump_json(exclude=set(FREE_SETTINGS)).encode(),
        np.__version__.encode(),
        *(identity.encode() for identity in identities),
    ]
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()

"""Scores of 657 real questions with four labelled solutions each, against published labels and references.

The references come from another implementation. It embedded texts without their calculator annotations, cut
at the model's window, read equations inside these annotations only, and knew no copies. s_end and correctness
have one definition and must be equal.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from looper_schemas.scoring import Arm, Question, RewardMode, ScoredQuestion
from regime_w.embedding import TransformerEmbedder, Vectors
from regime_w.scorer import Scorer
from regime_w.scoring import s_path_for_question


class NoEmbedder:
    identity = "none"

    def embed(self, texts: list[str]) -> Vectors:
        return np.zeros((len(texts), 2), dtype=np.float32)


def as_questions(rows: list[dict[str, Any]]) -> list[Question]:
    """An arm whose answer is null has none: it is sent with empty text."""
    return [
        Question(
            id=row["qid"],
            question=row["question"],
            gold_answer=row["gold"],
            arms=tuple(
                Arm(id=arm["name"], full_text=arm["text"] if arm["answer"] is not None else "")
                for arm in row["arms"]
            ),
        )
        for row in rows
    ]


def score(rows: list[dict[str, Any]], scorer: Scorer) -> list[ScoredQuestion]:
    results = scorer.score(as_questions(rows), RewardMode.ARM_GATED)
    assert all(isinstance(result, ScoredQuestion) for result in results)
    return results  # type: ignore[return-value]


def test_s_end_and_correctness_equal_the_references_on_every_question(
    real_questions: list[dict[str, Any]],
) -> None:
    results = score(real_questions, Scorer(embedder=NoEmbedder()))
    assert len(results) == 657
    for row, result in zip(real_questions, results, strict=True):
        assert result.scores is not None
        assert result.scores.s_end == pytest.approx(row["ref"]["s_end"], abs=1e-6)
        assert result.correct_flags == tuple(arm["correct"] for arm in row["arms"])


def test_s_cf_equals_the_reference_where_only_annotations_hold_equations(
    real_questions: list[dict[str, Any]],
) -> None:
    results = score(real_questions, Scorer(embedder=NoEmbedder()))
    ours = np.array([result.scores.s_cf for result in results if result.scores is not None])
    reference = np.array([row["ref"]["s_cf_f1"] for row in real_questions])
    assert spearmanr(ours, reference).statistic > 0.98
    assert np.mean(np.abs(ours - reference) < 1e-5) > 0.85


@pytest.mark.slow
def test_s_path_is_the_reference_where_both_embed_the_same_text(
    real_questions: list[dict[str, Any]], float32_embedder: TransformerEmbedder
) -> None:
    def prepared(text: str) -> str:
        return re.sub(r"<<.*?>>", "", text.partition("\nA:")[0])

    rows = [row for row in real_questions[:60] if all(len(arm["text"].split()) < 110 for arm in row["arms"])]
    assert len(rows) > 40
    for row in rows:
        texts = [prepared(arm["text"]) for arm in row["arms"]]
        ours = s_path_for_question(texts, float32_embedder.embed, copies_threshold=None)
        assert ours == pytest.approx(row["ref"]["s_path_raw_minilm"], abs=2e-5)


@pytest.mark.slow
def test_annotations_and_windows_move_s_path_little(
    real_questions: list[dict[str, Any]], packed_embedder: TransformerEmbedder
) -> None:
    rows = [row for row in real_questions[:100] if all(arm["answer"] is not None for arm in row["arms"])]
    results = score(rows, Scorer(embedder=packed_embedder))
    ours = np.array([result.scores.s_path for result in results if result.scores is not None])
    reference = np.array([row["ref"]["s_path_raw_minilm"] for row in rows])
    assert np.abs(ours - reference).max() < 0.06
    assert spearmanr(ours, reference).statistic > 0.95


def stated_bounds(embedder: TransformerEmbedder) -> tuple[float, float]:
    """Largest error and least rank correlation of s_path that the backend promises."""
    return (0.01, 0.98) if "packed-int8" in embedder.identity else (0.0015, 0.998)


@pytest.mark.slow
def test_the_packed_backend_scores_like_float32(
    real_questions: list[dict[str, Any]],
    float32_embedder: TransformerEmbedder,
    packed_embedder: TransformerEmbedder,
) -> None:
    rows = real_questions[:60]
    exact = [r.scores.s_path for r in score(rows, Scorer(embedder=float32_embedder)) if r.scores]
    packed = [r.scores.s_path for r in score(rows, Scorer(embedder=packed_embedder)) if r.scores]
    error, correlation = stated_bounds(packed_embedder)
    assert np.abs(np.array(exact, dtype=float) - np.array(packed, dtype=float)).max() <= error
    assert spearmanr(exact, packed).statistic >= correlation

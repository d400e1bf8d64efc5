"""Judge `nli`: two arms agree as far as each entails the other, by a natural-language-inference model.

One direction is the share of the hypothesis that the premise entails. Reasoning is longer than such a model's
window, so it is read in pieces, as SummaC-ZS does (Laban et al., TACL 2022): a piece of the hypothesis counts
with the best probability of entailment that any piece of the premise gives it, weighted by its length. Beyond
that source: the verdict is the lower one of both directions, because a text that says everything entails
every other; an empty arm entails nothing and follows from nothing; of an arm only the first `MOST_PIECES`
pieces are read, and what is not read counts as not entailed, so that length cannot buy agreement.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from regime_w.judges import JudgeError, Pairs, VerdictMemory

MOST_PIECES = 6


class Piece(NamedTuple):
    """A stretch of a text that fits into half of the model's window."""

    text: str
    tokens: int


class Entailer(Protocol):
    """A model of entailment: `cross_encoder.CrossEncoderEntailer` is one. Safe to call from many threads."""

    identity: str
    concurrency: int

    def pieces(self, text: str) -> Sequence[Piece]:
        """`text` in consecutive pieces."""
        ...

    def entailed(self, pairs: Sequence[tuple[str, str]]) -> Sequence[float]:
        """P(premise entails hypothesis) of every such pair; the same bits alone and in company."""
        ...


class NliJudge:
    """Verdicts of an entailment model; the last `entries` of them are kept."""

    def __init__(self, model: Entailer, entries: int = 0) -> None:
        self.identity = f"nli|{MOST_PIECES}|{model.identity}"
        self.concurrency = model.concurrency
        self._model = model
        self._verdicts = VerdictMemory(self.identity, entries)

    def judge_pairs(self, question: str, pairs: Pairs, *, fresh: bool = False) -> list[float]:
        """One verdict a pair, from the two reasonings alone.

        Raises:
            JudgeError: the model failed or gave something else than probabilities.
        """
        # Sorted, because the verdict is symmetric.
        subjects = [tuple(sorted((a.reasoning, b.reasoning))) for a, b in pairs]
        try:
            return self._verdicts.recall(
                subjects, lambda missing: self._judge([subjects[i] for i in missing]), fresh=fresh
            )
        except JudgeError:
            raise
        except Exception as error:
            raise JudgeError(f"the entailment model failed: {type(error).__name__}") from None

    def _judge(self, texts: Sequence[tuple[str, ...]]) -> list[float]:
        cut = {text: self._model.pieces(text) for pair in texts for text in pair if text.strip()}
        wanted: dict[tuple[str, str], float] = {}
        for pair in texts:
            for premise, hypothesis in (pair, pair[::-1]):
                for a in cut.get(premise, ())[:MOST_PIECES]:
                    for b in cut.get(hypothesis, ())[:MOST_PIECES]:
                        wanted[a.text, b.text] = 0.0
        if wanted:
            wanted = dict(zip(wanted, self._model.entailed(list(wanted)), strict=True))
        return [
            min(_share(*pieces, wanted), _share(*pieces[::-1], wanted))
            for pieces in ((cut.get(a, ()), cut.get(b, ())) for a, b in texts)
        ]


def _share(
    premise: Sequence[Piece], hypothesis: Sequence[Piece], entailed: dict[tuple[str, str], float]
) -> float:
    """The share of `hypothesis`, by tokens, that `premise` entails; 0 when either is empty."""
    tokens = sum(piece.tokens for piece in hypothesis)
    if not premise or not tokens:
        return 0.0
    return sum(
        piece.tokens / tokens * max(entailed[own.text, piece.text] for own in premise[:MOST_PIECES])
        for piece in hypothesis[:MOST_PIECES]
    )

"""How few questions a paying oracle needs: the reward is linear in its components, so least squares finds it.

    python benchmarks/private/oracle_queries.py --keep

Random groups of answers are scored by the real scorer (over bags of words, which need no model) in mode
`question`, and three clients fit what they were told by least squares:
- one that sees the components (`score:components`): it regresses the reward on s_end, s_path, s_cf and on
  whether any arm is right;
- one that sees the reward alone and knows what a reader of public pages knows (agreement of final answers,
  whether any arm is right): it regresses on what it can compute itself;
- as the second, with bags of words and shared numbers of its own.
Printed, by the number of questions asked: the largest and the mean error on 500 questions never asked.
The last run is kept in benchmarks/results/private/oracle_queries.json.
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from kept import keep, stamp

from looper_schemas.scoring import Arm, Question, RewardMode, ScoredQuestion
from regime_w.scorer import Scorer

ASKED = (3, 4, 5, 6, 8, 12, 25, 50, 100, 400)
NEW = 500
WORDS = ["add", "then", "so", "total", "each", "left", "twice", "half", "gives", "makes", "we", "have"]


class BagOfWords:
    """An embedder without a model: counts of hashed words."""

    identity = "bag-of-words"

    def embed(self, texts: Sequence[str]) -> Any:
        """One row a text."""
        rows = np.zeros((len(texts), 64), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in re.findall(r"[a-z]+|[0-9]+", text.lower()):
                row[zlib.crc32(word.encode()) % 64] += 1
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        return rows / np.where(norms == 0, 1, norms)


def random_question(chance: random.Random, name: str) -> Question:
    """Four arms that agree more or less in answers, steps and words."""
    arms = []
    for place in range(4):
        left, right = chance.randrange(2, 6), chance.randrange(2, 6)
        words = " ".join(chance.choices(WORDS, k=12))
        text = f"{words} {left} + {right} = {left + right}. {words[::-1][:9]}\n#### {left + right}"
        arms.append(Arm(id=str(place), full_text=text))
    return Question(id=name, question="?", gold_answer=str(chance.randrange(4, 11)), arms=tuple(arms))


def final(arm: Arm) -> str:
    """The answer of an arm, by a client's own reading."""
    return (arm.full_text or "").rpartition("####")[2].strip()


def own_reading(question: Question) -> tuple[float, float]:
    """What any client computes: is some arm right, and the share of agreeing pairs."""
    answers = [final(arm) for arm in question.arms]
    pairs = list(itertools.combinations(answers, 2))
    return float(question.gold_answer in answers), sum(a == b for a, b in pairs) / len(pairs)


def own_guesses(question: Question) -> tuple[float, float]:
    """Guesses at what else counts: cosine of words, shared numbers."""
    vectors = BagOfWords().embed([arm.full_text or "" for arm in question.arms])
    numbers = [set(re.findall("[0-9]+", arm.full_text or "")) for arm in question.arms]
    pairs = list(itertools.combinations(range(4), 2))
    cosine = float(np.mean([vectors[i] @ vectors[j] for i, j in pairs]))
    shared = float(np.mean([len(numbers[i] & numbers[j]) / len(numbers[i] | numbers[j]) for i, j in pairs]))
    return cosine, shared


def features(question: Question, told: ScoredQuestion) -> dict[str, list[float]]:
    """The regressors of each client."""
    assert told.scores is not None
    right, agreement = own_reading(question)
    seen = [told.scores.s_end or 0.0, told.scores.s_path or 0.0, told.scores.s_cf or 0.0]
    return {
        "sees components": [1.0, right, *seen],
        "sees rewards": [1.0, right, agreement],
        "sees rewards and guesses": [1.0, right, agreement, *own_guesses(question)],
    }


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the questions (default 0)")
    parser.add_argument("--keep", action="store_true", help="keep the result as the last one")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    questions = [random_question(chance, str(n)) for n in range(max(ASKED) + NEW)]
    told = Scorer(embedder=BagOfWords()).score(questions, RewardMode.QUESTION)
    scored = [result for result in told if isinstance(result, ScoredQuestion)]
    assert len(scored) == len(questions)
    rewards = np.array([result.reward for result in scored])
    rows = [features(question, result) for question, result in zip(questions, scored, strict=True)]
    result: dict[str, Any] = {
        **stamp(),
        "seed": options.seed,
        "standard_deviation_of_rewards": round(float(rewards[max(ASKED) :].std()), 4),
        "errors_on_new_questions": {},
    }
    for client in rows[0]:
        table = np.array([row[client] for row in rows])
        errors = {}
        for asked in ASKED:
            fitted, *_ = np.linalg.lstsq(table[:asked], rewards[:asked], rcond=None)
            off = np.abs(table[max(ASKED) :] @ fitted - rewards[max(ASKED) :])
            errors[str(asked)] = {"largest": float(f"{off.max():.2g}"), "mean": float(f"{off.mean():.2g}")}
        result["errors_on_new_questions"][client] = errors
    if options.keep:
        keep("oracle_queries", result)
    else:
        print(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())

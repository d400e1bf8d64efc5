"""A private reward service of your own: replace `judge`, keep the file out of your repository.

python my_reward.py --port 8080 --key-file trainer.key
"""

from __future__ import annotations

import argparse
import secrets
import sys
from itertools import combinations
from pathlib import Path
from statistics import fmean

from looper_schemas.answers import answers_match, extract_answer
from looper_schemas.scoring import Question, RewardMode, Scores
from looper_trainer.serving import Judgement, RewardServer

RIGHT, WRONG, AGREEMENT = 1.0, -0.5, 0.2


class MyReward(RewardServer):
    """Right answers, and a little for agreeing with the others: here goes what you will not publish."""

    def judge(self, question: Question, mode: RewardMode) -> Judgement:
        """The rewards of one question's arms, in their order."""
        texts = [arm.full_text or arm.reasoning or "" for arm in question.arms]
        answers = [arm.answer or extract_answer(text) for arm, text in zip(question.arms, texts, strict=True)]
        gold = question.gold_answer
        correct = [None if gold is None else answers_match(answer or "", gold) for answer in answers]
        agreement = fmean([a is not None and a == b for a, b in combinations(answers, 2)] or [0.0])
        base = [0.0 if one is None else RIGHT if one else WRONG for one in correct]
        if mode is RewardMode.QUESTION:
            base = [max(base, default=0.0)] * len(base)
        gates = [mode is not RewardMode.ARM_GATED or one is True for one in correct]
        rewards = [one + AGREEMENT * agreement * gate for one, gate in zip(base, gates, strict=True)]
        pairs = agreement if len(answers) > 1 else None
        return Judgement(rewards, correct, Scores(s_end=pairs, s_path=pairs, s_cf=pairs, s_wm=agreement))


def main() -> None:
    """Serve on 127.0.0.1 with the key in a file, which is made where it is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--key-file", type=Path, default=Path("trainer.key"))
    options = parser.parse_args()
    try:
        if not options.key_file.exists():
            options.key_file.touch(mode=0o600)
            options.key_file.write_text(secrets.token_urlsafe(32), encoding="utf-8")
        key = options.key_file.read_text(encoding="utf-8").strip()
    except OSError as error:
        parser.error(f"{options.key_file}: {error.strerror}; choose another --key-file")
    ranges = dict.fromkeys(RewardMode, (WRONG, RIGHT + AGREEMENT))
    sys.exit(MyReward("my-reward-1", ranges, key=key, port=options.port).serve())


if __name__ == "__main__":
    main()

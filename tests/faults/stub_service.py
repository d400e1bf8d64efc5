"""The service over a scorer without a model: `python stub_service.py HOME PORT [JSON]`, then `ready`.

JSON holds settings of the service, and how slow the scorer is: `seconds_a_batch`, `seconds_an_arm`.
"""

from __future__ import annotations

import hashlib
import json
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from looper_schemas.scoring import ArmReward, Question, RewardMode, RewardRange, ScoredQuestion, Scores
from reward_service.app import create_app
from reward_service.batching import Result
from reward_service.logs import configure_logging
from reward_service.serve import server_config, tune_interpreter
from reward_service.settings import Settings


def expected_reward(text: str) -> float:
    """The reward of a text: a number in [0, 1) that only this text has."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


class StubScorer:
    """Deterministic, and slow enough to be killed in the middle of a batch."""

    scorer_id = "stub-1"
    seconds_a_batch = 0.005
    seconds_an_arm = 0.0

    def reward_range(self, mode: RewardMode) -> RewardRange:
        """See `expected_reward`."""
        return RewardRange(low=0.0, high=1.0)

    def score(self, questions: Sequence[Question], mode: RewardMode, *, fresh: bool = False) -> list[Result]:
        """One result a question."""
        arms = sum(len(question.arms) for question in questions)
        if self.seconds_a_batch or self.seconds_an_arm:
            time.sleep(self.seconds_a_batch + arms * self.seconds_an_arm)
        return [self._score(question) for question in questions]

    def _score(self, question: Question) -> ScoredQuestion:
        answers = [_answer(arm.full_text or "") for arm in question.arms]
        n = len(answers)
        agreeing = sum(
            answers[i] is not None and answers[i] == answers[j] for j in range(n) for i in range(j)
        )
        s_end = agreeing / (n * (n - 1) / 2) if n > 1 else None
        rewards = [expected_reward(arm.full_text or "") for arm in question.arms]
        return ScoredQuestion(
            id=question.id,
            reward=sum(rewards) / n if n else 0.0,
            degenerate=False,
            scores=Scores(s_end=s_end, s_path=None, s_cf=None, s_wm=s_end or 0.0),
            correct_flags=tuple(
                None if question.gold_answer is None else answer == question.gold_answer for answer in answers
            ),
            arms=tuple(ArmReward(id=a.id, reward=r) for a, r in zip(question.arms, rewards, strict=True)),
        )


def _answer(text: str) -> str | None:
    _, mark, answer = text.rpartition("####")
    return answer.strip() if mark else None


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print("ready", flush=True)


def main(home: str, port: str, options: str = "{}") -> None:
    """Serve until killed."""
    values = json.loads(options)
    scorer = StubScorer()
    for name in ("seconds_a_batch", "seconds_an_arm"):
        setattr(scorer, name, values.pop(name, getattr(scorer, name)))
    settings = Settings(home=Path(home), **values)
    configure_logging()
    app = create_app(settings, scorer)
    tune_interpreter()
    listener = socket.create_server(("127.0.0.1", int(port)), backlog=2048)
    _Server(server_config(app, settings)).run(sockets=[listener])


if __name__ == "__main__":
    main(*sys.argv[1:])

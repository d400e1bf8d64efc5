"""Questions on their way to the service while others are still sampled."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from looper_schemas.scoring import Arm, ArmReward, Purpose, Question, ScoredQuestion, ServiceInfo
from looper_trainer.errors import RewardUnavailable
from looper_trainer.ppo.scoring import Results, StepScores


def question(name: str) -> Question:
    return Question(id=name, question="?", gold_answer="1", arms=(Arm(id="0", full_text=name),))


class Echo:
    """Rewards a question by the length of its id; remembers its calls."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.active = self.most_active = 0
        self.open = threading.Event()
        self.open.set()
        self.lock = threading.Lock()

    def info(self) -> ServiceInfo:
        raise NotImplementedError

    def score(self, questions: Sequence[Question], *, step: int, purpose: Purpose) -> Results:
        with self.lock:
            self.calls.append([q.id for q in questions])
            self.active += 1
            self.most_active = max(self.most_active, self.active)
        self.open.wait(10)
        with self.lock:
            self.active -= 1
        if any(q.id == "bad" for q in questions):
            raise RewardUnavailable("away")
        assert (step, purpose) == (7, Purpose.TRAIN)
        return {
            q.id: ScoredQuestion(
                id=q.id,
                reward=float(len(q.id)),
                degenerate=False,
                arms=(ArmReward(id="0", reward=float(len(q.id))),),
            )
            for q in questions
        }


def test_every_question_has_its_own_result_in_the_order_asked_for() -> None:
    echo = Echo()
    scores = StepScores(echo, 7, chunk=3, connections=2)
    names = ["a" * n for n in range(1, 9)]
    for name in names:
        scores.add(question(name))
    scores.close()
    found = scores.results(names[::-1])
    assert [(k, r.reward) for k, r in found.items() if isinstance(r, ScoredQuestion)] == [
        (name, float(len(name))) for name in names[::-1]
    ]
    assert sorted(map(len, echo.calls)) == [2, 3, 3]


def test_a_chunk_is_on_its_way_before_the_last_question_is_there_and_connections_are_bounded() -> None:
    echo = Echo()
    echo.open.clear()
    scores = StepScores(echo, 7, chunk=1, connections=2)
    for name in "abcdef":
        scores.add(question(name))
    deadline = threading.Event()
    while echo.most_active < 2 and not deadline.wait(0.01):
        pass
    assert len(echo.calls) == 2
    echo.open.set()
    scores.close()
    assert list(scores.results("abcdef")) == list("abcdef")
    assert echo.most_active == 2


def test_without_chunks_one_request_holds_all() -> None:
    echo = Echo()
    scores = StepScores(echo, 7)
    for name in "abc":
        scores.add(question(name))
    assert echo.calls == []
    scores.close()
    scores.results("abc")
    assert echo.calls == [["a", "b", "c"]]


def test_a_failed_request_is_raised_and_no_other_question_gets_its_place() -> None:
    scores = StepScores(Echo(), 7, chunk=1, connections=2)
    for name in ("a", "bad", "c"):
        scores.add(question(name))
    scores.close()
    with pytest.raises(RewardUnavailable, match="away"):
        scores.results(["a", "bad", "c"])

"""A step's questions on their way to the reward service, the first ones while the last are still sampled.

Questions are sent in chunks by a few threads; results come back by question id, so neither the order of
arrival nor the cut into chunks changes what is trained. The threads are daemons: Ctrl-C need not wait for a
service that is down.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Protocol

from looper_schemas.scoring import FailedQuestion, Purpose, Question, ScoredQuestion, ServiceInfo

Results = Mapping[str, ScoredQuestion | FailedQuestion]


class Scorer(Protocol):
    """The part of `RewardClient` that training needs; `score` may be called from several threads at once."""

    def info(self) -> ServiceInfo: ...

    def score(self, questions: Sequence[Question], *, step: int, purpose: Purpose) -> Results: ...


_Job = tuple[list[Question], Future[Results]]


class StepScores:
    """The scores of one step.

    Args:
        scorer: the reward service.
        step: the trainer's step.
        chunk: questions a request; 0 sends all of them together once the last is there.
        connections: requests at a time.
    """

    def __init__(self, scorer: Scorer, step: int, chunk: int = 0, connections: int = 1) -> None:
        self._scorer, self._step, self._chunk = scorer, step, chunk
        self._idle = connections
        self._pending: list[Question] = []
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._futures: list[Future[Results]] = []

    def add(self, question: Question) -> None:
        """A question whose completions are in."""
        self._pending.append(question)
        if len(self._pending) == self._chunk:
            self._send()

    def close(self) -> None:
        """No question comes any more: send what is left."""
        self._send()
        self._jobs.put(None)

    def results(self, order: Sequence[str]) -> Results:
        """The result of every question, in the order of the ids in `order`; waits for them.

        Raises:
            RewardError: the first failure of a request.
        """
        found: dict[str, ScoredQuestion | FailedQuestion] = {}
        for future in self._futures:
            found.update(future.result())
        return {question_id: found[question_id] for question_id in order}

    def _send(self) -> None:
        if not self._pending:
            return
        future: Future[Results] = Future()
        self._futures.append(future)
        self._jobs.put((self._pending, future))
        self._pending = []
        if self._idle:
            self._idle -= 1
            threading.Thread(target=self._work, name="score", daemon=True).start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            questions, future = job
            try:
                future.set_result(self._scorer.score(questions, step=self._step, purpose=Purpose.TRAIN))
            except BaseException as error:
                future.set_exception(error)
        self._jobs.put(None)  # for the next thread

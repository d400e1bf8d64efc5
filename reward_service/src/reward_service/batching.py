"""Scoring threads that take questions from all waiting requests in turn.

Scoring is CPU or GPU work that releases the GIL; the event loop must stay free for everyone else. An engine
that shares its work out itself says by `concurrency` how many calls keep it busy: while one call waits for
its embeddings, the next one is parsed. Questions of different requests share a micro-batch, one question from
each account in turn, and from each of its requests in turn, so that a small request does not wait behind a
large one, nor behind many of somebody else. Because the scorer gives a question the same result alone and in
any company, batching is invisible in the replies.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from looper_schemas.problems import PROBLEMS, ProblemCode
from looper_schemas.scoring import (
    FailedQuestion,
    Question,
    QuestionError,
    RewardMode,
    RewardRange,
    ScoredQuestion,
)
from reward_service.settings import Settings

logger = logging.getLogger(__name__)

_BATCH_ARMS = 16  # of an engine that does not say

Result = ScoredQuestion | FailedQuestion


class Engine(Protocol):
    """What the service needs of a scorer: `regime_w.scorer.Scorer` is one."""

    scorer_id: str

    def score(self, questions: Sequence[Question], mode: RewardMode, *, fresh: bool = False) -> list[Result]:
        """One result a question, in order, with all components; the same alone and in company.

        With `fresh` nothing that was computed before may be used: the service checks the engine itself.
        """
        ...

    def reward_range(self, mode: RewardMode) -> RewardRange:
        """The interval of every reward in `mode`."""
        ...


class Job:
    """The questions of one request on their way through the scoring threads; awaited in the event loop."""

    def __init__(
        self, questions: Sequence[Question], mode: RewardMode, fresh: bool = False, account: str = ""
    ) -> None:
        self.kind = (mode, fresh)  # a batch is of one kind
        self.account = account
        self.questions = tuple(questions)
        self.waiting = deque(range(len(self.questions)))  # indices that no batch has taken yet
        self.closed = False
        self._results: list[Result | None] = [None] * len(self.questions)
        self._missing = len(self.questions)
        self._lock = threading.Lock()
        self._loop = asyncio.get_running_loop()
        self._done = self._loop.create_future()

    async def wait(self, seconds: float) -> list[Result]:
        """All results, in order; after `seconds` the missing ones are failed as `scorer_timeout`.

        The job leaves the queue when this ends, also when it is cancelled.
        """
        # The timer ends the wait too: what asyncio.timeout does, without cancelling anything.
        timer = self._loop.call_later(max(0.0, seconds), self._end)
        try:
            await self._done
        finally:
            timer.cancel()
            self.closed = True
        return [
            failed(question.id, ProblemCode.SCORER_TIMEOUT) if result is None else result
            for question, result in zip(self.questions, self._results, strict=True)
        ]

    def _end(self) -> None:
        if not self._done.done():
            self._done.set_result(None)

    def deliver(self, index: int, result: Result) -> bool:
        """Hand over the result of one question; whether it was the last. From a scoring thread."""
        with self._lock:
            self._results[index] = result
            self._missing -= 1
            return self._missing == 0

    @staticmethod
    def wake(jobs: Sequence[Job]) -> None:
        """Tell the event loop that `jobs` are complete. Once for all: each time costs a turn of the GIL."""

        def complete() -> None:
            for job in jobs:
                job._end()

        if not jobs:
            return
        try:
            jobs[0]._loop.call_soon_threadsafe(complete)
        except RuntimeError:  # the loop is gone: nobody waits any more
            logger.warning("results after shutdown are dropped")


class Batcher:
    """Feeds an engine from many jobs; micro-batches of about `batch_arms` arms, `threads` at a time."""

    def __init__(self, engine: Engine, batch_arms: int, threads: int = 1) -> None:
        self._engine = engine
        self._batch_arms = batch_arms
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._scoring = 0  # threads that do so now
        self._threads = [
            threading.Thread(target=self._run, name=f"scoring-{i}", daemon=True) for i in range(threads)
        ]
        self.seconds_per_arm = 0.05  # moving average; a first guess of a small model on one CPU core

    def start(self) -> None:
        """Start the scoring threads."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the threads after the batches at hand."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def submit(
        self, questions: Sequence[Question], mode: RewardMode, *, fresh: bool = False, account: str = ""
    ) -> Job:
        """Queue `questions` of `account` ("": the service's own); await the returned job.

        `fresh`: as the engine has it.
        """
        job = Job(questions, mode, fresh, account)
        with self._changed:
            self._jobs.append(job)
            self._changed.notify_all()
        return job

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._stopping and not self._drop_finished():
                    self._changed.wait()
                if self._stopping:
                    return
                batch = self._take()
                self._scoring += 1
                together = self._scoring
            started = time.monotonic()
            arms = 0
            complete = []
            for (job, index), result in zip(batch, self._score(batch), strict=True):
                if job.deliver(index, result):
                    complete.append(job)
                arms += len(job.questions[index].arms)
            Job.wake(complete)
            with self._changed:
                self._scoring -= 1
                if arms:
                    seconds = (time.monotonic() - started) / (arms * together)
                    self.seconds_per_arm += 0.1 * (seconds - self.seconds_per_arm)

    def _drop_finished(self) -> bool:
        """Forget jobs that have nothing left to take; whether any job remains."""
        self._jobs = deque(job for job in self._jobs if job.waiting and not job.closed)
        return bool(self._jobs)

    def _take(self) -> list[tuple[Job, int]]:
        """The next micro-batch, of the first job's kind: a question of each account in turn."""
        kind = self._jobs[0].kind
        accounts: dict[str, deque[Job]] = {}
        for job in self._jobs:
            if job.kind == kind:
                accounts.setdefault(job.account, deque()).append(job)
        turn = deque(accounts.values())
        batch: list[tuple[Job, int]] = []
        arms = 0
        while turn and arms < self._batch_arms:
            theirs = turn.popleft()
            job = theirs.popleft()
            index = job.waiting.popleft()
            batch.append((job, index))
            arms += max(1, len(job.questions[index].arms))
            if job.waiting:
                theirs.append(job)
            if theirs:
                turn.append(theirs)
        # Whoever was not served comes first next time.
        served = {id(job) for job, _ in batch}
        had_turns = {job.account for job, _ in batch}
        self._jobs = deque(sorted(self._jobs, key=lambda job: (job.account in had_turns, id(job) in served)))
        return batch

    def _score(self, batch: Sequence[tuple[Job, int]]) -> list[Result]:
        """Results of `batch`, in order. A batch that fails is halved, so that one question fails alone."""
        mode, fresh = batch[0][0].kind
        asked = [job.questions[index] for job, index in batch]
        questions = asked
        # Two requests may use one question id for different texts: within a batch ids must not clash.
        if len({question.id for question in asked}) < len(asked):
            questions = [question.model_copy(update={"id": str(i)}) for i, question in enumerate(asked)]
        try:
            results = self._engine.score(questions, mode, fresh=fresh)
            if [result.id for result in results] != [question.id for question in questions]:
                raise RuntimeError("the engine's results do not match its questions")
        except Exception as error:
            logger.exception("scoring a batch failed")
            if len(batch) == 1:
                # torch's error of this name is no MemoryError; either may have room later.
                memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
                code = ProblemCode.OVERLOADED if memory else ProblemCode.SCORER_FAILED
                return [failed(asked[0].id, code)]
            half = len(batch) // 2
            return self._score(batch[:half]) + self._score(batch[half:])
        if questions is asked:
            return results
        return [
            result.model_copy(update={"id": question.id})
            for question, result in zip(asked, results, strict=True)
        ]


def failed(question_id: str, code: ProblemCode) -> FailedQuestion:
    """The result of a question that ends with `code`."""
    return FailedQuestion(id=question_id, error=QuestionError(code=code, retryable=PROBLEMS[code].retryable))


def make_batcher(engine: Engine, settings: Settings) -> Batcher:
    """A batcher as the settings say, or where they are silent as the engine asks for (`regime_w.scorer`)."""
    batch_arms = settings.batch_arms or int(getattr(engine, "batch_arms", _BATCH_ARMS))
    threads = settings.scoring_threads or int(getattr(engine, "concurrency", 1))
    return Batcher(engine, batch_arms, threads)

"""Single completions collected into the groups they belong to, for trainers that ask one at a time.

A group is scored when it is complete. One that is not after `wait_s` is scored as it is, and its outcomes
say how large it was: a smaller group is a noisier measure on the same scale, and a trainer that waits for
ever is no trainer. Groups that are complete at about the same time share a request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from looper_trainer.integrations.groups import Outcome, Sample

# Long enough that the groups of one sampling batch meet, short beside any scoring.
_MEET_S = 0.02

ScoreGroups = Callable[[Sequence[Sequence[Sample]]], list[list[Outcome]]]


@dataclass
class _Group:
    members: list[tuple[Sample, asyncio.Future[Outcome]]] = field(default_factory=list)
    timer: asyncio.TimerHandle | None = None


class Gatherer:
    """Collects samples of one event loop into groups and scores them in a thread.

    Args:
        score: scores whole groups; may block. What it raises reaches every sample of the request.
        wait_s: how long the first sample of a group waits for the others.
    """

    def __init__(self, score: ScoreGroups, wait_s: float) -> None:
        self.score = score
        self.wait_s = wait_s
        self._groups: dict[Hashable, _Group] = {}
        self._ready: list[_Group] = []
        self._sending: set[asyncio.Task[None]] = set()

    async def outcome(self, sample: Sample, group_size: int) -> Outcome:
        """The outcome of `sample` once its group of `group_size` is scored.

        Raises:
            RewardUnavailable, RewardRejected, ScorerMismatch: see `looper_trainer.errors`.
        """
        loop = asyncio.get_running_loop()
        key = (sample.question_id, sample.question, sample.gold_answer, group_size)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group()
            group.timer = loop.call_later(self.wait_s, self._close, key)
        future: asyncio.Future[Outcome] = loop.create_future()
        member = (sample, future)
        group.members.append(member)
        if len(group.members) >= group_size:
            self._close(key)
        try:
            return await future
        except asyncio.CancelledError:
            # Whoever asked went away: its place must not be counted as an arm.
            if self._groups.get(key) is group:
                group.members.remove(member)
            raise

    def _close(self, key: Hashable) -> None:
        group = self._groups.pop(key)
        if group.timer is not None:
            group.timer.cancel()
        if not group.members:
            return
        self._ready.append(group)
        if len(self._ready) == 1:
            task = asyncio.get_running_loop().create_task(self._send())
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    async def _send(self) -> None:
        await asyncio.sleep(_MEET_S)
        groups, self._ready = self._ready, []
        samples = [[sample for sample, _ in group.members] for group in groups]
        try:
            outcomes = await asyncio.to_thread(self.score, samples)
        except Exception as error:
            for group in groups:
                for _, future in group.members:
                    if not future.done():
                        future.set_exception(error)
            return
        for group, scored in zip(groups, outcomes, strict=True):
            for (_, future), outcome in zip(group.members, scored, strict=True):
                if not future.done():
                    future.set_result(outcome)

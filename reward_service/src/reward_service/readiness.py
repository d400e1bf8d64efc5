"""The golden vector: a fixed question whose score is known, asked at the start and from time to time.

Part of what it must give is worked out by hand and holds for every embedding model; the rest is recorded in
the service's folder when a scorer_id is first seen, and must come out the same ever after.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from looper_schemas.problems import ProblemCode
from looper_schemas.scoring import Arm, FailedQuestion, Question, RewardMode, ScoredQuestion
from reward_service.batching import Batcher, Result
from reward_service.home import write_atomically

logger = logging.getLogger(__name__)

GOLDEN_FILE = "golden.json"
TOLERANCE = 1e-6
_DEADLINE_S = 120.0
_SOON_S = 30.0
_LATE = "the golden question was not scored in time"

GOLDEN = Question(
    id="golden",
    question="A box holds 3 red and 5 blue pencils. How many pencils are in the box?",
    gold_answer="8",
    arms=(
        Arm(id="a", full_text="There are 3 red pencils and 5 blue ones. 3 + 5 = 8 pencils in all.\n#### 8"),
        Arm(id="b", full_text="Counting the blue pencils first: 5 + 3 = 8, so the box holds eight.\n#### 8"),
        Arm(id="c", full_text="Each colour is counted once and the box itself too: 3 + 5 + 1 = 9.\n#### 9"),
        Arm(id="d", full_text="I would have to look into the box to know."),
    ),
)
# Four arms make six pairs, of which (a, b) alone agrees; an absent answer is not correct.
GOLDEN_S_END = 1 / 6
GOLDEN_FLAGS = (True, True, False, False)


class Readiness:
    """Whether the service may answer: the golden vector matched when it was last asked.

    `checked` is told after every check: ready or not, and the largest difference from the record where there
    is one to compare with.
    """

    def __init__(
        self,
        home: Path,
        scorer_id: str,
        batcher: Batcher,
        checked: Callable[[bool, float | None], None] = lambda ready, deviation: None,
    ) -> None:
        self._file = home / GOLDEN_FILE
        self._scorer_id = scorer_id
        self._batcher = batcher
        self._checked = checked
        self._deviation: float | None = None
        self._rounds = itertools.count()
        self._late = False
        self.ready = False
        self.reason: str | None = None  # why it is not, in constant words

    async def keep_checking(self, every_s: float) -> None:
        """Check again every `every_s` seconds, sooner where the last one ran out of time, until cancelled."""
        while True:
            await asyncio.sleep(min(every_s, _SOON_S) if self._late else every_s)
            await self.check()

    async def check(self) -> bool:
        """Ask the golden question alone and in company, afresh both times, and set `ready`."""
        self._deviation = None
        reason = await self._mismatch()
        self._late = reason == _LATE
        if self._late and self.ready:
            # Callers keep the scorer busy: no sign of a wrong score.
            logger.warning(_LATE)
            return True
        if reason is not None:
            logger.error("not ready", extra={"reason": reason})
        elif not self.ready:
            logger.info("ready: the golden vector matches")
        self.ready, self.reason = reason is None, reason
        self._checked(self.ready, self._deviation)
        return self.ready

    async def _mismatch(self) -> str | None:
        """What is wrong, in constant words; None when nothing is."""
        (alone,) = await self._score(GOLDEN)
        other = Arm(id="f", full_text=f"Round {next(self._rounds)} of checks: 2 * 4 = 8.\n#### 8")
        company = Question(id="company", question=GOLDEN.question, arms=(other, *GOLDEN.arms))
        neighbour, together = await self._score(company, GOLDEN)
        if not isinstance(alone, ScoredQuestion) or not isinstance(neighbour, ScoredQuestion):
            failures = [r for r in (alone, neighbour, together) if isinstance(r, FailedQuestion)]
            late = all(failure.error.code is ProblemCode.SCORER_TIMEOUT for failure in failures)
            return _LATE if late else "scoring the golden question failed"
        if alone != together:
            return "a question scores differently in company"
        if alone.scores is None or alone.scores.s_end is None or alone.correct_flags != GOLDEN_FLAGS:
            return "components are missing or wrong"
        if not math.isclose(alone.scores.s_end, GOLDEN_S_END, abs_tol=TOLERANCE):
            return "components are missing or wrong"
        return self._compare_with_record(alone)

    async def _score(self, *questions: Question) -> list[Result]:
        job = self._batcher.submit(questions, RewardMode.ARM_GATED, fresh=True)
        return await job.wait(_DEADLINE_S)

    def _compare_with_record(self, result: ScoredQuestion) -> str | None:
        assert result.scores is not None
        values = {
            **{name: value for name, value in result.scores.model_dump().items() if value is not None},
            **{f"reward {arm.id}": arm.reward for arm in result.arms},
        }
        try:
            records: dict[str, Any] = json.loads(self._file.read_text(encoding="utf-8"))
            known = records.get(self._scorer_id)
        except FileNotFoundError:
            records, known = {}, None
        except (OSError, ValueError, AttributeError):
            return "golden.json cannot be read: mend or remove it"
        if known is None:
            try:
                write_atomically(
                    self._file, json.dumps({**records, self._scorer_id: values}, indent=1) + "\n"
                )
            except OSError:
                return "golden.json cannot be written"
            return None
        if known.keys() != values.keys():
            return "scores differ from those in golden.json"
        self._deviation = max(abs(known[name] - value) for name, value in values.items())
        same = all(math.isclose(known[name], value, abs_tol=TOLERANCE) for name, value in values.items())
        return None if same else "scores differ from those in golden.json"

"""A reward server to test against: contract 1.0 over real HTTP, with public rewards and faults on demand.

`FakeRewardServer` runs in a thread; `python -m looper_trainer.testing --port P --key K` runs it as a process.
Its rewards need no model: "correct" gives 1.0 to a completion that states the gold answer and -0.5 to any
other; "random" gives numbers that depend on the seed and the text alone, the control of an experiment.
Nothing here resembles how a real service makes its rewards. `serving.RewardServer` is the server below it.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import threading
import time
from collections.abc import Sequence
from typing import Literal

from looper_schemas.answers import answers_match
from looper_schemas.problems import ProblemCode
from looper_schemas.scoring import Arm, Limits, Question, RewardMode, Scores
from looper_trainer.serving import DEFAULT_LIMITS, Judgement, RewardServer, Unscorable

Mode = Literal["correct", "random"]

RIGHT, WRONG = 1.0, -0.5


class Faults:
    """Faults to inject, consumed one request (or one reply) at a time; thread-safe.

    `unavailable` 503 replies, `dropped` connections closed without a reply, `corrupt` replies cut to half
    of their bytes, `hang_s` seconds of silence before the next reply; `failing` question ids come back as
    failed that many times each.
    """

    def __init__(self) -> None:
        self.unavailable = 0
        self.dropped = 0
        self.corrupt = 0
        self.hang_s = 0.0
        self.retry_after_s: int | None = None
        self.failing: dict[str, int] = {}
        self.failing_is_retryable = True
        self._lock = threading.Lock()

    def take(self, name: Literal["unavailable", "dropped", "corrupt"]) -> bool:
        """Whether the fault `name` is due, counting it down."""
        with self._lock:
            due = int(getattr(self, name))
            if due:
                setattr(self, name, due - 1)
            return due > 0

    def take_hang(self) -> float:
        """Seconds to stay silent before this reply."""
        with self._lock:
            due, self.hang_s = self.hang_s, 0.0
            return due

    def take_failing(self, question_id: str) -> bool:
        """Whether this question is to fail now, counting it down."""
        with self._lock:
            due = self.failing.get(question_id, 0)
            if due:
                self.failing[question_id] = due - 1
            return due > 0


class FakeRewardServer(RewardServer):
    """A reward service on 127.0.0.1; a context manager that starts and stops it.

    Args:
        mode: "correct" or "random" rewards.
        key: a key that may see everything.
        seed: of the random rewards.
        noise: random share of a right completion's reward, which lies in [1, 1 + noise] in mode "correct".
        port: 0 for any free one.
        scorer_id: what it calls its scorer.
        reward_key: another key, which may see rewards only.
        limits: what one request may hold.

    Attributes:
        url: its base address once started.
        faults: what to break next.
        requests: bodies of the score requests it has answered afresh, in order.
        replayed: number of replies given again for a repeated idempotency key.
    """

    def __init__(
        self,
        mode: Mode = "correct",
        *,
        key: str = "test-key",
        seed: int = 0,
        noise: float = 0.0,
        port: int = 0,
        scorer_id: str | None = None,
        reward_key: str | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        super().__init__(
            scorer_id or f"fake-{mode}-{seed}" + (f"-noise-{noise}" if noise else ""),
            dict.fromkeys(RewardMode, (WRONG, RIGHT + noise)),
            key=key,
            reward_key=reward_key,
            port=port,
            limits=limits,
        )
        self.mode = mode
        self.seed = seed
        self.noise = noise
        self.faults = Faults()

    @property
    def retry_after_s(self) -> int | None:  # type: ignore[override]
        """What 503 replies ask for."""
        return self.faults.retry_after_s

    def disturbance(self) -> ProblemCode | Literal["drop"] | None:
        """The faults that are due before an answer."""
        time.sleep(self.faults.take_hang())
        if self.faults.take("dropped"):
            return "drop"
        return ProblemCode.OVERLOADED if self.faults.take("unavailable") else None

    def outgoing(self, body: bytes) -> bytes:
        """Half of the reply where a corrupt one is due."""
        return body[: len(body) // 2] if self.faults.take("corrupt") else body

    def judge(self, question: Question, mode: RewardMode) -> Judgement:
        """Public rewards of one question's arms."""
        if self.faults.take_failing(question.id):
            retryable = self.faults.failing_is_retryable
            code = ProblemCode.SCORER_TIMEOUT if retryable else ProblemCode.SCORER_FAILED
            raise Unscorable(code, retryable=retryable)
        rewards = [self._reward(question, arm) for arm in question.arms]
        if mode is RewardMode.QUESTION:
            rewards = [max(rewards)] * len(rewards) if rewards else []
        return Judgement(
            rewards, [_is_correct(question, arm) for arm in question.arms], self._scores(question)
        )

    def _reward(self, question: Question, arm: Arm) -> float:
        if self.mode == "random":
            # The text decides: neither an arm's place nor its id does.
            draw = _uniform(self.seed, question.question, _text(arm))
            return RIGHT if draw < 0.5 else WRONG
        correct = _is_correct(question, arm)
        if not correct:
            return 0.0 if correct is None else WRONG
        return RIGHT + self.noise * _uniform(self.seed, question.question, _text(arm))

    def _scores(self, question: Question) -> Scores:
        """Opaque numbers in range: stand-ins that a client may only carry."""
        texts = sorted(_text(arm) for arm in question.arms)
        if len(texts) < 2:
            return Scores(s_end=None, s_path=None, s_cf=None, s_wm=0.0)
        one, two, three, four = (_uniform(self.seed, name, *texts) for name in ("1", "2", "3", "4"))
        return Scores(s_end=one, s_path=two, s_cf=three, s_wm=four)


def _text(arm: Arm) -> str:
    return arm.full_text if arm.full_text is not None else arm.reasoning or ""


def _is_correct(question: Question, arm: Arm) -> bool | None:
    if question.gold_answer is None:
        return None
    return answers_match(arm.answer if arm.answer is not None else _text(arm), question.gold_answer)


def _uniform(seed: int, *parts: str) -> float:
    """A number in [0, 1) that depends on nothing but the arguments."""
    digest = hashlib.sha256(repr((seed, *parts)).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until interrupted; the address goes to standard output once the port is open."""
    parser = argparse.ArgumentParser(prog="python -m looper_trainer.testing", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1; 0 is any free one")
    parser.add_argument("--mode", choices=("correct", "random"), default="correct", help="which rewards")
    parser.add_argument("--key", required=True, help="the API key it accepts")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random rewards")
    parser.add_argument("--noise", type=float, default=0.0, help="random share of a right one's reward")
    arguments = parser.parse_args(argv)
    return FakeRewardServer(
        arguments.mode, key=arguments.key, seed=arguments.seed, noise=arguments.noise, port=arguments.port
    ).serve()


if __name__ == "__main__":
    sys.exit(main())

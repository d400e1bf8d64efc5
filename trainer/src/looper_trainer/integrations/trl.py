"""The reward service as a reward function of TRL's `GRPOTrainer` and `RLOOTrainer`.

    trainer = GRPOTrainer(model, reward_funcs=LooperReward(), train_dataset=dataset, args=...)

The dataset needs a column `prompt`, and for correctness one with the gold answer (`answer`). Completions
are scored in the groups that TRL samples. Scores are logged through TRL's own hooks: means as metrics
`looper/...`, single values as columns of the completions table.

A completion without a score is None, which TRL excludes from baseline and gradient; it is never zero. A
service that dies in the middle of a run is waited for, then the batch is None; `stop_after` such batches in
a row end the run, so that nobody trains on nothing over night. A service that has never answered, a wrong
key or another scorer end it at once.

With several processes the completions of one question must be on one device:
`per_device_train_batch_size * steps_per_generation` a multiple of `num_generations`.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from looper_schemas.scoring import Disclosure, Purpose, RewardMode
from looper_trainer.errors import DataError, RewardUnavailable
from looper_trainer.integrations.groups import (
    COMPONENTS,
    UNAVAILABLE,
    Outcome,
    Sample,
    figures,
    runs,
    score_groups,
    unscored,
)
from looper_trainer.reward_client import RewardClient

__all__ = ["AsyncLooperReward", "LooperReward"]

Message = Mapping[str, Any]


class LooperReward:
    """A reward function for TRL, scored by the service that the environment names.

    Args:
        run_id: names this run in the service's log.
        gold_column: dataset column with the gold answer; None or an absent column leaves correctness unknown.
        question_column: dataset column with the question; without it, the prompt's last user message.
        group_size: completions of a question (TRL's `num_generations`); None takes each run of equal prompts.
        reward_mode: how scores become rewards of completions.
        disclosure: "components" to log them, "reward" for a key that may not see them.
        scorer_id: pin the run to this scorer; None pins the first one seen.
        give_up_after_s: longest wait of one call for the service, in seconds.
        stop_after: calls in a row without any score that end the run; 0 never does.
        client: use this client instead of the environment's.

    Raises (when called):
        RewardUnavailable: the service has never answered, or `stop_after` calls went by without a score.
        RewardRejected, ScorerMismatch, ConfigError: see `looper_trainer.errors`.
    """

    def __init__(
        self,
        *,
        run_id: str = "trl",
        gold_column: str | None = "answer",
        question_column: str = "question",
        group_size: int | None = None,
        reward_mode: RewardMode | str = RewardMode.ARM_GATED,
        disclosure: Disclosure | str = Disclosure.COMPONENTS,
        scorer_id: str | None = None,
        give_up_after_s: float = 300.0,
        stop_after: int = 20,
        client: RewardClient | None = None,
    ) -> None:
        self.__name__ = "looper_reward"  # what TRL calls it in its logs
        self.gold_column = gold_column
        self.question_column = question_column
        self.group_size = group_size
        self.stop_after = stop_after
        self._settings: dict[str, Any] = {
            "run_id": run_id,
            "reward_mode": RewardMode(reward_mode),
            "disclosure": Disclosure(disclosure),
            "scorer_id": scorer_id,
            "give_up_after_s": give_up_after_s,
        }
        self._client = client
        self._answered = False
        self._empty_calls = 0

    def __getstate__(self) -> dict[str, Any]:
        """Without connections and key, so that a worker process makes its own."""
        return {**self.__dict__, "_client": None}

    @property
    def client(self) -> RewardClient:
        """The client in use, made when it is first needed."""
        if self._client is None:
            self._client = RewardClient.from_environment(**self._settings)
        return self._client

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """The reward of each completion; None where there is no score. Called by TRL."""
        return self._score(prompts, completions, columns)

    def _score(
        self, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Any]
    ) -> list[float | None]:
        samples = [
            self._sample(prompt, completion, place, columns)
            for place, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        keys = [(sample.question_id, sample.question, sample.gold_answer) for sample in samples]
        groups = [[samples[i] for i in places] for places in runs(keys, self.group_size)]
        step = int(getattr(columns.get("trainer_state"), "global_step", 0))
        try:
            scored = score_groups(self.client, groups, step=step, purpose=Purpose.TRAIN)
            self._answered = True
        except RewardUnavailable as error:
            if not self._answered:
                raise
            print(f"looper: step {step}: no score: {error}", file=sys.stderr, flush=True)
            scored = [unscored(len(group), UNAVAILABLE) for group in groups]
        outcomes = [outcome for group in scored for outcome in group]
        _log(outcomes, columns.get("log_metric"), columns.get("log_extra"))
        self._count(outcomes)
        return [outcome.reward for outcome in outcomes]

    def _sample(self, prompt: Any, completion: Any, place: int, columns: Mapping[str, Any]) -> Sample:
        gold = columns[self.gold_column][place] if self.gold_column and self.gold_column in columns else None
        asked = columns[self.question_column][place] if self.question_column in columns else None
        ids = columns.get("completion_ids")
        name = columns["id"][place] if "id" in columns else None
        return Sample(
            question=str(asked) if asked is not None else question_of(prompt),
            gold_answer=None if gold is None else gold_of(str(gold)),
            text=text_of(completion),
            tokens_out=len(ids[place]) if ids is not None else None,
            id=str(name) if name is not None else None,
        )

    def _count(self, outcomes: Sequence[Outcome]) -> None:
        self._empty_calls = 0 if any(o.reward is not None for o in outcomes) else self._empty_calls + 1
        if self.stop_after and self._empty_calls >= self.stop_after:
            raise RewardUnavailable(
                f"{self._empty_calls} batches in a row have no score ({outcomes[0].error}); mend the reward "
                "service and resume from the trainer's last checkpoint"
            )


class AsyncLooperReward(LooperReward):
    """The same for TRL's asynchronous reward functions: several of them wait at the same time."""

    async def __call__(  # type: ignore[override]
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """The reward of each completion; None where there is no score. Awaited by TRL."""
        return await asyncio.to_thread(self._score, prompts, completions, columns)


def question_of(prompt: str | Sequence[Message]) -> str:
    """The text of a prompt, or the last user message of a conversation.

    Raises:
        DataError: a conversation in which no user speaks.
    """
    if isinstance(prompt, str):
        return prompt
    asked = [message for message in prompt if message.get("role") == "user"]
    if not asked:
        raise DataError("a prompt holds no user message; add one, or name the dataset's question_column")
    return text_of(asked[-1:])


def text_of(completion: str | Sequence[Message]) -> str:
    """The text of a completion, plain or as messages (content as text or as parts with `text`)."""
    if isinstance(completion, str):
        return completion
    texts: list[str] = []
    for message in completion:
        content = message.get("content") or ""
        parts = [content] if isinstance(content, str) else [str(part.get("text", "")) for part in content]
        texts.append("".join(parts))
    return "\n".join(texts)


def gold_of(answer: str) -> str:
    """A gold answer, without the worked solution that GSM8K's own `answer` column puts before it."""
    return answer.rpartition("####")[2].strip()


def _log(
    outcomes: Sequence[Outcome],
    log_metric: Callable[[str, float], None] | None,
    log_extra: Callable[[str, list[Any]], None] | None,
) -> None:
    if log_metric is not None:
        for name, value in figures(outcomes).items():
            log_metric(f"looper/{name}", value)
    if log_extra is not None:
        log_extra("looper_error", [outcome.error for outcome in outcomes])
        log_extra("looper_correct", [outcome.correct for outcome in outcomes])
        for name in COMPONENTS:
            values = [None if o.scores is None else getattr(o.scores, name) for o in outcomes]
            log_extra(f"looper_{name}", values)

"""What a run learns from: problems to train on, problems to evaluate on, earlier rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from looper_schemas.records import Problem, RecordError, RecordT, RolloutRecord, read_records
from looper_trainer.errors import DataError
from looper_trainer.ppo.config import PPOConfig
from looper_trainer.ppo.rollout import questions_of_step, solvable


@dataclass(frozen=True)
class Data:
    """Questions to train on, questions to evaluate on, and earlier rollouts where there are any."""

    train: Sequence[Problem]
    dev: Sequence[Problem]
    rollouts: Sequence[RolloutRecord]


def read_data(config: PPOConfig) -> Data:
    """The files that `config` names, filtered.

    Raises:
        DataError: a file that cannot be used.
    """
    problems = _read(config.train_file, Problem)
    dev = _read(config.dev_file, Problem) if config.dev_file and config.eval_every else []
    rollouts = _read(config.rollouts_file, RolloutRecord) if config.rollouts_file else []
    train = solvable(problems, rollouts, config.min_pass_rate, config.max_pass_rate) if rollouts else problems
    questions_of_step(train, 1, config.batch_size, config.seed)  # refuses too few
    if len({problem.id for problem in train}) != len(train):
        raise DataError(f"{config.train_file}: question ids repeat; give each question its own")
    return Data(train, dev[: config.eval_questions or None], rollouts)


def _read(path: Path, kind: type[RecordT]) -> list[RecordT]:
    try:
        return read_records(path, kind)
    except RecordError as error:
        raise DataError(str(error)) from None

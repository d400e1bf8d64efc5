"""kill -9 at five points of a step: the resumed run ends with the bits of one that was never killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from looper_schemas.records import Problem
from looper_trainer.ppo import checkpoint, step
from looper_trainer.ppo.checkpoint import step_folder
from looper_trainer.ppo.config import PPOConfig
from looper_trainer.ppo.scoring import StepScores

from .conftest import CountingScorer
from .test_loop import go, metrics_of, saved, without_seconds

STEPS = 3
AT = 2  # the step that is killed


def die(*_: object, **__: object) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(number: int, original: Callable[..., Any]) -> Callable[..., Any]:
    """`original`, which kills its process once it has returned for the `number`-th time."""
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        result = original(*args, **kwargs)
        return die() if calls == number else result

    return wrapped


# The config makes two optimizer steps in each of two epochs; the start is a checkpoint too.
POINTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "before sampling": lambda p: p.setattr(step, "questions_of_step", at_call(AT, step.questions_of_step)),
    "while scores are awaited": lambda p: p.setattr(StepScores, "results", at_call(AT, StepScores.results)),
    "between two optimizer steps": lambda p: p.setattr(
        torch.optim.AdamW, "step", at_call(4 * (AT - 1) + 2, torch.optim.AdamW.step)
    ),
    "with a checkpoint half-written": lambda p: p.setattr(
        checkpoint, "_flush", at_call(AT + 1, checkpoint._flush)
    ),
    "right after a checkpoint": lambda p: p.setattr(checkpoint, "_prune", at_call(AT + 1, checkpoint._prune)),
}


@pytest.fixture(scope="module")
def unharmed(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> PPOConfig:
    config = make_config(base_folder, tmp_path_factory.mktemp("unharmed"))
    go(config, make_problems(), CountingScorer("aeiou"))
    return config


def make_config(base_folder: Path, output: Path) -> PPOConfig:
    return PPOConfig(
        model=str(base_folder), output=output, run_id="same", dev_file=None, batch_size=4,
        samples_per_question=4, mini_batch_size=2, max_new_tokens=12, learning_rate=1e-2, steps=STEPS,
        save_every=1, lora_rank=4, lora_alpha=8, merge=False, device="cpu", dtype="float32",
        kl_controller="adaptive",
    )  # fmt: skip


def make_problems() -> list[Problem]:
    return [Problem(id=f"p{i}", question=f"What is {i} + {i}?", answer=str(2 * i)) for i in range(12)]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("point", POINTS)
def test_a_run_killed_at_any_point_of_a_step_ends_with_the_same_bits(
    point: str, unharmed: PPOConfig, base_folder: Path, tmp_path: Path
) -> None:
    config = make_config(base_folder, tmp_path)
    child = os.fork()
    if child == 0:
        with pytest.MonkeyPatch.context() as patch:
            POINTS[point](patch)
            try:
                go(config, make_problems(), CountingScorer("aeiou"))
            finally:
                os._exit(1)  # it should have been killed
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert len(metrics_of(config)) in (AT - 1, AT)
    assert not step_folder(config.output, STEPS).exists()
    torch.manual_seed(99)
    go(config.model_copy(update={"resume": True}), make_problems(), CountingScorer("aeiou"))
    assert saved(config, STEPS) == saved(unharmed, STEPS)
    assert without_seconds(config) == without_seconds(unharmed)

"""`looper watch`: a run's metrics to TensorBoard or Weights & Biases, from the file it writes anyway.

The training process knows nothing of it: it may be started while the run goes on or when it is over, more
than once, on another machine that sees the folder. W&B runs offline unless `WANDB_MODE` says otherwise
(`wandb sync` sends it later); its run id is made from the run, so that a second start continues it.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal, Protocol, Self

from pydantic import Field

from looper_trainer.config import StageConfig
from looper_trainer.run_folder import Row, read_metrics, read_settings, require_run


class WatchConfig(StageConfig):
    """Write a run's metrics to TensorBoard or W&B."""

    run: Annotated[Path, Field(description="folder of the run: the --output of ppo or sft")] = Path(
        "checkpoints/ppo_rl"
    )
    to: Annotated[Literal["tensorboard", "wandb"], Field(description="where to write")] = "tensorboard"
    output: Annotated[
        Path | None, Field(description="folder of the logs; none: in the run's, by the writer's name")
    ] = None
    project: Annotated[str, Field(description="W&B project")] = "looper"
    once: Annotated[bool, Field(description="stop at the end of the file instead of following it")] = False
    poll_s: Annotated[float, Field(gt=0, description="seconds between looks")] = 2.0


class Writer(Protocol):
    """Where figures go."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Take the figures of one step."""


def run(config: WatchConfig) -> None:
    """Write every row, then follow the run until its last step or Ctrl-C.

    Raises:
        DataError: there is no such folder.
        ModuleNotFoundError: the writer's library is not installed.
    """
    folder = require_run(config.run)
    settings = read_settings(folder)
    output = config.output or folder / config.to
    output.mkdir(parents=True, exist_ok=True)
    expected = settings.get("steps")
    make = TensorBoard if config.to == "tensorboard" else WandB
    written = offset = 0
    with make(output, folder, config.project, settings) as writer:
        while True:
            chunk = read_metrics(folder, offset)
            offset = chunk.offset
            if chunk.skipped:
                print(f"watch: {chunk.complaint}", flush=True)
            for row in chunk.rows:
                writer.write(row["step"], dict(figures(row)))
                written += 1
            done = bool(chunk.rows) and isinstance(expected, int) and chunk.rows[-1]["step"] >= expected
            if config.once or done:
                break
            time.sleep(config.poll_s)
    print(f"watch: {written} rows to {output}")


def figures(row: Row) -> Iterator[tuple[str, float]]:
    """The numbers of a row by name; seconds as `seconds/<part>`, and what is null is left out."""
    for key, value in row.items():
        if key == "seconds" and isinstance(value, Mapping):
            yield from ((f"seconds/{part}", float(one)) for part, one in value.items())
        elif key != "step" and isinstance(value, int | float) and math.isfinite(value):
            yield key, float(value)


class TensorBoard:
    """Event files for `tensorboard --logdir`."""

    def __init__(self, output: Path, folder: Path, project: str, settings: Mapping[str, Any]) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(output))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Take the figures of one step."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self._writer.flush()


class WandB:
    """A W&B run, offline unless `WANDB_MODE` says otherwise."""

    def __init__(self, output: Path, folder: Path, project: str, settings: Mapping[str, Any]) -> None:
        import wandb

        name = str(settings.get("run_id") or folder.name)
        same = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
        self._run = wandb.init(
            project=project,
            name=name,
            id=same,
            resume="allow",
            dir=str(output),
            config={key: str(value) for key, value in settings.items()},
            mode=os.environ.get("WANDB_MODE", "offline"),
            # A run is described by its settings and figures; nothing about the machine goes along.
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, x_disable_meta=True, x_disable_stats=True
            ),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run.finish()

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Take the figures of one step."""
        self._run.log(dict(figures), step=step)

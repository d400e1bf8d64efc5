"""`looper-eval run`: every model on every question, one call each, then the summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from looper_eval.dataset import load_dataset
from looper_eval.engines import open_engine
from looper_eval.generate import answer_all
from looper_eval.manifest import ModelEntry, open_folder
from looper_eval.models import ModelSpec, identify
from looper_eval.settings import Settings
from looper_eval.summary import Summary, compare


@dataclass(frozen=True)
class RunOptions:
    """What to ask whom, and where the records go."""

    models: Sequence[ModelSpec]
    dataset: str
    out: Path
    settings: Settings
    limit: int | None = None
    batch_size: int = 32
    device: str = "auto"


def run(options: RunOptions, console: Console) -> Summary:
    """Bring `options.out` to one record for each model and question, and summarise it.

    Dataset, models and folder are checked before any model is loaded or anything is written.

    Raises:
        UserError: something in `options` cannot be used.
    """
    dataset = load_dataset(options.dataset, options.limit)
    entries = {spec.name: ModelEntry(place=spec.place, identity=identify(spec)) for spec in options.models}
    manifest = open_folder(options.out, dataset, options.settings, entries)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        for spec in options.models:
            task = progress.add_task(spec.name, total=len(dataset.questions))

            def show(done: int, task: TaskID = task) -> None:
                progress.update(task, completed=done)

            answer_all(
                options.out / f"{spec.name}.jsonl",
                dataset.questions,
                options.settings,
                manifest.digest(spec.name),
                partial(
                    open_engine, spec, options.settings, device=options.device, batch_size=options.batch_size
                ),
                batch_size=options.batch_size,
                on_progress=show,
            )
    return compare(options.out)

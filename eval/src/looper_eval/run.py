"""`looper-eval run`: every model on every question, one call each (or --samples), then the summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console

from looper_eval.coherence import all_scored, draw_samples, sampled_settings, score_samples
from looper_eval.dataset import EvalQuestion, load_dataset
from looper_eval.engines import EngineOptions, open_engine, require_whole
from looper_eval.generate import answer_all
from looper_eval.manifest import CoherenceEntry, Manifest, ModelEntry, open_folder
from looper_eval.models import ModelSpec, identify
from looper_eval.progress import shown
from looper_eval.settings import Settings
from looper_eval.summary import Summary, compare
from looper_eval.training_data import check_models
from looper_trainer.errors import RewardUnavailable, UserError
from looper_trainer.reward_client import RewardClient

_EARLY_CHECK_S = 5.0  # scoring, after the samples, waits its full time


@dataclass(frozen=True)
class RunOptions:
    """What to ask whom, and where the records go."""

    models: Sequence[ModelSpec]
    dataset: str
    out: Path
    settings: Settings
    limit: int | None = None
    samples: int = 1
    coherence: int | None = None
    coherence_temperature: float = 0.7
    engine: EngineOptions = field(default_factory=EngineOptions)


def run(options: RunOptions, console: Console) -> Summary:
    """Bring `options.out` to its records for each model and question, and summarise it.

    Dataset, models and folder are checked before any model is loaded or anything is written.

    Raises:
        UserError: something in `options` cannot be used.
    """
    settings = options.settings
    if options.samples > 1 and settings.temperature == 0:
        raise UserError("--samples above 1 needs --temperature: greedy answers to one question are all equal")
    dataset = load_dataset(options.dataset, options.limit)
    entries = {spec.name: ModelEntry(place=spec.place, identity=identify(spec)) for spec in options.models}
    for spec in options.models:
        require_whole(spec)
    coherence = None
    if options.coherence:
        drawn = sampled_settings(settings, options.coherence_temperature)
        coherence = CoherenceEntry(samples=options.coherence, settings=drawn)
        digests = {name: drawn.digest(entry.identity) for name, entry in entries.items()}
        _check_service(
            options.coherence,
            unscored=not all(
                all_scored(options.out, name, dataset.questions, digest, options.coherence)
                for name, digest in digests.items()
            ),
        )
    manifest = open_folder(options.out, dataset, settings, entries, options.samples, coherence)
    with shown(console) as task:
        for spec in options.models:
            answer_all(
                options.out / f"{spec.name}.jsonl",
                dataset.questions,
                settings,
                manifest.digest(spec.name),
                partial(open_engine, spec, settings, options.engine),
                batch_size=options.engine.batch_size,
                samples=options.samples,
                on_progress=task(spec.name, len(dataset.questions) * options.samples),
            )
            if coherence is not None:
                draw_samples(
                    options.out,
                    spec.name,
                    dataset.questions,
                    coherence.settings,
                    manifest.models[spec.name].identity,
                    partial(open_engine, spec, coherence.settings, options.engine),
                    samples=coherence.samples,
                    batch_size=options.engine.batch_size,
                    on_progress=task(f"{spec.name} samples", len(dataset.questions) * coherence.samples),
                )
    check_models(options.models, dataset.questions, options.out)
    if coherence is not None:
        _score(options, manifest, coherence, dataset.questions, console)
    return compare(options.out)


def _check_service(samples: int, *, unscored: bool) -> None:
    """Refuse an unusable address or key, and where something is unscored, what the service would refuse.

    A service that is away is no failure yet: samples can be drawn without it.
    """
    with RewardClient.from_environment(run_id="looper-eval", give_up_after_s=_EARLY_CHECK_S) as client:
        if not unscored:
            return
        try:
            most = client.info().limits.max_arms
        except RewardUnavailable:
            return
    if samples > most:
        raise UserError(f"--coherence is {samples}; the reward service takes at most {most} samples")


def _score(
    options: RunOptions,
    manifest: Manifest,
    coherence: CoherenceEntry,
    questions: Sequence[EvalQuestion],
    console: Console,
) -> None:
    with RewardClient.from_environment(run_id="looper-eval") as client, shown(console) as task:
        for spec in options.models:
            digest = coherence.settings.digest(manifest.models[spec.name].identity)
            missing = score_samples(
                options.out,
                spec.name,
                questions,
                digest,
                coherence.samples,
                client,
                on_progress=task(f"{spec.name} scores", len(questions)),
            )
            if missing:
                console.print(
                    f"{spec.name}: {missing} of {len(questions)} questions have no coherence score; "
                    "the same command asks for them again"
                )

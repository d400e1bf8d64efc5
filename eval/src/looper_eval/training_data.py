"""What a checkpoint says it was trained on, held against the evaluation questions without being asked.

The trainer leaves `training_data.json` (file, its digest, digests of the questions) beside a model, and
`config.toml` with the names of the training file and of the model it started from. Both are followed, also
from a `merged` or `adapter` folder to the run above it, and from PPO back to SFT. A training file that is
still there and the same is looked at in all three ways; of one that is gone, the digests still tell equal
questions.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from looper_eval.contamination import Hit, find_contamination
from looper_eval.dataset import EvalQuestion, load_dataset
from looper_eval.manifest import write_json
from looper_eval.models import ModelSpec, locate
from looper_eval.summary_types import Contamination
from looper_trainer.errors import UserError

CONTAMINATION = "contamination.json"
_MOST_HITS = 3  # listed for each question and look
_DEPTH = 4  # PPO, SFT, base; and one more


class Source(NamedTuple):
    """A training file that a checkpoint names, and the digests of its questions where it records them."""

    file: Path
    sha256: str | None
    questions: frozenset[str]


def check_models(specs: Sequence[ModelSpec], questions: Sequence[EvalQuestion], out: Path) -> None:
    """Add to `<out>/contamination.json` what each of `specs` is known to have been trained on."""
    found = read_contamination(out)
    for spec in specs:
        if spec.is_endpoint:
            continue
        sources = _distinct(training_sources(spec))
        if sources:
            found[spec.name] = _check(sources, questions)
        else:
            found.pop(spec.name, None)
    if not found and not (out / CONTAMINATION).exists():
        return
    write_json(out / CONTAMINATION, {name: one.model_dump(mode="json") for name, one in found.items()})


def read_contamination(out: Path) -> dict[str, Contamination]:
    """What `check_models` wrote into `out`; nothing where it did not run."""
    try:
        found = json.loads((out / CONTAMINATION).read_text(encoding="utf-8"))
        return {name: Contamination.model_validate_json(json.dumps(one)) for name, one in found.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def training_sources(spec: ModelSpec) -> Iterator[Source]:
    """The training files behind `spec`, its own run's first."""
    place = locate(spec)
    folders = [Path(place.base)] if place.adapter is None else [place.adapter, Path(place.base)]
    seen: set[Path] = set()
    for _ in range(_DEPTH):
        folders = [folder for folder in folders if folder.is_dir() and folder.resolve() not in seen]
        seen |= {folder.resolve() for folder in folders}
        bases = []
        for folder in folders:
            # `merged` and `adapter` lie in the folder of their run.
            for home in (folder, folder.parent):
                config = _toml(home / "config.toml")
                recorded = _json(home / "training_data.json")
                yield from _sources(config, recorded, home)
                if base := config.get("model"):
                    bases.append(_existing(Path(str(base)), home))
        folders = bases


def _sources(config: dict[str, Any], recorded: dict[str, Any], home: Path) -> Iterator[Source]:
    digests = recorded.get("questions")
    if isinstance(digests, list) and isinstance(recorded.get("file"), str):
        file = _existing(Path(recorded["file"]), home)
        yield Source(file, str(recorded.get("sha256")), frozenset(map(str, digests)))
    elif isinstance(config.get("train_file"), str):
        yield Source(_existing(Path(config["train_file"]), home), None, frozenset())


def _distinct(sources: Iterator[Source]) -> list[Source]:
    """One source for each file, with its digests where any has them."""
    found: dict[Path, Source] = {}
    for one in sources:
        key = one.file.resolve()
        if key not in found or (one.questions and not found[key].questions):
            found[key] = one
    return list(found.values())


def _check(sources: Sequence[Source], questions: Sequence[EvalQuestion]) -> Contamination:
    hits: list[Hit] = []
    files, unread = [], []
    for source in sources:
        train = _same_file(source)
        if train is not None:
            hits += find_contamination(train, questions, most=_MOST_HITS)
            files.append(source.file.name)
            continue
        unread.append(source.file.name)
        for item in questions:
            if question_digest(item.question) in source.questions:
                hits.append(Hit("exact", item.id, source.file.name, item.question))
    rank = {"exact": 0, "masked": 1, "ngram": 2}
    kinds: dict[str, str] = {}
    for hit in sorted(hits, key=lambda one: rank[one.kind]):
        kinds.setdefault(hit.eval_id, hit.kind)
    return Contamination(
        files=tuple(files),
        digests_only=tuple(unread),
        questions=len(questions),
        touched={kind: sum(one == kind for one in kinds.values()) for kind in rank},
        hits=tuple((hit.kind, hit.eval_id, hit.train_id, hit.shared[:200]) for hit in dict.fromkeys(hits)),
    )


def _same_file(source: Source) -> Sequence[EvalQuestion] | None:
    """The questions of the training file, unless it is gone or has changed since."""
    try:
        if source.sha256 and hashlib.sha256(source.file.read_bytes()).hexdigest() != source.sha256:
            return None
        return load_dataset(str(source.file)).questions
    except (OSError, UserError):
        return None


def question_digest(question: str) -> str:
    """SHA-256 of `question` in lower case with single spaces, as the trainer records it."""
    return hashlib.sha256(" ".join(question.casefold().split()).encode()).hexdigest()


def _toml(path: Path) -> dict[str, Any]:
    """The settings in `path`, those of its tables (`[sft]`, `[ppo]`) without their names."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    tables = [table for table in found.values() if isinstance(table, dict)]
    return {key: value for table in [*tables, found] for key, value in table.items()}


def _existing(path: Path, beside: Path) -> Path:
    """`path`, or the same under a folder above `beside`: runs record paths relative to where they ran."""
    if path.is_absolute() or path.exists():
        return path
    return next((up / path for up in beside.resolve().parents if (up / path).exists()), path)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}

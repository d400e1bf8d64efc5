"""What a folder of results was made from: dataset, settings, models. It decides what may be added to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from looper_eval.dataset import Dataset, EvalQuestion
from looper_eval.settings import Settings, changed_fields
from looper_schemas.records import RecordError, read_records, write_records
from looper_trainer.errors import UserError

MANIFEST = "run.json"
QUESTIONS = "questions.jsonl"
# In place of the settings of answers that were asked for elsewhere: they are not known.
IMPORTED = Settings(preset="imported", template="{q}")


class ModelEntry(BaseModel):
    """A model of the folder: where it was, and the identity its records are marked with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    place: str
    identity: str


class CoherenceEntry(BaseModel):
    """The samples that were drawn for coherence, beside the recorded answers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: Annotated[int, Field(ge=2)]
    settings: Settings


class Manifest(BaseModel):
    """Contents of `run.json`. Models are in the order in which they are compared."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str
    dataset_digest: str
    settings: Settings
    samples: Annotated[int, Field(ge=1)] = 1
    coherence: CoherenceEntry | None = None
    models: dict[str, ModelEntry]

    def digest(self, model: str) -> str:
        """The settings digest of every record of `model`."""
        return self.settings.digest(self.models[model].identity)


def open_folder(
    out: Path,
    dataset: Dataset,
    settings: Settings,
    models: dict[str, ModelEntry],
    samples: int = 1,
    coherence: CoherenceEntry | None = None,
) -> Manifest:
    """Create `out`, or check that it may take these models' answers; then write its manifest and questions.

    Raises:
        UserError: `out` was made with another dataset, other settings or another model of the same name.
    """
    wanted = Manifest(
        dataset=dataset.source,
        dataset_digest=dataset.digest,
        settings=settings,
        samples=samples,
        coherence=coherence,
        models=models,
    )
    if (out / MANIFEST).exists():
        found = read_manifest(out)
        # A model without any answer binds nothing: its folder may have been mended since.
        answered = {name: entry for name, entry in found.models.items() if _has_answers(out, name)}
        if answered:
            found = found.model_copy(update={"models": answered})
            _refuse_mixing(out, found, wanted)
            changes: dict[str, Any] = {"models": {**answered, **models}, "samples": samples}
            wanted = found.model_copy(update=changes | {"coherence": coherence or found.coherence})
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is not a folder of looper-eval results; use a new --out")
    write_folder(out, wanted, dataset.questions)
    return wanted


def write_folder(out: Path, manifest: Manifest, questions: tuple[EvalQuestion, ...]) -> None:
    """Write the manifest and the questions of `out`, each through a temporary file."""
    write_records(out / QUESTIONS, questions)
    write_json(out / MANIFEST, manifest.model_dump(mode="json"))


def read_manifest(out: Path) -> Manifest:
    """The manifest of `out`.

    Raises:
        UserError: `out` holds no results of `looper-eval run`.
    """
    try:
        return Manifest.model_validate_json((out / MANIFEST).read_bytes())
    except (OSError, ValidationError):
        raise UserError(f"{out}: holds no results; name the --out folder of a `looper-eval run`") from None


def read_questions(out: Path) -> list[EvalQuestion]:
    """The questions that were asked in `out`.

    Raises:
        UserError: the file is missing or holds something else.
    """
    try:
        return read_records(out / QUESTIONS, EvalQuestion)
    except RecordError as error:
        raise UserError(str(error)) from None


def write_json(path: Path, payload: Any) -> None:
    """Write `payload` to `path` through a temporary file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(
        json.dumps(payload, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )
    partial.replace(path)


def _has_answers(out: Path, name: str) -> bool:
    records = out / f"{name}.jsonl"
    return records.is_file() and records.stat().st_size > 0


def _refuse_mixing(out: Path, found: Manifest, wanted: Manifest) -> None:
    if found.dataset_digest != wanted.dataset_digest:
        raise UserError(f"{out}: holds answers to other questions ({found.dataset}); use another --out")
    if changed := changed_fields(found.settings, wanted.settings):
        raise UserError(f"{out}: has answers to other settings ({', '.join(changed)}); use another --out")
    for name, entry in wanted.models.items():
        if name in found.models and found.models[name].identity != entry.identity:
            raise UserError(
                f"{out}: {name} was another model then ({found.models[name].place}); use another name"
            )

"""Which model is meant by `NAME=PLACE`, and an identity that changes when its weights do.

A folder that was trained again keeps its path, so the path says nothing about whose answers were recorded.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from looper_trainer.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# Names of the files that a run writes beside <name>.jsonl.
RESERVED = frozenset({"questions", "summary", "run", "report", "card"})
_WHOLE_FILE_BYTES = 64 * 2**20
_PROBE_BYTES = 2**16
_PROBES = 64
_WEIGHTS = ("*.safetensors", "*.bin")
_ADAPTER = "adapter_config.json"
_IDENTITY_FILES = (*_WEIGHTS, "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")
# Files beside a checkpoint that do not change what the model answers.
_NOT_THE_MODEL = frozenset(
    {"trainer_state.json", "metrics.json", "eval_results.json", "training_args.bin", "optimizer.bin"}
)


@dataclass(frozen=True)
class ModelSpec:
    """A model under the name it has in tables.

    `place` is a checkpoint folder, a LoRA adapter's folder (or `ADAPTER@BASE`), a hub name, or `URL#MODEL`.
    """

    name: str
    place: str

    @property
    def is_endpoint(self) -> bool:
        """Whether the model answers over HTTP."""
        return self.place.startswith(("http://", "https://"))


class Place(NamedTuple):
    """Where a model's weights are: a folder or hub name, and the folder of the LoRA adapter over it."""

    base: str
    adapter: Path | None


def locate(spec: ModelSpec) -> Place:
    """What to load for `spec`: its own folder or name, or the base of an adapter's folder and the adapter.

    `ADAPTER@BASE` names another base than the one that the adapter's configuration records.

    Raises:
        UserError: an adapter that names no base.
    """
    folder, _, base = spec.place.rpartition("@") if "@" in spec.place else (spec.place, "", "")
    adapter = Path(folder)
    if not (adapter / _ADAPTER).is_file() or (adapter / "config.json").is_file():
        return Place(spec.place, None)
    base = base or str(_adapter_config(adapter).get("base_model_name_or_path") or "")
    if not base:
        raise UserError(f"{adapter}: names no base model; write ADAPTER@BASE")
    return Place(base, adapter)


def adapter_rank(folder: Path) -> int:
    """The largest rank of the LoRA adapter in `folder`."""
    config = _adapter_config(folder)
    try:
        return max(int(config["r"]), *map(int, (config.get("rank_pattern") or {"": 0}).values()))
    except (KeyError, ValueError, TypeError):
        raise UserError(f"{folder}: its {_ADAPTER} states no rank, so it is no LoRA adapter") from None


def _adapter_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / _ADAPTER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{folder}: holds no readable {_ADAPTER}; name the folder of a LoRA adapter")
    return config


def parse_models(texts: list[str]) -> list[ModelSpec]:
    """Models from `NAME=PLACE` texts, in order.

    Raises:
        UserError: no model, a text of another shape, a name that repeats or cannot name a file, or an
            endpoint without its model.
    """
    if not texts:
        raise UserError("no model to evaluate; give at least one --model NAME=PATH")
    specs: list[ModelSpec] = []
    for text in texts:
        name, equals, place = text.partition("=")
        if not equals or not place:
            raise UserError(f"--model {text}: write NAME=PATH, for example --model sft=checkpoints/sft")
        if not _NAME.fullmatch(name) or name in RESERVED or name.endswith((".samples", ".coherence")):
            raise UserError(
                f"--model {text}: {name!r} cannot name a model; use letters, digits, '.', '_' and '-'"
            )
        if any(spec.name == name for spec in specs):
            raise UserError(f"--model {name}: the name is used twice; give each model its own")
        spec = ModelSpec(name, place)
        if spec.is_endpoint and not place.partition("#")[2]:
            raise UserError(
                f"model {name}: write an endpoint as URL#MODEL, e.g. http://127.0.0.1:8000/v1#my-model"
            )
        specs.append(spec)
    return specs


def identify(spec: ModelSpec) -> str:
    """What tells this model's answers from another's, without loading it.

    Raises:
        UserError: there is no such model.
    """
    if spec.is_endpoint:
        return f"endpoint:{spec.place}"
    place = locate(spec)
    if place.adapter is not None:
        base = identify(ModelSpec(spec.name, place.base))
        return f"adapter:{_folder_digest(place.adapter, config=_ADAPTER)}@{base}"
    folder = Path(spec.place)
    if folder.is_dir():
        return f"folder:{_folder_digest(folder)}"
    if folder.exists() or spec.place.count("/") != 1 or spec.place.startswith((".", "/", "~")):
        raise UserError(
            f"model {spec.name}: {spec.place} is no folder; name a checkpoint folder or a hub model"
        )
    return f"hub:{spec.place}@{_hub_commit(spec)}"


def _folder_digest(folder: Path, config: str = "config.json") -> str:
    """Digest over the files that make the model; of large ones, size and 64 evenly spaced blocks."""
    if not (folder / config).is_file():
        raise UserError(f"{folder}: holds no {config}, so it is no model checkpoint; name its folder")
    if not any(file for pattern in _WEIGHTS for file in folder.glob(pattern)):
        raise UserError(f"{folder}: holds no model weights (*.safetensors); name a complete checkpoint")
    files = {
        file
        for pattern in _IDENTITY_FILES
        for file in folder.glob(pattern)
        if file.name not in _NOT_THE_MODEL
    }
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(json.dumps([file.name, file.stat().st_size]).encode())
        digest.update(_file_digest(file))
    return digest.hexdigest()


def _file_digest(file: Path) -> bytes:
    digest, size = hashlib.sha256(), file.stat().st_size
    with file.open("rb") as data:
        if size <= _WHOLE_FILE_BYTES:
            return hashlib.file_digest(data, "sha256").digest()
        for probe in range(_PROBES):
            data.seek((size - _PROBE_BYTES) * probe // (_PROBES - 1), os.SEEK_SET)
            digest.update(data.read(_PROBE_BYTES))
    return digest.digest()


def _hub_commit(spec: ModelSpec) -> str:
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(spec.place, "config.json")).parent.name
    except ImportError:
        raise UserError(
            f"model {spec.name}: {spec.place} is no folder; install 'looper-eval[local]' for the hub"
        ) from None
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise UserError(
            f"model {spec.name}: {spec.place} is no folder here, and the hub does not give it ({reason})"
        ) from None

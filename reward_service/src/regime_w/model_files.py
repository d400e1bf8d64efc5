"""Where an embedding model's files come from: a folder, the hub's cache, an installed package, the hub."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Models that an installed package carries as a zip of the hub's folder: hub name -> (package, file).
PACKAGED_MODELS = {"sentence-transformers/all-MiniLM-L6-v2": ("all_minilm_l6_v2", "model.zip")}
MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "modules.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
)


class EmbeddingUnavailable(RuntimeError):
    """No usable embedding model under this name; the message says what to do."""


def read_model_files(model: str) -> dict[str, bytes]:
    """The files of MODEL_FILES of a local folder, a hub model, or a model in an installed package.

    The hub's cache is asked before the package, the network last.

    Raises:
        EmbeddingUnavailable: found nowhere, or incomplete.
    """
    folder = Path(model)
    if folder.is_dir():
        return _from_folder(folder)
    cached = hub_folder(model, MODEL_FILES, local_only=True)
    if cached is not None:
        return _from_folder(cached)
    if model in PACKAGED_MODELS:
        package, filename = PACKAGED_MODELS[model]
        spec = importlib.util.find_spec(package)  # found, not imported: the package prints when it is
        if spec is not None and spec.submodule_search_locations:
            return _from_zip(Path(spec.submodule_search_locations[0]) / filename)
    fetched = hub_folder(model, MODEL_FILES, local_only=False)
    if fetched is not None:
        return _from_folder(fetched)
    hint = " or install the extra looper-reward-service[offline]" if model in PACKAGED_MODELS else ""
    raise EmbeddingUnavailable(
        f"embedding model {model!r} was not found: give the path of its folder, connect to the hub{hint}"
    )


def require_mean_pooling(files: Mapping[str, bytes], model: str) -> None:
    """Raise EmbeddingUnavailable unless the model is an encoder with mean pooling and no more."""
    kinds = [module["type"].rsplit(".", 1)[-1] for module in json.loads(files["modules.json"])]
    pooling: dict[str, Any] = json.loads(files["1_Pooling/config.json"])
    modes = {key for key, value in pooling.items() if key.startswith("pooling_mode_") and value}
    if pooling.get("pooling_mode") == "mean":
        modes = {"pooling_mode_mean_tokens"}
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]) or modes != {
        "pooling_mode_mean_tokens"
    }:
        raise EmbeddingUnavailable(
            f"embedding model {model!r} does not pool by the mean; choose one that does"
        )


def hub_folder(model: str, patterns: Sequence[str], *, local_only: bool) -> Path | None:
    """The folder of a hub model with files of `patterns`, downloaded unless `local_only`; None: no such."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        path = huggingface_hub.snapshot_download(
            model, allow_patterns=list(patterns), local_files_only=local_only
        )
    except (OSError, HfHubHTTPError, HFValidationError, ValueError):
        return None
    return Path(path)


def _from_folder(folder: Path) -> dict[str, bytes]:
    try:
        return {name: (folder / name).read_bytes() for name in MODEL_FILES}
    except FileNotFoundError as error:
        raise EmbeddingUnavailable(
            f"{error.filename}: missing; the folder holds no sentence-transformers model"
        ) from None


def _from_zip(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        try:
            return {name: archive.read(name) for name in MODEL_FILES}
        except KeyError as error:
            raise EmbeddingUnavailable(f"{path.name}: {error.args[0]}; reinstall the package") from None

"""Whether a folder is a model checkpoint, and whether it may become one; told without loading any library."""

from __future__ import annotations

from pathlib import Path

from looper_trainer.errors import CheckpointError


def require_checkpoint(path_or_name: str) -> None:
    """Refuse what is plainly no checkpoint before any library tries to load it.

    Raises:
        CheckpointError: a folder without model files, or a path that does not exist.
    """
    folder = Path(path_or_name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{path_or_name}: holds no config.json, so it is no model checkpoint")
        if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
            raise CheckpointError(f"{path_or_name}: holds no model weights (*.safetensors)")
    elif folder.exists():
        raise CheckpointError(f"{path_or_name}: is a file; name the folder of a model checkpoint")
    elif folder.parts[:1] == ("checkpoints",):  # where our stages write; no name on the hub
        raise CheckpointError(
            f"{path_or_name}: no such folder; run the stage that writes it first, or name another model"
        )
    elif path_or_name.startswith((".", "/", "~")) or path_or_name.count("/") != 1:
        raise CheckpointError(f"{path_or_name}: no such folder; name a model checkpoint or a hub model")


def check_output(output: Path, *read: str | Path) -> None:
    """Refuse to replace a folder that holds something else than a model, or a model that is `read`.

    Raises:
        CheckpointError: `output` is a file, or a folder with other content, or is read.
    """
    require_apart(output, *read)
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"{output}: is a file; choose another --output")
    if output.is_dir() and any(output.iterdir()) and not (output / "config.json").is_file():
        raise CheckpointError(f"{output}: holds other files than a model; choose another --output")


def require_apart(output: Path, *read: str | Path) -> None:
    """Refuse to write where a model is that is read from.

    Raises:
        CheckpointError: `output` is one of those folders, or holds one.
    """
    place = output.resolve()
    for model in read:
        if Path(model).exists() and Path(model).resolve().is_relative_to(place):
            raise CheckpointError(f"{output}: holds {model}, which is read from; choose another --output")

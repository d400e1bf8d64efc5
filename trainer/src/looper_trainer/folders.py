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
    elif path_or_name.startswith((".", "/", "~")) or path_or_name.count("/") != 1:
        raise CheckpointError(f"{path_or_name}: no such folder; name a model checkpoint or a hub model")


def check_output(output: Path) -> None:
    """Refuse to replace a folder that holds something else than a model.

    Raises:
        CheckpointError: `output` is a file, or a folder with other content.
    """
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"{output}: is a file; choose another --output")
    if output.is_dir() and any(output.iterdir()) and not (output / "config.json").is_file():
        raise CheckpointError(f"{output}: holds other files than a model; choose another --output")

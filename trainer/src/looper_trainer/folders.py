"""Which model a folder holds, if any, and who may write there; told without loading any library."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from looper_trainer.errors import CheckpointError, UserError


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


@contextmanager
def written_alone(output: Path, lock: Path) -> Iterator[None]:
    """No other command writes `output` for as long as this lasts.

    A lock of the operating system on the file `lock`, which ends with this process however that ends. Where
    the file system has no locks there is none. The file, and folders made for it alone, go in the end.

    Raises:
        UserError: another command writes it.
    """
    made = [folder for folder in lock.parents if not folder.exists()]
    lock.parent.mkdir(parents=True, exist_ok=True)
    file = _locked(output, lock)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(file)
        for folder in made:
            with suppress(OSError):  # something else is in it
                folder.rmdir()


def _locked(output: Path, lock: Path) -> int:
    while True:
        file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise UserError(
                f"{output}: another looper command is writing it; wait for it, or choose another --output"
            ) from None
        except OSError:
            return file
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), lock.stat()):
                return file
        os.close(file)  # the command that had it removed the file before it let go


def policy_id(model: str) -> str:
    """The name of `model`, with a digest of its weights where it is a local folder."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin")):
        digest.update(bytes.fromhex(file_digest(file)))
    return f"{model}@{digest.hexdigest()[:16]}"


def file_digest(file: Path) -> str:
    """SHA-256 of the content of `file`."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Names of what is not the same, with commas; empty where all is."""
    return ", ".join(sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key)))

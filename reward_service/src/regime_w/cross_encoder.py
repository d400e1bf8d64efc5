"""The model behind judge `nli`: a sentence-transformers `CrossEncoder` with a label `entailment`.

Every pair has a forward pass of its own, without padding, on one thread: its probability then has the same
bits alone and in any company, which the library's batches do not promise. Threads share the pairs out.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from regime_w.backends import resolve_device
from regime_w.embedding import split_windows
from regime_w.judges import JudgeUnavailable
from regime_w.model_files import hub_folder
from regime_w.nli_judge import Piece
from regime_w.streams import usable_cores

_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
_LONGEST = 512  # of a model that states no window, in tokens


class CrossEncoderEntailer:
    """P(entailment) of pairs of texts. Loads nothing before `__init__`.

    Args:
        model: a folder, or a hub name.
        device: "auto" (a GPU if any), "cpu", "cuda", ...
        streams: threads that compute; None: one a usable core, on a GPU one.

    Raises:
        JudgeUnavailable: it is not found, cannot be read, or has no label `entailment`.
    """

    def __init__(self, model: str, *, device: str = "auto", streams: int | None = None) -> None:
        folder = Path(model)
        if not folder.is_dir():
            found = hub_folder(model, _FILES, local_only=True) or hub_folder(model, _FILES, local_only=False)
            if found is None:
                raise JudgeUnavailable(
                    f"judge model {model!r} was not found: give the path of its folder, or connect to the hub"
                )
            folder = found
        device = resolve_device(device)
        self._model = _load(folder, device)
        label = _entailment(self._model.config.id2label, model)
        self._label = label
        self._tokenizer = self._model.tokenizer
        stated = self._model.max_seq_length
        window = min(_LONGEST, stated) if isinstance(stated, int) else _LONGEST
        # A piece cut out of a text may become a token longer at either end.
        self._piece_tokens = (window - self._tokenizer.num_special_tokens_to_add(pair=True)) // 2 - 2
        if self._piece_tokens < 1:
            raise JudgeUnavailable(f"judge model {model!r}: a window of {window} tokens holds no two texts")
        self._lock = threading.Lock()  # a fast tokenizer changes its settings while it works
        self.concurrency = streams or (usable_cores() if device == "cpu" else 1)
        self._pool = ThreadPoolExecutor(self.concurrency, "nli", _enter if device == "cpu" else None)
        self.identity = _identity(folder, device, label)

    def pieces(self, text: str) -> list[Piece]:
        """`text` in pieces of nearly equal length; half of the window holds each."""
        with self._lock:
            encoded = self._tokenizer(
                text, add_special_tokens=False, truncation=False, return_offsets_mapping=True, verbose=False
            )
        spans: list[tuple[int, int]] = encoded["offset_mapping"]
        windows = split_windows(range(len(spans)), self._piece_tokens)
        return [Piece(text[spans[w[0]][0] : spans[w[-1]][1]], len(w)) for w in windows]

    def entailed(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """P(premise entails hypothesis) of every pair, in order."""
        return list(self._pool.map(self._one, pairs))

    def _one(self, pair: tuple[str, str]) -> float:
        import torch
        from sentence_transformers.util import batch_to_device

        with self._lock:
            features = self._model.preprocess([list(pair)])
        with torch.inference_mode():
            logits_1L = self._model(batch_to_device(features, self._model.device))["scores"].double()
            return float(torch.softmax(logits_1L, dim=1)[0, self._label])


def _enter() -> None:
    import torch

    torch.set_num_threads(1)  # of this thread: pairs, not operators, share the cores


def _load(folder: Path, device: str) -> Any:
    from sentence_transformers import CrossEncoder

    try:
        return CrossEncoder(
            str(folder),
            device=device,
            local_files_only=True,
            model_kwargs={"use_safetensors": True, "dtype": "float32"},
        ).eval()
    except Exception as error:  # readers of weights and tokenizers raise what they like
        raise JudgeUnavailable(
            f"judge model {folder.name}: cannot be read ({type(error).__name__}): its files are damaged or "
            "not those of a cross-encoder; choose another"
        ) from None


def _entailment(labels: dict[int, str], model: str) -> int:
    found = [int(index) for index, name in labels.items() if str(name).lower() == "entailment"]
    if len(found) != 1 or len(labels) < 2:
        raise JudgeUnavailable(
            f"judge model {model!r}: its config.json names no label `entailment`; choose a model of inference"
        )
    return found[0]


def _identity(folder: Path, device: str, label: int) -> str:
    import sentence_transformers
    import tokenizers
    import torch
    import transformers

    files = sorted({file for pattern in _FILES for file in folder.rglob(pattern)})
    digests = [f"{f.relative_to(folder)}={hashlib.blake2b(f.read_bytes()).hexdigest()}" for f in files]
    modules = (sentence_transformers, tokenizers, torch, transformers)
    versions = [f"{module.__name__}={module.__version__}" for module in modules]
    return "|".join([*digests, device.split(":")[0], str(label), *versions])

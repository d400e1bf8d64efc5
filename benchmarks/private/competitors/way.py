"""One way to embed texts on these cores, as a process that `embedding_ways.py` drives.

    python way.py NAME MODEL_FOLDER TEXTS.json VECTORS.npy

Loads the way NAME, embeds the first texts to warm up, prints `ready`; then for every line on stdin embeds all
texts and prints the seconds that took. At the end of stdin it writes the vectors of the last round, and those
of the texts one at a time, to VECTORS.npy: (2, n, d) float32.

Except for the naive way all of them get the same help: sorted by length, batches of about 2,048 tokens, two
threads of one core each where the library lets its caller choose.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from _servers import os

CORES = len(os.sched_getaffinity(0))
BATCH_TOKENS = 2048
WINDOW = 256
ALONE = 16  # texts that are embedded one at a time as well

Embed = Callable[[Sequence[str]], Any]  # n texts -> (n, d) unit vectors


def unit(vectors: Any) -> Any:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def library(folder: str, dtype: str = "float32", compiled: bool = False) -> Any:
    """The model of sentence-transformers as a user loads it, without the packaged padding to 128."""
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": getattr(torch, dtype)})
    model.tokenizer.backend_tokenizer.no_padding()
    model.max_seq_length = WINDOW
    if compiled:
        model[0].auto_model.compile(dynamic=True)  # in place: the library holds it by other names too
    return model


def naive(folder: str) -> Embed:
    """Eight texts a call, default threads: what the naive service does."""
    model = library(folder)

    def embed(texts: Sequence[str]) -> Any:
        parts = [
            model.encode(list(texts[i : i + 8]), normalize_embeddings=True, show_progress_bar=False)
            for i in range(0, len(texts), 8)
        ]
        return np.concatenate(parts)

    return embed


def one_call(dtype: str, compiled: bool) -> Callable[[str], Embed]:
    """All texts in one call of the library (which sorts them), batches of 8."""

    def load(folder: str) -> Embed:
        model = library(folder, dtype, compiled)
        return lambda texts: unit(
            model.encode(list(texts), batch_size=8, convert_to_tensor=True, show_progress_bar=False)
            .float()
            .numpy()
        )

    return load


def batched(run: Callable[[Any, Any], Any], folder: str) -> Embed:
    """`run(ids, mask)` -> (batch, tokens, d), in a thread a core, over batches of similar lengths."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
    tokenizer.enable_truncation(WINDOW)
    tokenizer.no_padding()
    pool = ThreadPoolExecutor(CORES)

    def embed(texts: Sequence[str]) -> Any:
        rows = [tokenizer.encode(text).ids for text in texts]
        batches: list[list[int]] = [[]]
        for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
            if batches[-1] and (len(batches[-1]) + 1) * len(rows[i]) > BATCH_TOKENS:
                batches.append([])
            batches[-1].append(i)

        def one(batch: list[int]) -> Any:
            longest = max(len(rows[i]) for i in batch)
            ids = np.zeros((len(batch), longest), dtype=np.int64)
            mask = np.zeros_like(ids)
            for place, i in enumerate(batch):
                ids[place, : len(rows[i])] = rows[i]
                mask[place, : len(rows[i])] = 1
            return unit((run(ids, mask) * mask[..., None]).sum(axis=1))

        vectors = np.zeros((len(texts), 384), dtype=np.float32)
        for batch, found in zip(batches, pool.map(one, batches), strict=True):
            vectors[batch] = found
        return vectors

    return embed


def plain_module(folder: str) -> Any:
    import torch
    import transformers

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager")

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    return Plain().float().eval()


def onnx(kind: str) -> Callable[[str], Embed]:
    """ONNX Runtime, float32 or its dynamic 8-bit quantisation of the linear layers."""

    def load(folder: str) -> Embed:
        import onnxruntime
        import torch
        from onnxruntime.quantization import QuantType, quantize_dynamic

        file = f"{folder}/way.onnx"
        example = (torch.ones(2, 9, dtype=torch.int64), torch.ones(2, 9, dtype=torch.int64))
        axes = {0: "batch", 1: "tokens"}
        torch.onnx.export(
            plain_module(folder), example, file, input_names=["ids", "mask"], output_names=["hidden"],
            dynamic_axes={"ids": axes, "mask": axes, "hidden": axes}, dynamo=False, opset_version=17,
        )  # fmt: skip
        if kind == "int8":
            quantize_dynamic(file, f"{folder}/way8.onnx", weight_type=QuantType.QInt8, per_channel=True)
            file = f"{folder}/way8.onnx"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        return batched(lambda ids, mask: session.run(None, {"ids": ids, "mask": mask})[0], folder)

    return load


def openvino(kind: str) -> Callable[[str], Embed]:
    """OpenVINO in float32, or with NNCF's 8 bits (transformer preset, our calibration texts)."""

    def load(folder: str) -> Embed:
        import openvino as ov
        import tokenizers
        import torch

        from regime_w.int8 import calibration_texts

        example = {name: torch.ones(2, 9, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
        model = ov.convert_model(plain_module(folder), example_input=example)
        if kind == "int8":
            import nncf

            tokenizer = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
            tokenizer.enable_truncation(WINDOW)
            tokenizer.no_padding()
            rows = [np.array([tokenizer.encode(text).ids]) for text in calibration_texts()]
            model = nncf.quantize(
                model,
                nncf.Dataset(rows, lambda ids: {"input_ids": ids, "attention_mask": np.ones_like(ids)}),
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=len(rows),
            )
        compiled = ov.Core().compile_model(
            model, "CPU",
            {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": CORES, "NUM_STREAMS": CORES},
        )  # fmt: skip
        local = __import__("threading").local()

        def run(ids: Any, mask: Any) -> Any:
            if not hasattr(local, "request"):
                local.request = compiled.create_infer_request()
            return local.request.infer({"input_ids": ids, "attention_mask": mask})[0]

        return batched(run, folder)

    return load


def ours(backend: str) -> Callable[[str], Embed]:
    def load(folder: str) -> Embed:
        from regime_w.embedding import TransformerEmbedder

        return TransformerEmbedder(folder, backend=backend, device="cpu").embed

    return load


WAYS: dict[str, Callable[[str], Embed]] = {
    "naive": naive,
    "library, one call": one_call("float32", False),
    "library, bfloat16": one_call("bfloat16", False),
    "torch.compile": one_call("float32", True),
    "ONNX Runtime float32": onnx("float32"),
    "ONNX Runtime int8": onnx("int8"),
    "OpenVINO float32": openvino("float32"),
    "OpenVINO int8": openvino("int8"),
    "ours float32": ours("packed-float32"),
    "ours bfloat16": ours("packed-bf16"),
    "ours int16": ours("packed-int16"),
    "ours int8": ours("packed-int8"),
}


def main(name: str, folder: str, texts_file: str, vectors_file: str) -> None:
    texts = json.loads(Path(texts_file).read_text())
    replies = os.fdopen(os.dup(1), "w")  # libraries print what they like: what counts goes past them
    os.dup2(2, 1)
    embed = WAYS[name](folder)
    vectors = embed(texts)
    print("ready", file=replies, flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        vectors = embed(texts)
        print(time.perf_counter() - started, file=replies, flush=True)
    alone = np.array(vectors)
    for i in range(ALONE):
        alone[i] = embed([texts[i]])[0]
    np.save(vectors_file, np.stack([vectors, alone]))


if __name__ == "__main__":
    main(*sys.argv[1:])

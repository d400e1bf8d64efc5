"""What runs the embedding model. Each backend gives a window the same bits alone and in any company.

name              device  how                                                          s_path from float32 by
float32           cpu     one window at a time, `transformers`; the reference          0
packed-float32    cpu     many windows end to end (`packed`)                           at most .0001
packed-bf16       cpu     the same, bfloat16 products                                  at most .0015
packed-int16      cpu     the same, 16-bit products made of 8-bit ones (`int8`)        at most .0001
packed-int8       cpu     the same, 8-bit products (`int8`): the fast mode             at most .01
fixed-float32     any     batches of fixed shapes (`fixed_shapes`)                     at most .0001
auto                      fixed-float32 on a GPU; on a CPU, of a BERT encoder, packed-bf16 where bfloat16
                          products are fast, packed-int16 where 8-bit ones are, else packed-float32;
                          float32 for any other encoder

Integers need numba, the extra `fast`. `packed-int8` is never chosen by `auto`: its error is a tenth and more
of what s_path varies by.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from regime_w.settings import EmbeddingBackend
from regime_w.streams import Forward, Window

if TYPE_CHECKING:
    import torch

BACKENDS: tuple[str, ...] = get_args(EmbeddingBackend)
_INTEGER = ("packed-int16", "packed-int8")
_PACKED = ("packed-float32", "packed-bf16", *_INTEGER)

# Of every length class: a few tokens, a row block of `packed` and a half, and several windows' worth.
_PROBES = tuple(f"step {n} " + f"adds {n} * 7 = {7 * n} more, " * n for n in (0, 1, 3, 5, 9, 14, 20))

_CPU_CHUNK_TOKENS = 2048  # larger chunks fall out of the cache of a CPU core
_GPU_CHUNK_TOKENS = 65_536


@dataclass(frozen=True)
class Backend:
    """A loaded model. `enter` runs once in each thread that calls `forward`."""

    name: str
    device: str
    dimension: int
    forward: Forward
    chunk_tokens: int
    enter: Callable[[], Any]
    identity: tuple[str, ...]


def load_backend(
    files: Mapping[str, bytes], name: str, device: str, window: int, encode: Callable[[str], Window]
) -> Backend:
    """The backend `name` over the model in `files` (see `model_files`), for windows of `window` tokens.

    `encode` gives the first window of a text.

    Raises:
        KeyError, ValueError, RuntimeError, ImportError: the model cannot be run like this, or not with the
            same bits for a text in every batch (`require_same_bits`).
    """
    import safetensors.torch
    import torch
    import transformers

    config: dict[str, Any] = json.loads(files["config.json"])
    device = resolve_device(device)
    if name == "auto":
        name = best_backend(config["model_type"], device)
    if name in _PACKED and config["model_type"] != "bert":
        raise ValueError(f"{name} runs BERT encoders only; set embedding_backend = 'auto'")
    if name in ("float32", *_PACKED) and device != "cpu":
        raise ValueError(f"{name} runs on a CPU only; set embedding_backend = 'auto'")
    weights = {
        key: value.float()
        for key, value in safetensors.torch.load(files["model.safetensors"]).items()
        if not key.endswith("position_ids")  # a buffer of older versions
    }
    identity: tuple[str, ...] = (f"torch={torch.__version__}", f"transformers={transformers.__version__}")
    chunk_tokens = _CPU_CHUNK_TOKENS if device == "cpu" else _GPU_CHUNK_TOKENS
    forward: Forward
    if name in _INTEGER:
        numba_version = _require_numba()
        from regime_w.int8 import Int8Linear, Int16Linear, calibration_texts, integer_bert

        torch.set_num_threads(1)
        kind = Int8Linear if name == "packed-int8" else Int16Linear
        forward = integer_bert(config, weights, [encode(text) for text in calibration_texts()], kind)
        identity += (f"numba={numba_version}",)
    elif name in _PACKED:
        from regime_w.packed import PackedBert, PlainLinear

        dtype = torch.bfloat16 if name == "packed-bf16" else torch.float32
        forward = PackedBert(config, weights, lambda _, weight, bias: PlainLinear(weight, bias, dtype))
    elif name == "float32":
        forward = _one_at_a_time(_plain_model(config, weights))
    elif name == "fixed-float32":
        from regime_w.fixed_shapes import FixedShapes

        forward = FixedShapes(_plain_model(config, weights).to(device), window, device)
    else:
        raise ValueError(f"unknown embedding backend {name!r}; choose from {', '.join(BACKENDS)}")

    def enter() -> None:
        if device == "cpu":
            torch.set_num_threads(1)  # of this thread: streams, not operators, share the cores

    require_same_bits(name, forward, [encode(text) for text in _PROBES], enter)
    return Backend(name, device, int(config["hidden_size"]), forward, chunk_tokens, enter, identity)


def require_same_bits(
    name: str, forward: Forward, windows: Sequence[Window], enter: Callable[[], Any]
) -> None:
    """Refuse a backend that on this machine gives a window other bits in company than alone.

    Raises:
        RuntimeError: it does; another backend is named.
    """
    with ThreadPoolExecutor(1, initializer=enter) as stream:
        alone = list(stream.map(lambda window: forward([window])[0], windows))
        for company in (windows, windows[::-1], windows[1:]):
            together = stream.submit(forward, company).result()
            if not all(
                np.array_equal(alone[windows.index(w)], sums)
                for w, sums in zip(company, together, strict=True)
            ):
                raise RuntimeError(
                    f"on this machine {name} gives a text other bits in another batch; set "
                    "embedding_backend = 'float32', and report the processor"
                )


def resolve_device(device: str) -> str:
    """`device`, with "auto" replaced by what this machine has."""
    import torch

    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def best_backend(model_type: str, device: str) -> str:
    """The backend that `auto` stands for on this machine."""
    import torch

    if device != "cpu":
        return "fixed-float32"
    if model_type != "bert":
        return "float32"
    capabilities = torch.cpu.get_capabilities()
    # Without AMX, Intel's cores multiply bfloat16 no faster than float32 (measured: at .6 of its rate).
    fast = capabilities.get("amx_bf16") or (
        capabilities.get("avx512_bf16") and "Intel" not in str(capabilities.get("cpu_name"))
    )
    if fast:
        return "packed-bf16"
    # Three products of 8 bits at four times the rate of float32 (measured: 1.3 times as fast in all).
    integers = capabilities.get("avx512_vnni") and find_spec("numba")
    return "packed-int16" if integers else "packed-float32"


def _require_numba() -> str:
    try:
        import numba
    except ImportError:
        raise ImportError("it needs numba: pip install 'looper-reward-service[fast]'") from None
    return str(numba.__version__)


def _plain_model(config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    import transformers

    model: torch.nn.Module = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**config))
    model.float().eval().load_state_dict(weights)
    return model


def _one_at_a_time(model: torch.nn.Module) -> Forward:
    import torch

    @torch.inference_mode()
    def forward(windows: Any) -> list[Any]:
        totals = []
        for window in windows:
            hidden_TD = model(input_ids=torch.tensor([window])).last_hidden_state[0]
            totals.append(np.asarray(hidden_TD.double().sum(dim=0).numpy()))
        return totals

    return forward

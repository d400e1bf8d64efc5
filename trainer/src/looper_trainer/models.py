"""Base models: loading them for training, and merging an adapter into a plain Hugging Face folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from looper_trainer.errors import CheckpointError, ConfigError, UserError
from looper_trainer.folders import require_apart
from looper_trainer.sampling.transformers import load_pretrained, one_line, resolve_device, resolve_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHT_FILES = ("*.safetensors", "*.bin")


def load_base(
    path_or_name: str, device: str = "auto", dtype: str = "auto", nf4: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A frozen causal language model without dropout, in eval mode, and its tokenizer.

    Args:
        path_or_name: a folder written by `save_pretrained`, or a hub name.
        device: "auto" is a GPU where there is one; else a torch device.
        dtype: "auto" is the checkpoint's own on a GPU and float32 on a CPU; else a torch dtype's name.
        nf4: hold the linear layers in 4 bits (needs bitsandbytes).

    Raises:
        CheckpointError: there is no model there.
    """
    place = resolve_device(device)
    given = _nf4_on(place) if nf4 else {}
    model, tokenizer = load_pretrained(path_or_name, resolve_dtype(dtype, place), **given)
    model.requires_grad_(False)
    remove_dropout(model)
    return (model if nf4 else model.to(place)).eval(), tokenizer


def _nf4_on(place: torch.device) -> dict[str, Any]:
    """What makes `from_pretrained` hold linear layers in 4 bits on `place`: QLoRA, arXiv:2305.14314."""
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise ConfigError("quantize nf4 needs bitsandbytes; run: pip install 'looper-trainer[qlora]'")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": quantization, "device_map": {"": place}}


def remove_dropout(model: nn.Module) -> None:
    """Set every dropout rate to 0, so that a policy in train mode is the policy that was sampled."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def merge_adapter(adapter: Path, output: Path, base: str | None = None) -> None:
    """Write base + adapter as a plain folder that `transformers` and `vllm serve` load.

    The sum is computed once, in float32, and stored in the base's dtype; repeated merging in place would
    drift. An existing `output` is replaced only when the new one is complete.

    Raises:
        CheckpointError: `adapter` is no adapter, or does not fit `base`, or the base cannot be loaded.
    """
    from peft import PeftConfig, PeftModel
    from safetensors import SafetensorError
    from transformers import AutoConfig

    if not (adapter / "adapter_config.json").is_file():
        raise CheckpointError(f"{adapter}: holds no adapter_config.json; name the folder of a LoRA adapter")
    if output.exists() and any(output.iterdir()) and not (output / "config.json").is_file():
        raise UserError(f"{output}: exists and is no merged model; choose another --output or remove it")
    base = base or PeftConfig.from_pretrained(adapter).base_model_name_or_path
    if not base:
        raise CheckpointError(f"{adapter}: does not say which model it was trained on; name it with --base")
    require_apart(output, base, adapter)
    model, tokenizer = load_base(base, device="cpu", dtype="float32")
    dtype = AutoConfig.from_pretrained(base).dtype or torch.float32
    try:
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{adapter}: does not fit the model {base}: {one_line(error)}") from error
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    merged.to(dtype).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(output, ignore_errors=True)
    partial.rename(output)

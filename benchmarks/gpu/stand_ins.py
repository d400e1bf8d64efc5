"""Folders that stand in for models where the real weights are not at hand.

    python stand_ins.py shape OUT --like llama-8b --tokenizer DIR    # a config without weights
    python stand_ins.py adapter OUT --model DIR --rank 16 --seed 1   # a random LoRA adapter that fits DIR

A shape serves with vLLM's `--load-format dummy` (random weights): true speed and memory, no meaning. The
adapter's weights are random and small, so that it costs what a trained one costs and changes the
model a little.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

SHAPES = {
    "llama-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "rope_theta": 500000.0,
    },
}  # fmt: skip
COMMON = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192, "tie_word_embeddings": False, "attention_bias": False,
    "torch_dtype": "bfloat16",
}  # fmt: skip


def write_shape(out: Path, like: str, tokenizer: Path) -> None:
    """A model folder with the sizes of `like` and somebody's tokenizer, without weights."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, out / name)
    ids = json.loads((tokenizer / "config.json").read_text())
    special = {key: ids.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (out / "config.json").write_text(json.dumps(COMMON | SHAPES[like] | special, indent=1))


def write_adapter(out: Path, model: Path, rank: int, seed: int) -> int:
    """A LoRA adapter on every linear layer but the head, in PEFT's format; returns its parameters."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    layers = {
        "self_attn.q_proj": (hidden, queries), "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys), "self_attn.o_proj": (queries, hidden),
        "mlp.gate_proj": (hidden, wide), "mlp.up_proj": (hidden, wide), "mlp.down_proj": (wide, hidden),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for index in range(config["num_hidden_layers"]):
        for name, (fan_in, fan_out) in layers.items():
            stem = f"base_model.model.model.layers.{index}.{name}"
            a = torch.randn(rank, fan_in, generator=generator) / fan_in**0.5
            b = torch.randn(fan_out, rank, generator=generator) * 1e-3
            weights[f"{stem}.lora_A.weight"], weights[f"{stem}.lora_B.weight"] = a.bfloat16(), b.bfloat16()
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / "adapter_model.safetensors")
    adapter = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "bias": "none",
        "target_modules": [name.split(".")[1] for name in layers], "base_model_name_or_path": str(model),
    }  # fmt: skip
    (out / "adapter_config.json").write_text(json.dumps(adapter, indent=1))
    return sum(weight.numel() for weight in weights.values())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    shape = commands.add_parser("shape")
    shape.add_argument("out", type=Path)
    shape.add_argument("--like", choices=SHAPES, required=True)
    shape.add_argument("--tokenizer", type=Path, required=True)
    adapter = commands.add_parser("adapter")
    adapter.add_argument("out", type=Path)
    adapter.add_argument("--model", type=Path, required=True)
    adapter.add_argument("--rank", type=int, default=16)
    adapter.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.command == "shape":
        write_shape(options.out, options.like, options.tokenizer)
    else:
        parameters = write_adapter(options.out, options.model, options.rank, options.seed)
        print(f"{options.out}: rank {options.rank}, {parameters:,} parameters")


if __name__ == "__main__":
    main()

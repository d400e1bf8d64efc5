"""A model of a given size with random weights and a tokenizer of plain words, where no real one is at hand.

Speed and memory are those of a real model of that shape; texts mean nothing. Every word is one token, so a
prompt has the length that a benchmark asks for, and a completion almost always runs to its limit.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from looper_schemas.prompt import format_prompt
from looper_schemas.records import Problem

SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "tie_word_embeddings": False,
    },
    "small": {
        "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
}  # fmt: skip


def write_model(folder: Path, shape: str, device: str, dtype: str, seed: int = 0) -> int:
    """A plain model folder of `shape`; weights are drawn on `device`. Returns the number of parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **SHAPES[shape], max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        rms_norm_eps=1e-5, attention_bias=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(previous)
    parameters = sum(p.numel() for p in model.parameters())
    model.save_pretrained(folder)
    word_tokenizer(config.vocab_size).save_pretrained(folder)
    del model
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    return parameters


def word_tokenizer(vocab_size: int) -> Any:
    """Token i is the word "w<i>"; what it does not know is token 0, and every text begins with token 1."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def problems(count: int, prompt_tokens: int, vocab_size: int, seed: int = 0) -> list[Problem]:
    """Questions whose prompts have `prompt_tokens` tokens."""
    rng = random.Random(seed)
    frame = len(format_prompt("x").split())  # the words of the prompt and one of the question
    words = max(1, prompt_tokens - frame)  # and BOS
    return [
        Problem(
            id=f"random/{i}",
            question=" ".join(f"w{rng.randrange(3, vocab_size)}" for _ in range(words)),
            answer="1",
        )
        for i in range(count)
    ]

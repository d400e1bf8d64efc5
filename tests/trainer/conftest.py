"""A tiny Llama with a byte-level tokenizer whose padding token is its EOS, and a few GSM8K-like lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

GSM8K_LINES = [
    {
        "question": f"Ann has {n} apples and buys {n + 2} more. How many apples does she have?",
        "answer": f"She has {n} + {n + 2} = <<{n}+{n + 2}={2 * n + 2}>>{2 * n + 2} apples.\n#### {2 * n + 2}",
    }
    for n in range(1, 41)
]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama of 2 layers; BOS before every text, padding with EOS."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from looper_schemas.prompt import format_prompt
    from looper_trainer.demo.model import train_tokenizer

    texts = [f"{format_prompt(line['question'])} {line['answer']}" for line in GSM8K_LINES]
    tokenizer = train_tokenizer(texts, 400)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def gsm8k_file(tmp_path: Path) -> Path:
    """A `train.jsonl` of 40 problems in GSM8K's own format, in a folder of its own."""
    file = tmp_path / "raw" / "train.jsonl"
    file.parent.mkdir()
    file.write_text("".join(json.dumps(line) + "\n" for line in GSM8K_LINES), encoding="utf-8")
    return file


RunLooper = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def looper(tmp_path: Path) -> RunLooper:
    """Runs the `looper` command as a process in `tmp_path`, without any reward service in its environment."""

    def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("LOOPER_")}
        return subprocess.run(
            [sys.executable, "-m", "looper_trainer.cli", *map(str, arguments)],
            cwd=tmp_path,
            env=inherited | {"HF_HUB_OFFLINE": "1"} | environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run

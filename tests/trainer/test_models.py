"""Merging an adapter against the arithmetic of LoRA, and refusing what is no model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from looper_trainer.config import load_config
from looper_trainer.errors import CheckpointError, UserError
from looper_trainer.merge import MergeConfig
from looper_trainer.merge import run as run_merge
from looper_trainer.models import load_base, merge_adapter, remove_dropout


def save_base(folder: Path, dtype: torch.dtype = torch.float32, hidden_size: int = 16) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=hidden_size,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_dropout=0.5,
    )
    model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder)
    vocabulary = {"<eos>": 0} | {str(i): i for i in range(1, 20)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>")), eos_token="<eos>"
    ).save_pretrained(folder)
    return model


def save_adapter(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Write a random adapter of `base`; returns its weights."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.config._name_or_path = str(base)
    tuned = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")
    )
    torch.manual_seed(1)
    for name, weight in tuned.named_parameters():
        if "lora_" in name:
            weight.data.normal_(std=0.3)
    tuned.save_pretrained(folder)
    return {name: weight.detach().clone() for name, weight in tuned.named_parameters()}


def test_a_merged_weight_is_base_plus_scaled_product_rounded_once_to_the_base_dtype(tmp_path: Path) -> None:
    save_base(tmp_path / "base", torch.bfloat16)
    weights = save_adapter(tmp_path / "base", tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
    prefix = "base_model.model.model.layers.1.mlp.up_proj."
    base = weights[prefix + "base_layer.weight"]
    delta = weights[prefix + "lora_B.default.weight"] @ weights[prefix + "lora_A.default.weight"]
    expected = (base + (8 / 4) * delta).to(torch.bfloat16)
    assert torch.equal(merged.model.layers[1].mlp.up_proj.weight, expected)
    assert not torch.equal(expected, base.to(torch.bfloat16))


def test_looper_merge_reads_its_base_from_the_adapter_and_replaces_an_older_merge(tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    save_adapter(tmp_path / "base", tmp_path / "adapter")
    overrides = {"adapter": str(tmp_path / "adapter"), "output": str(tmp_path / "merged")}
    for _ in range(2):
        run_merge(load_config(MergeConfig, None, overrides))
    assert (tmp_path / "merged" / "tokenizer_config.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "merged"]


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json"):
        merge_adapter(tmp_path / "base", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_another_model_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    save_base(tmp_path / "wider", hidden_size=32)
    save_adapter(tmp_path / "base", tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="does not fit"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", str(tmp_path / "wider"))
    assert not list(tmp_path.glob("merged*"))


def test_a_folder_of_something_else_is_never_replaced_by_a_merge(tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    save_adapter(tmp_path / "base", tmp_path / "adapter")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    with pytest.raises(UserError, match="no merged model"):
        merge_adapter(tmp_path / "adapter", tmp_path / "notes")
    assert (tmp_path / "notes" / "diary.txt").read_text() == "mine"


def test_a_merge_replaces_neither_its_base_nor_its_adapter(tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    save_adapter(tmp_path / "base", tmp_path / "run" / "adapter")
    (tmp_path / "run" / "config.json").write_text("{}")  # as if it were a model
    for output in ("base", "run"):
        with pytest.raises(CheckpointError, match="which is read from"):
            merge_adapter(tmp_path / "run" / "adapter", tmp_path / output)
    assert (tmp_path / "base" / "model.safetensors").is_file()
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_weights_that_are_missing_are_not_made_up(tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"lacks 1 of the model's tensors, model\.layers\.1\.mlp\.up_proj"
    ):
        load_base(str(tmp_path / "base"), device="cpu")


def test_a_result_that_was_never_made_is_not_looked_for_on_the_hub() -> None:
    with pytest.raises(CheckpointError, match="no such folder; run the stage that writes it first"):
        load_base("checkpoints/absent")


def test_an_adapter_that_was_cut_short_is_one_line(tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    save_adapter(tmp_path / "base", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="does not fit the model"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert not list(tmp_path.glob("merged*"))


def test_a_loaded_base_is_frozen_and_has_no_dropout(tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    model, _ = load_base(str(tmp_path / "base"), device="cpu")
    assert not any(p.requires_grad for p in model.parameters())
    model.train()
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_a_path_that_holds_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        load_base(str(tmp_path))


def test_dropout_modules_lose_their_rate() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.7))
    remove_dropout(module)
    x = torch.ones(4, 2)
    assert torch.equal(module.train()(x), module.eval()(x))

"""The merged copy samples what the unmerged policy does, follows its adapter, and leaves it alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from looper_schemas.prompt import format_prompt
from looper_trainer.sampling.base import SamplingParams
from looper_trainer.sampling.merged import MergedSampler
from looper_trainer.sampling.transformers import TransformersSampler

GREEDY = SamplingParams(16, temperature=0)


@pytest.fixture
def policy(tiny_model: Path) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    return get_peft_model(base, LoraConfig(r=4, lora_alpha=12, target_modules="all-linear")).eval()


def randomise(policy: Any, seed: int) -> None:
    """Give the adapter weights that change what the model says."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in policy.named_parameters():
        if "lora_" in name:
            weight.data = 0.3 * torch.randn(weight.shape, generator=generator)


def test_merged_copy_samples_as_the_policy_after_every_change_of_its_adapter(
    policy: Any, tiny_model: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    merged, plain = MergedSampler(policy, tokenizer), TransformersSampler(policy, tokenizer)
    prompts = [merged.encode(format_prompt("Ann has 3 apples. How many?"))]
    said = set()
    for seed in (1, 2, 3):
        randomise(policy, seed)
        (ours,), (theirs,) = (sampler.sample(prompts, GREEDY, [[0]]) for sampler in (merged, plain))
        assert ours[0].token_ids == theirs[0].token_ids
        assert ours[0].logprobs == pytest.approx(theirs[0].logprobs, abs=1e-4)
        said.add(ours[0].token_ids)
    assert len(said) > 1


def test_sampling_from_the_copy_leaves_every_bit_of_the_policy(policy: Any, tiny_model: Path) -> None:
    randomise(policy, 1)
    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    sampler = MergedSampler(policy, AutoTokenizer.from_pretrained(tiny_model))
    for _ in range(3):
        sampler.sample([sampler.encode("Ann?")], GREEDY, [[0]])
    assert all(torch.equal(weight, before[name]) for name, weight in policy.state_dict().items())
    assert [name for name, weight in policy.named_parameters() if weight.requires_grad]


def test_weights_do_not_depend_on_how_often_they_were_merged(policy: Any, tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    often = MergedSampler(policy, tokenizer)
    for seed in (*range(20), 7):
        randomise(policy, seed)
        often.refresh()
    once = MergedSampler(policy, tokenizer)
    once.refresh()
    for name, weight in once.model.state_dict().items():
        assert torch.equal(weight, often.model.state_dict()[name]), name

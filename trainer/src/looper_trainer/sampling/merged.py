"""Sampling from a second copy of the trunk that has the adapter merged into its weights.

An unmerged adapter costs three small operations on every linear layer for every token, which for a small
model is more than the model itself. The copy's weights are computed afresh before each call, from the frozen
base and the adapter as they are then: base + scale * B A in float32, rounded once to the base's dtype. So
nothing drifts, however often the adapter changes, and the policy itself is never merged. What the rounding
moves is in the sampler's logprobs, and the truncated importance weight corrects for it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from looper_trainer.sampling.base import Completion, SamplingParams
from looper_trainer.sampling.transformers import TransformersSampler

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class MergedSampler(TransformersSampler):
    """A `TransformersSampler` of a PEFT model's current weights; costs the base model's memory once more.

    Args:
        peft_model: the policy, with LoRA on linear layers.
        tokenizer, batch_size: see `TransformersSampler`.
    """

    def __init__(
        self, peft_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 64
    ) -> None:
        self.policy: Any = peft_model
        merged = copy.deepcopy(self.policy).merge_and_unload()
        super().__init__(merged.requires_grad_(False).eval(), tokenizer, batch_size)

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        """See `Sampler.sample`; from the adapter as it is at this call."""
        self.refresh()
        return super().sample(prompts, params, seeds)

    @torch.no_grad()
    def refresh(self) -> None:
        """Compute the merged weights from the base's and the adapter's."""
        from peft.tuners.lora import LoraLayer

        base = self.policy.get_base_model()
        for name, layer in base.named_modules():
            if isinstance(layer, LoraLayer):
                weight = layer.get_base_layer().weight
                delta = sum(layer.get_delta_weight(adapter).float() for adapter in layer.active_adapters)
                self.model.get_submodule(name).weight.copy_(weight.float() + delta)

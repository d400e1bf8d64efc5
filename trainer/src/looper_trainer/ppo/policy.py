"""The policy: one frozen trunk with a LoRA adapter and a value head; the reference is the bare trunk.

One forward pass of the trunk gives logprobs and values. Logits exist for a chunk of completion positions
at a time, and backward computes them again instead of keeping them, so memory never holds a full-vocabulary
tensor for the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from looper_trainer.errors import CheckpointError
from looper_trainer.models import load_base
from looper_trainer.ppo.batch import MicroBatch, Row, micro_batch
from looper_trainer.ppo.config import PPOConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PolicyOutput(NamedTuple):
    """What one forward pass says of a micro-batch's completions: each (n, T), float32, zero at padding."""

    logprobs_nT: Tensor
    entropy_nT: Tensor
    values_nT: Tensor


class Policy(nn.Module):
    """LoRA policy, reference policy and value function on one trunk.

    Args:
        base: a causal language model; it is wrapped in place and its weights stay frozen.
        lora_rank, lora_alpha: of the adapter on every linear layer but the output head.
        temperature: what logits are divided by, as in sampling.
        logit_chunk_tokens: completion positions whose logits exist at a time.
        activation_checkpointing: compute the trunk's activations again in backward.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        lora_rank: int = 16,
        lora_alpha: int = 32,
        temperature: float = 1.0,
        logit_chunk_tokens: int = 1024,
        activation_checkpointing: bool = False,
    ) -> None:
        from peft import LoraConfig, get_peft_model

        super().__init__()
        lora = LoraConfig(
            task_type="CAUSAL_LM",
            r=lora_rank,
            lora_alpha=lora_alpha,
            lora_dropout=0.0,
            target_modules="all-linear",
        )
        self.model: Any = get_peft_model(base, lora)
        self.causal_lm: Any = self.model.get_base_model()
        hidden_size = int(self.causal_lm.config.get_text_config().hidden_size)
        self.value_head = nn.Linear(hidden_size, 1, dtype=torch.float32, device=base.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.temperature = temperature
        self.logit_chunk_tokens = logit_chunk_tokens
        self.activation_checkpointing = activation_checkpointing
        if activation_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.eval()
        self._check_architecture()

    @classmethod
    def load(cls, config: PPOConfig) -> tuple[Policy, Any]:
        """The policy that `config` describes, before any training, and its tokenizer."""
        base, tokenizer = load_base(config.model, config.device, config.dtype)
        torch.manual_seed(config.seed)
        policy = cls(
            base,
            config.lora_rank,
            config.lora_alpha,
            config.temperature,
            config.logit_chunk_tokens,
            config.activation_checkpointing,
        )
        return policy, tokenizer

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.value_head.weight.device

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The adapter's weights, in a fixed order."""
        return [p for name, p in self.model.named_parameters() if "lora_" in name]

    def forward(self, batch: MicroBatch, with_entropy_gradient: bool = False) -> PolicyOutput:
        """Logprobs, entropies and values at the completion tokens of `batch`."""
        hidden_NH = self._completion_states(batch)
        targets_N = batch.completion_ids_nT[batch.completion_mask_nT]
        logprobs_N, entropy_N = self._logprobs(hidden_NH, targets_N, with_entropy_gradient)
        values_N = self.value_head(hidden_NH.float())[:, 0]
        return PolicyOutput(*(_unpack(x_N, batch) for x_N in (logprobs_N, entropy_N, values_N)))

    def values(self, batch: MicroBatch) -> Tensor:
        """Values (n, T) whose gradient stops at the value head."""
        with torch.no_grad():
            hidden_NH = self._completion_states(batch)
        return _unpack(self.value_head(hidden_NH.float())[:, 0], batch)

    @torch.no_grad()
    def ref_logprobs(self, batch: MicroBatch) -> Tensor:
        """Logprobs (n, T) under the reference: the same trunk with its adapter disabled."""
        with self.model.disable_adapter():
            hidden_NH = self._completion_states(batch)
        targets_N = batch.completion_ids_nT[batch.completion_mask_nT]
        return _unpack(self._logprobs(hidden_NH, targets_N, with_entropy_gradient=False)[0], batch)

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Train mode where activation checkpointing needs it; without dropout, outputs are the same."""
        self.train(self.activation_checkpointing)
        try:
            yield
        finally:
            self.eval()

    def precision(self) -> AbstractContextManager[Any]:
        """Autocast to bfloat16 where the trunk is bfloat16 (the adapter's own weights stay float32)."""
        if self.causal_lm.dtype == torch.bfloat16:
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def _completion_states(self, batch: MicroBatch) -> Tensor:
        """Final hidden states (N, H) in which the N real completion tokens were chosen, row by row."""
        with self.precision():
            hidden_bSH = self.causal_lm.base_model(
                input_ids=batch.input_ids_bS,
                attention_mask=batch.attention_mask(),
                position_ids=batch.position_ids_bS,
                use_cache=False,
            ).last_hidden_state
        states_NH: Tensor = hidden_bSH.flatten(0, 1)[batch.state_index_nT[batch.completion_mask_nT]]
        return states_NH

    def _logprobs(
        self, hidden_NH: Tensor, targets_N: Tensor, with_entropy_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        with self.precision():
            return chunked_logprobs(
                hidden_NH,
                targets_N,
                self.causal_lm.get_output_embeddings(),
                self.temperature,
                self.logit_chunk_tokens,
                with_entropy_gradient,
            )

    @torch.no_grad()
    def _check_architecture(self) -> None:
        """Refuse a model that does more than attention within packs and one output layer can reproduce."""
        vocab_size = self.causal_lm.config.get_text_config().vocab_size
        ids = [i % vocab_size for i in (5, 3, 8, 2, 9, 7)]
        rows = [Row(ids[:2], ids[2:4], [0.0] * 2), Row(ids[:2], ids[3:6], [0.0] * 3)]
        packed_nT = self.ref_logprobs(micro_batch(rows, [[0, 1]], self.device))
        for line, row in enumerate(rows):
            text = torch.tensor([[*row.prompt_ids, *row.completion_ids]], device=self.device)
            with self.precision(), self.model.disable_adapter():
                logits = self.causal_lm(input_ids=text, use_cache=False).logits[0, 1:-1].float()
            plain_TV = (logits / self.temperature).log_softmax(dim=-1)
            plain_T = plain_TV.gather(1, text[0, 2:, None])[:, 0]
            tolerance = 1e-3 if self.causal_lm.dtype == torch.float32 else 0.1
            if not torch.allclose(packed_nT[line, : len(plain_T)], plain_T, atol=tolerance, rtol=tolerance):
                name = type(self.causal_lm).__name__
                raise CheckpointError(
                    f"{name} does more than causal attention and one output layer; PPO cannot train it yet"
                )


def _unpack(x_N: Tensor, batch: MicroBatch) -> Tensor:
    """(n, T) with `x_N` at the real tokens and zero elsewhere."""
    zeros_nT = x_N.new_zeros(batch.completion_mask_nT.shape)
    return zeros_nT.masked_scatter(batch.completion_mask_nT, x_N)


def chunked_logprobs(
    hidden_NH: Tensor,
    targets_N: Tensor,
    head: nn.Module,
    temperature: float = 1.0,
    chunk: int = 1024,
    with_entropy_gradient: bool = True,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `targets` and entropies of softmax(head(hidden) / temperature), each (N,) float32.

    At most `chunk` rows of logits exist at a time, in forward and in backward.
    """

    def of_chunk(hidden_CH: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
        logits_CV = head(hidden_CH).float() / temperature
        log_probs_CV = logits_CV.log_softmax(dim=-1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and with_entropy_gradient):
            entropy_C = -(log_probs_CV.exp() * log_probs_CV).sum(dim=-1)
        return log_probs_CV.gather(1, targets_C[:, None])[:, 0], entropy_C

    needs_gradient = torch.is_grad_enabled() and hidden_NH.requires_grad
    parts = []
    chunks = zip(torch.split(hidden_NH, chunk), torch.split(targets_N, chunk), strict=True)
    for hidden_CH, targets_C in chunks:
        if needs_gradient:
            parts.append(
                checkpoint(of_chunk, hidden_CH, targets_C, use_reentrant=False, preserve_rng_state=False)
            )
        else:
            parts.append(of_chunk(hidden_CH, targets_C))
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)

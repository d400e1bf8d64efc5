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
from looper_trainer.ppo.batch import MicroBatch
from looper_trainer.ppo.config import PPOConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PolicyOutput(NamedTuple):
    """What one forward pass says of a micro-batch's completions: each (b, T), float32, zero at padding."""

    logprobs_bT: Tensor
    entropy_bT: Tensor
    values_bT: Tensor


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
        self._check_head()

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
        targets_N = batch.completion_ids_bT[batch.completion_mask_bT]
        logprobs_N, entropy_N = self._logprobs(hidden_NH, targets_N, with_entropy_gradient)
        values_N = self.value_head(hidden_NH.float())[:, 0]
        return PolicyOutput(*(_unpack(x_N, batch) for x_N in (logprobs_N, entropy_N, values_N)))

    def values(self, batch: MicroBatch) -> Tensor:
        """Values (b, T) whose gradient stops at the value head."""
        with torch.no_grad():
            hidden_NH = self._completion_states(batch)
        return _unpack(self.value_head(hidden_NH.float())[:, 0], batch)

    @torch.no_grad()
    def ref_logprobs(self, batch: MicroBatch) -> Tensor:
        """Logprobs (b, T) under the reference: the same trunk with its adapter disabled."""
        with self.model.disable_adapter():
            hidden_NH = self._completion_states(batch)
        targets_N = batch.completion_ids_bT[batch.completion_mask_bT]
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
            # No attention mask: see `batch`. Positions count from 0, as padding is on the right.
            hidden_bSH = self.causal_lm.base_model(
                input_ids=batch.input_ids_bS, use_cache=False
            ).last_hidden_state
        line_N, t_N = batch.completion_mask_bT.nonzero(as_tuple=True)
        states_NH: Tensor = hidden_bSH[line_N, batch.state_index_bT[line_N, t_N]]
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
    def _check_head(self) -> None:
        """Refuse an architecture whose logits are more than its output layer on its final hidden state."""
        head = self.causal_lm.get_output_embeddings()
        ids = (
            torch.arange(4, device=self.device)[None, :] % self.causal_lm.config.get_text_config().vocab_size
        )
        whole = self.causal_lm(input_ids=ids, use_cache=False).logits.float()
        ours = head(self.causal_lm.base_model(input_ids=ids, use_cache=False).last_hidden_state).float()
        if not torch.allclose(whole, ours, rtol=1e-3, atol=1e-3):
            name = type(self.causal_lm).__name__
            raise CheckpointError(
                f"{name} changes its logits after the output layer; PPO cannot train it yet"
            )


def _unpack(x_N: Tensor, batch: MicroBatch) -> Tensor:
    """(b, T) with `x_N` at the real tokens and zero elsewhere."""
    zeros_bT = x_N.new_zeros(batch.completion_mask_bT.shape)
    return zeros_bT.masked_scatter(batch.completion_mask_bT, x_N)


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

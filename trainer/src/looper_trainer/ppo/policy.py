"""The policy: a trunk and a value head on it. What is trained is a LoRA adapter, or every weight.

With an adapter the trunk stays frozen and the reference is the bare trunk. With every weight (for small
models) the reference is a frozen copy of the start, which costs the model's memory once more: a departure
from "one trunk", since an adapter may limit what a small model can learn.

One forward pass of the trunk gives logprobs and values. Logits exist for a chunk of completion positions
at a time, and backward computes them again instead of keeping them, so memory never holds a full-vocabulary
tensor for the batch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from looper_trainer.errors import CheckpointError
from looper_trainer.models import load_base
from looper_trainer.ppo.batch import MicroBatch, Row, micro_batch
from looper_trainer.ppo.config import PPOConfig
from looper_trainer.sampling.transformers import resolve_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MOST_GRAPHS = 64  # of one compiled layer
# Kinds of layer that do not see the whole past, and the setting that says how much of it.
_BOUNDED = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}


class PolicyOutput(NamedTuple):
    """What one forward pass says of a micro-batch's completions: each (n, T), float32, zero at padding."""

    logprobs_nT: Tensor
    entropy_nT: Tensor
    values_nT: Tensor


class Policy(nn.Module):
    """Policy, reference policy and value function.

    Args:
        base: a causal language model, frozen; it is wrapped in place, or with `train` "full" trained itself.
        lora_rank, lora_alpha: of the adapter on every linear layer but the output head.
        temperature: what logits are divided by, as in sampling.
        logit_chunk_tokens: completion positions whose logits exist at a time.
        activation_checkpointing: compute the trunk's activations again in backward.
        train: "lora" trains an adapter, "full" every weight.
        lora_rslora: scale the adapter by alpha / sqrt(rank) (arXiv:2312.03732), for high ranks.
        critic_moves_trunk: let the gradient of `forward`'s values go on into the trunk.
        compute_dtype: bfloat16 runs matrix products in it, whatever the weights' dtype.
        torch_compile: compile the trunk's layers, with the roundings of the plain ones.

    Raises:
        CheckpointError: the model does more than PPO can reproduce, or its layers cannot be compiled.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        lora_rank: int = 16,
        lora_alpha: int = 32,
        temperature: float = 1.0,
        logit_chunk_tokens: int = 1024,
        activation_checkpointing: bool = False,
        *,
        train: Literal["lora", "full"] = "lora",
        lora_rslora: bool = False,
        compute_dtype: torch.dtype | None = None,
        critic_moves_trunk: bool = True,
        torch_compile: bool = False,
    ) -> None:
        super().__init__()
        self.train_what = train
        self._frozen_host: list[tuple[nn.Parameter, Tensor]] | None = None
        self.critic_moves_trunk = critic_moves_trunk
        self.compute_dtype = compute_dtype or base.dtype
        self.model: Any
        self.causal_lm: Any
        self.reference: Any
        if train == "full":
            self.model = self.causal_lm = base
            self.reference = copy.deepcopy(base).requires_grad_(False).to(self.compute_dtype)
            base.requires_grad_(True)
        else:
            self.model = _with_adapter(base, lora_rank, lora_alpha, lora_rslora)
            if self.compute_dtype == torch.bfloat16:
                _leave_inputs_to_autocast(self.model)
            self.causal_lm = self.reference = self.model.get_base_model()
        hidden_size = int(self.causal_lm.config.get_text_config().hidden_size)
        self.value_head = nn.Linear(hidden_size, 1, dtype=torch.float32, device=base.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.temperature = temperature
        self.logit_chunk_tokens = logit_chunk_tokens
        self.activation_checkpointing = activation_checkpointing
        if activation_checkpointing:
            self.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        self.eval()
        self._check_architecture()
        if torch_compile:
            self._compile_layers()

    @classmethod
    def load(cls, config: PPOConfig) -> tuple[Policy, Any]:
        """The policy that `config` describes, before any training, and its tokenizer."""
        place = resolve_device(config.device)
        compute_dtype = None
        if config.train == "full":  # steps of 1e-6 vanish in bfloat16 weights
            base, tokenizer = load_base(config.model, config.device, "float32")
            if config.dtype == "bfloat16" or (config.dtype == "auto" and place.type == "cuda"):
                compute_dtype = torch.bfloat16
        else:
            nf4 = config.quantize == "nf4"
            base, tokenizer = load_base(config.model, config.device, config.dtype, nf4)
            compute_dtype = torch.bfloat16 if nf4 else None
        torch.manual_seed(config.seed)
        policy = cls(
            base,
            config.lora_rank,
            config.lora_alpha,
            config.temperature,
            config.logit_chunk_tokens,
            config.activation_checkpointing,
            train=config.train,
            lora_rslora=config.lora_rslora,
            compute_dtype=compute_dtype,
            critic_moves_trunk=config.critic_moves_trunk,
            torch_compile=config.torch_compile,
        )
        return policy, tokenizer

    def leave_gpu(self) -> None:
        """Free the memory of the frozen weights until `return_to_gpu`; they stay in the host's memory."""
        if self._frozen_host is None:
            pin = self.device.type == "cuda"
            frozen = [*self._frozen()]
            self._frozen_host = [(p, p.data.cpu().pin_memory() if pin else p.data.clone()) for p in frozen]
        for parameter, _ in self._frozen_host:
            parameter.data = parameter.data.new_empty(0)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # to the other process

    def return_to_gpu(self) -> None:
        """Bring the frozen weights back; nothing to do where they have not left."""
        for parameter, host in self._frozen_host or ():
            if parameter.numel() != host.numel():
                parameter.data = host.to(self.device, non_blocking=True) if host.is_pinned() else host.clone()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _frozen(self) -> Iterator[nn.Parameter]:
        trained = {id(parameter) for parameter in self._trained().values()}
        for module in {id(m): m for m in (self.model, self.reference)}.values():
            yield from (p for p in module.parameters() if id(p) not in trained)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.value_head.weight.device

    @property
    def eos_id(self) -> int | None:
        """The token that ends a completion; of several, the first in the model's generation config."""
        found: int | list[int] | None = self.causal_lm.generation_config.eos_token_id
        return found[0] if isinstance(found, list) else found

    @property
    def longest_text(self) -> int | None:
        """Tokens of the longest text whose logprobs packs reproduce; None: no bound.

        Beyond it the model looks back over a window, or turns its positions by what else is in the batch.
        """
        text = self.causal_lm.config.get_text_config()
        kinds = getattr(text, "layer_types", None) or _BOUNDED
        limits = [getattr(text, bound, None) for kind, bound in _BOUNDED.items() if kind in kinds]
        rope = getattr(text, "rope_parameters", None) or {}  # one, or one for each kind of layer
        limits += [
            one.get("original_max_position_embeddings") or text.max_position_embeddings
            for one in (rope, *(value for value in rope.values() if isinstance(value, dict)))
            if one.get("rope_type") in ("dynamic", "longrope")
        ]
        return min((limit for limit in limits if limit), default=None)

    def adapter_parameters(self) -> list[nn.Parameter]:
        """What is trained besides the value head, in a fixed order: the adapter's weights, or all."""
        return list(self._trained().values())

    def _trained(self) -> dict[str, nn.Parameter]:
        if self.train_what == "full":
            return dict(self.causal_lm.named_parameters())
        return {name: p for name, p in self.model.named_parameters() if "lora_" in name}

    def save_for_sampler(self, folder: Path) -> None:
        """Write what is trained, for a sampler that has the rest, in the dtype in which both compute."""
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        folder.mkdir(parents=True)
        if self.train_what == "full":
            weights, file = self._trained(), "model.safetensors"
            self.causal_lm.config.save_pretrained(folder)
        else:
            weights, file = get_peft_model_state_dict(self.model), "adapter_model.safetensors"
            self.model.peft_config["default"].save_pretrained(folder)
        cast = {name: w.detach().to(self.compute_dtype).contiguous() for name, w in weights.items()}
        save_file(cast, folder / file, metadata={"format": "pt"})

    def save(self, folder: Path) -> None:
        """Write what is trained: `adapter/` (PEFT's format) or `model/`, and `value_head.safetensors`."""
        from safetensors.torch import save_file

        if self.train_what == "full":
            (folder / "model").mkdir(parents=True)
            self.causal_lm.config.save_pretrained(folder / "model")
            weights = {name: w.detach().contiguous() for name, w in self._trained().items()}
            save_file(weights, folder / "model" / "model.safetensors", metadata={"format": "pt"})
        else:
            self.model.save_pretrained(folder / "adapter", save_embedding_layers=False)
        head = {name: weight.contiguous() for name, weight in self.value_head.state_dict().items()}
        save_file(head, folder / "value_head.safetensors")

    @torch.no_grad()
    def load_saved(self, folder: Path) -> None:
        """Put what `save` wrote to `folder` in place.

        Raises:
            OSError, ValueError, KeyError, RuntimeError: it is not there, or does not fit.
        """
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        if self.train_what == "full":
            saved = load_file(folder / "model" / "model.safetensors")
            mine = self._trained()
            if saved.keys() != mine.keys():
                raise ValueError("the weights do not fit the model")
            for name, weight in mine.items():
                weight.copy_(saved[name])
        else:
            adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
            outcome = set_peft_model_state_dict(self.model, adapter)
            missing = [name for name in outcome.missing_keys if "lora_" in name]
            if missing or outcome.unexpected_keys:
                raise ValueError("the adapter does not fit the model")
        self.value_head.load_state_dict(load_file(folder / "value_head.safetensors"))

    def forward(self, batch: MicroBatch, with_entropy_gradient: bool = False) -> PolicyOutput:
        """Logprobs, entropies and values at the completion tokens of `batch`."""
        hidden_NH = self._completion_states(self.causal_lm, batch)
        targets_N = batch.completion_ids_nT[batch.completion_mask_nT]
        logprobs_N, entropy_N = self._logprobs(self.causal_lm, hidden_NH, targets_N, with_entropy_gradient)
        states_NH = hidden_NH if self.critic_moves_trunk else hidden_NH.detach()
        values_N = self.value_head(states_NH.float())[:, 0]
        return PolicyOutput(*(_unpack(x_N, batch) for x_N in (logprobs_N, entropy_N, values_N)))

    def values(self, batch: MicroBatch) -> Tensor:
        """Values (n, T) whose gradient stops at the value head."""
        with torch.no_grad():
            hidden_NH = self._completion_states(self.causal_lm, batch)
        return _unpack(self.value_head(hidden_NH.float())[:, 0], batch)

    @torch.no_grad()
    def ref_logprobs(self, batch: MicroBatch) -> Tensor:
        """Logprobs (n, T) under the reference: the trunk with its adapter disabled, or the frozen copy."""
        with self._as_reference():
            hidden_NH = self._completion_states(self.reference, batch)
        targets_N = batch.completion_ids_nT[batch.completion_mask_nT]
        return _unpack(self._logprobs(self.reference, hidden_NH, targets_N, False)[0], batch)

    def _as_reference(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.train_what == "full" else self.model.disable_adapter()

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Train mode where activation checkpointing needs it; without dropout, outputs are the same."""
        self.train(self.activation_checkpointing)
        try:
            yield
        finally:
            self.eval()

    def precision(self) -> AbstractContextManager[Any]:
        """Autocast to bfloat16 where that is what is computed in (weights that are trained stay float32)."""
        if self.compute_dtype == torch.bfloat16:
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def _completion_states(self, lm: Any, batch: MicroBatch) -> Tensor:
        """Final hidden states (N, H) in which the N real completion tokens were chosen, row by row."""
        with self.precision():
            hidden_bSH = lm.base_model(
                input_ids=batch.input_ids_bS,
                attention_mask=batch.attention_mask(),
                position_ids=batch.position_ids_bS,
                use_cache=False,
            ).last_hidden_state
        states_NH: Tensor = hidden_bSH.flatten(0, 1)[batch.state_index_nT[batch.completion_mask_nT]]
        return states_NH

    def _logprobs(
        self, lm: Any, hidden_NH: Tensor, targets_N: Tensor, with_entropy_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        with self.precision():
            return chunked_logprobs(
                hidden_NH,
                targets_N,
                lm.get_output_embeddings(),
                self.temperature,
                self.logit_chunk_tokens,
                with_entropy_gradient,
            )

    def _compile_layers(self) -> None:
        """Compile each layer in place, once for all of them, and see that it can be done.

        Without `emulate_precision_casts` fused kernels round less often than plain ones, and not in the same
        places with and without gradients: the first ratio of an update would no longer be exactly 1.
        """
        from transformers.modeling_layers import GradientCheckpointingLayer

        # Policy, reference and update, each with one row and with several: beyond the limit, layers would run
        # plain in some of these passes, with other bits.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_GRAPHS)
        for model in dict.fromkeys((self.causal_lm, self.reference)):
            for layer in model.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    layer.compile(dynamic=True, options={"emulate_precision_casts": True})
        rows = [Row([1, 2], [3] * length, [0.0] * length) for length in (2, 3)]
        try:
            self.ref_logprobs(micro_batch(rows, [[0], [1]], self.device))
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(
                f"torch_compile: {reason}; it needs a C compiler (and Triton on a GPU), or leave it out"
            ) from error

    @torch.no_grad()
    def _check_architecture(self) -> None:
        """Refuse a model that does more than attention within packs and one output layer can reproduce."""
        vocab_size = self.causal_lm.config.get_text_config().vocab_size
        ids = [i % vocab_size for i in (5, 3, 8, 2, 9, 7)]
        rows = [Row(ids[:2], ids[2:4], [0.0] * 2), Row(ids[:2], ids[3:6], [0.0] * 3)]
        packed_nT = self.ref_logprobs(micro_batch(rows, [[0, 1]], self.device))
        for line, row in enumerate(rows):
            text = torch.tensor([[*row.prompt_ids, *row.completion_ids]], device=self.device)
            with self.precision(), self._as_reference():
                logits = self.reference(input_ids=text, use_cache=False).logits[0, 1:-1].float()
            plain_TV = (logits / self.temperature).log_softmax(dim=-1)
            plain_T = plain_TV.gather(1, text[0, 2:, None])[:, 0]
            tolerance = 1e-3 if self.compute_dtype == torch.float32 else 0.1
            if not torch.allclose(packed_nT[line, : len(plain_T)], plain_T, atol=tolerance, rtol=tolerance):
                name = type(self.causal_lm).__name__
                raise CheckpointError(
                    f"{name} does more than causal attention and one output layer; PPO cannot train it yet"
                )


def _with_adapter(base: PreTrainedModel, rank: int, alpha: int, rslora: bool) -> Any:
    """`base` with a fresh LoRA adapter on every linear layer but the output head."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        use_rslora=rslora,
    )
    return get_peft_model(base, lora)


def _leave_inputs_to_autocast(model: Any) -> None:
    """Keep PEFT from copying an adapter's input to float32 for autocast to copy it back: the same bits."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False


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

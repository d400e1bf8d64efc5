"""Whether a run fits on the GPU and how long it may take: from `config.json`, before any weight is loaded.

Memory is in GB of 1e9 bytes. The sums are those of decision 0064; activations are an upper estimate for a
micro-batch that is full. Times are those of one H100 as measured: matrix products at 30% of its bfloat16 peak
(989 TFLOP/s), sampling at 17,500 tokens/s for 8B parameters and no faster for fewer.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from looper_schemas.prompt import format_prompt
from looper_schemas.records import Problem
from looper_trainer.errors import ConfigError
from looper_trainer.folders import require_checkpoint
from looper_trainer.ppo.config import PPOConfig
from looper_trainer.sampling.transformers import resolve_device

GB = 1e9
CONTEXT_GB = 0.6  # a CUDA context and its libraries, in each process
ASLEEP_GB = 2.0  # what a vLLM server keeps while it sleeps: context, graphs, workspaces
NF4_BYTES = 0.52  # a weight in 4 bits with doubly quantised scales
SERVER_EXTRA_GB = 1.5  # a server's activations and graphs beside weights, keys and values
EFFECTIVE_FLOPS = 0.3 * 989e12
SAMPLED_TOKENS_PER_S = 17_500.0


@dataclass(frozen=True)
class Shape:
    """What the sums need of a model: counts of parameters and widths."""

    parameters: int
    linear: int  # of them in linear layers that an adapter sits on
    adapter: int  # of a LoRA adapter of the rank in the settings
    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    cache_bytes_per_token: int


@dataclass(frozen=True)
class Plan:
    """Memory by owner, and what is resident when."""

    shape: Shape
    frozen_gb: float
    trained_gb: float
    activations_gb: float
    server_weights_gb: float
    server_gb: float
    servers: int  # of ours on the trainer's card
    takes_turns: bool
    leaves: bool

    @property
    def trainer_gb(self) -> float:
        """The trainer while it trains."""
        return CONTEXT_GB + self.frozen_gb + self.trained_gb + self.activations_gb

    @property
    def training_gb(self) -> float:
        """The card while the policy is trained."""
        return self.trainer_gb + (ASLEEP_GB if self.takes_turns else self.server_gb)

    @property
    def sampling_gb(self) -> float:
        """The card while completions are sampled."""
        frozen = 0.0 if self.leaves else self.frozen_gb
        activations = 0.0 if self.takes_turns or self.server_gb else self.activations_gb
        return CONTEXT_GB + frozen + self.trained_gb + activations + self.server_gb

    @property
    def peak_gb(self) -> float:
        """The most that the card has in use."""
        return max(self.training_gb, self.sampling_gb)

    def describe(self, config: PPOConfig, problems: Sequence[Problem]) -> str:
        """The plan on a few lines: what `--dry-run` prints."""
        shape = self.shape
        completions = config.batch_size * config.samples_per_question
        prompt = _mean_prompt_tokens(config, problems)
        sampled = completions * config.max_new_tokens
        passed = round(config.batch_size * prompt + sampled)
        seconds = _step_seconds(shape, config, sampled, passed)
        updates = -(-config.batch_size // config.questions_per_update) * config.ppo_epochs
        server = "on this GPU" if self.servers else "none" if config.sampler != "vllm" else "elsewhere"
        return "\n".join(
            [
                f"model: {config.model}, {shape.parameters:,} parameters, "
                f"{self._trained_count(config):,} trained ({config.train})",
                f"trainer: context {CONTEXT_GB:.1f} + frozen weights {self.frozen_gb:.1f} + trained weights, "
                f"gradients and moments {self.trained_gb:.1f} + activations {self.activations_gb:.1f} = "
                f"{self.trainer_gb:.1f} GB",
                f"vLLM server: {server}, {self.server_gb:.1f} GB, weights {self.server_weights_gb:.1f} of it",
                f"card: {self.sampling_gb:.1f} GB while sampling, {self.training_gb:.1f} GB while training",
                f"a step: {config.batch_size} questions x {config.samples_per_question} completions, at most "
                f"{sampled:,} sampled tokens, {passed:,} tokens a pass, {updates} optimizer steps",
                f"time on one H100, at full length: {sum(seconds.values()):.1f} s a step ("
                + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
                + f"), {sum(seconds.values()) * config.steps / 3600:.1f} h for {config.steps} steps, without "
                "evaluations",
            ]
        )

    def _trained_count(self, config: PPOConfig) -> int:
        return self.shape.parameters if config.train == "full" else self.shape.adapter


def read_shape(config: PPOConfig) -> Shape:
    """Counts of the model that `config` names; no weight is read."""
    model = _without_weights(config)
    linear = list(_adapted(model).values())
    text: Any = model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    bytes_each = 4 if config.dtype == "float32" else 2
    return Shape(
        parameters=sum(p.numel() for p in model.parameters()),
        linear=sum(m.weight.numel() for m in linear),
        adapter=sum(config.lora_rank * (m.in_features + m.out_features) for m in linear),
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        layers=text.num_hidden_layers,
        vocabulary=text.vocab_size,
        cache_bytes_per_token=2 * text.num_hidden_layers * heads * width * bytes_each,
    )


def adapted_layers(config: PPOConfig) -> tuple[str, ...]:
    """Names, without their places, of the layers that an adapter sits on."""
    return tuple(sorted({name.rpartition(".")[2] for name in _adapted(_without_weights(config))}))


def _without_weights(config: PPOConfig) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    require_checkpoint(config.model)
    settings = AutoConfig.from_pretrained(config.model)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(settings)


def _adapted(model: Any) -> dict[str, torch.nn.Linear]:
    """The linear layers by name, without the output head."""
    head = model.get_output_embeddings()
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and layer is not head
    }


def make_plan(config: PPOConfig) -> Plan:
    """The memory of a run as `config` says.

    Raises:
        CheckpointError: there is no such model.
    """
    shape = read_shape(config)
    wide = 4 if config.dtype == "float32" else 2
    if config.quantize:
        weights = (shape.linear * NF4_BYTES + (shape.parameters - shape.linear) * 2) / GB
    else:
        weights = shape.parameters * wide / GB
    if config.train == "full":
        frozen, trained = shape.parameters * wide / GB, shape.parameters * 16 / GB
    else:
        frozen, trained = weights, shape.adapter * 16 / GB
    servers = _servers_here(config)
    server_gb = 0.0
    if servers:
        total = _card_gb(config) or 80.0
        needed = servers * (weights + SERVER_EXTRA_GB)
        share = config.vllm_memory_share
        server_gb = config.vllm_memory_gb or (
            total * share if share is not None else max(needed, total * 0.9)
        )
        server_gb += servers * CONTEXT_GB
    return Plan(
        shape=shape,
        frozen_gb=frozen,
        trained_gb=trained,
        activations_gb=_activations_gb(shape, config, wide),
        server_weights_gb=servers * weights,
        server_gb=server_gb,
        servers=servers,
        takes_turns=servers > 0 and config.vllm_sleep,
        leaves=servers > 0 and config.offload,
    )


def check_fit(config: PPOConfig) -> None:
    """Refuse, before anything is loaded, a run that cannot fit into the limit that it was given.

    Raises:
        ConfigError: with the sums.
    """
    if config.reference_on_sampler and _servers_here(config):
        raise ConfigError(
            "reference_on_sampler is for servers on other GPUs, and vllm_devices = "
            f"{config.vllm_devices} names the one that trains: vLLM makes the logits of whole texts there"
        )
    total = _card_gb(config)
    if total is None or (config.preset is None and config.memory_limit_gb is None):
        return
    plan = make_plan(config)
    server_gb = plan.server_gb - plan.servers * CONTEXT_GB
    extra_gb = plan.servers * SERVER_EXTRA_GB
    keys_gb = server_gb - extra_gb - plan.server_weights_gb
    if plan.servers and keys_gb <= 0:
        raise ConfigError(
            f"vLLM's {server_gb:.1f} GB leave nothing for keys and values: weights "
            f"{plan.server_weights_gb:.1f} + {extra_gb:.1f} GB beside them; raise vllm_memory_gb, or "
            "set quantize nf4"
        )
    if plan.peak_gb > total:
        when, sum_gb = "training", plan.training_gb
        if plan.sampling_gb > sum_gb:
            when, sum_gb = "sampling", plan.sampling_gb
        raise ConfigError(
            f"does not fit {total:.1f} GB: while {when} {sum_gb:.1f} GB = context {CONTEXT_GB:.1f} + frozen "
            f"weights {plan.frozen_gb:.1f} + trained {plan.trained_gb:.1f} + activations "
            f"{plan.activations_gb:.1f} + vLLM {ASLEEP_GB if plan.takes_turns else plan.server_gb:.1f}; "
            "lower micro_batch_tokens or vllm_memory_gb, or set vllm_sleep, offload or quantize"
        )


def vllm_share(config: PPOConfig) -> float | None:
    """vLLM's share of the card it runs on."""
    if config.vllm_memory_gb is None or not torch.cuda.is_available():
        return config.vllm_memory_share
    return config.vllm_memory_gb * GB / torch.cuda.mem_get_info()[1]


def limit_trainer(config: PPOConfig) -> None:
    """Let this process have no more of the card than `memory_limit_gb` leaves it."""
    if config.memory_limit_gb is None or resolve_device(config.device).type != "cuda":
        return
    plan = make_plan(config)
    left = config.memory_limit_gb - (ASLEEP_GB if plan.takes_turns else plan.server_gb) - CONTEXT_GB
    total = torch.cuda.mem_get_info()[1] / GB
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(left, 0.1) / total))


def _servers_here(config: PPOConfig) -> int:
    """How many servers of ours share the card that this process trains on."""
    if config.sampler != "vllm" or config.vllm_urls:
        return 0
    if config.vllm_devices is None:
        return config.vllm_servers
    dealt = config.vllm_settings().of_each_server()
    return sum(_own_card(config) in (each.devices or "").replace(" ", "").split(",") for each in dealt)


def _own_card(config: PPOConfig) -> str | None:
    """The card that this process trains on, as CUDA_VISIBLE_DEVICES would name it; None on a processor."""
    device = resolve_device(config.device) if torch.cuda.is_available() else torch.device("cpu")
    if device.type != "cuda":
        return None
    index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").replace(" ", "").split(",")
    return visible[index] if visible[0] and index < len(visible) else str(index)


def _card_gb(config: PPOConfig) -> float | None:
    """What there is to use: the limit, else the card's memory; None without a card."""
    if config.memory_limit_gb is not None:
        return config.memory_limit_gb
    if config.device == "cpu" or not torch.cuda.is_available():
        return None
    return torch.cuda.mem_get_info()[1] / GB


def _activations_gb(shape: Shape, config: PPOConfig, wide: int) -> float:
    """Of one micro-batch: what each layer keeps, the widest layer's inner values, a chunk of logits."""
    tokens = config.micro_batch_tokens
    inner = tokens * (8 * shape.hidden + 5 * shape.intermediate) * wide
    kept = shape.layers * (tokens * shape.hidden * wide if config.activation_checkpointing else inner)
    logits = 4 * config.logit_chunk_tokens * shape.vocabulary * 4
    return (kept + inner + logits) / GB


def _mean_prompt_tokens(config: PPOConfig, problems: Sequence[Problem]) -> float:
    from transformers import AutoTokenizer

    asked = [format_prompt(problem.question) for problem in problems[:200]]
    ids = AutoTokenizer.from_pretrained(config.model)(asked)["input_ids"]
    return sum(map(len, ids)) / len(ids)


def _step_seconds(shape: Shape, config: PPOConfig, sampled: int, passed: int) -> dict[str, float]:
    forward = 2 * shape.parameters * passed / EFFECTIVE_FLOPS
    rate = min(SAMPLED_TOKENS_PER_S, SAMPLED_TOKENS_PER_S * 8e9 / shape.parameters)
    # With a frozen trunk backward costs as much as forward; checkpointing adds a forward pass.
    passes = (3 if config.train == "full" else 2) + config.activation_checkpointing
    return {
        "sample": sampled / rate + (forward if config.reference_on_sampler else 0.0),
        "logprobs": forward if config.reference_on_sampler else 2 * forward,
        "update": passes * forward * config.ppo_epochs,
    }

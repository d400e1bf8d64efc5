"""Completions from a `transformers` causal language model in this process.

A decode loop of our own: one prefill for each distinct prompt, a KV cache, logits of the last position
only, and rows leave the batch soon after they end. Every row draws from its own generator (one uniform
number a token, inverted through the cumulative distribution), so a completion depends on its prompt,
the parameters and its seed, and not on its neighbours. Padding is told from lengths, never from ids, so
that a tokenizer whose padding token is its EOS works like any other.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from looper_trainer.errors import CheckpointError, ConfigError
from looper_trainer.folders import require_checkpoint
from looper_trainer.sampling.base import Completion, SamplingParams

__all__ = [
    "TransformersSampler",
    "choose_tokens",
    "default_eos_ids",
    "load_pretrained",
    "load_sampler",
    "one_line",
    "require_checkpoint",
    "resolve_device",
    "resolve_dtype",
]

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# An ended row still costs its share of a step; taking it out costs a copy of the cache.
_COMPACT_BELOW = 0.75


class TransformersSampler:
    """Samples from `model`, with the weights it has at each call.

    Args:
        model: a causal language model (a PEFT one too); it returns to the train or eval mode it was in.
        tokenizer: its tokenizer.
        batch_size: rows decoded together.
        eos_ids: ids that end a completion; by default those of the generation config and the tokenizer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 64,
        eos_ids: Collection[int] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError("batch_size must be at least 1")
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.eos_ids = frozenset(default_eos_ids(model, tokenizer) if eos_ids is None else eos_ids)

    def encode(self, prompt: str) -> list[int]:
        """Token ids of `prompt`, with the special tokens that the tokenizer puts before a text."""
        ids: list[int] = self.tokenizer(prompt)["input_ids"]
        # Some tokenizers also append EOS; after it a model would answer nothing.
        while len(ids) > 1 and ids[-1] in self.eos_ids:
            ids = ids[:-1]
        return ids

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        """See `Sampler.sample`. Prompts of similar length share a batch."""
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts but {len(seeds)} lists of seeds")
        if any(len(prompt) == 0 for prompt in prompts):
            raise ValueError("a prompt holds no tokens")
        rows = [
            _Row(i, j, list(prompts[i]), seed) for i, of_i in enumerate(seeds) for j, seed in enumerate(of_i)
        ]
        rows.sort(key=lambda row: len(row.prompt))
        with _evaluating(self.model):
            for start in range(0, len(rows), self.batch_size):
                self._decode(rows[start : start + self.batch_size], params)
        completions = {(row.prompt_index, row.seed_index): self._completion(row) for row in rows}
        return [[completions[i, j] for j in range(len(of_i))] for i, of_i in enumerate(seeds)]

    def _decode(self, rows: list[_Row], params: SamplingParams) -> None:
        """Draw every token of `rows`, which share one batch."""
        places = {index: place for place, index in enumerate(dict.fromkeys(row.prompt_index for row in rows))}
        batch = self._prefill(list({row.prompt_index: row.prompt for row in rows}.values()))
        batch.select([places[row.prompt_index] for row in rows])
        for step in range(params.max_new_tokens):
            uniforms = [row.generator.random() for row in rows] if params.temperature > 0 else None
            chosen, logprobs = choose_tokens(batch.logits, params, uniforms)
            for row, token, logprob in zip(rows, chosen.tolist(), logprobs.tolist(), strict=True):
                if not row.ended:
                    row.tokens.append(token)
                    row.logprobs.append(logprob)
                    row.ended = token in self.eos_ids
            going = [line for line, row in enumerate(rows) if not row.ended]
            if not going or step == params.max_new_tokens - 1:
                return
            if len(going) < _COMPACT_BELOW * len(rows):
                batch.select(going)
                chosen = chosen[going]
                rows = [rows[line] for line in going]
            self._advance(batch, chosen)

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> _Batch:
        from looper_trainer.sampling.cache import make_cache

        device = self.model.device
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        longest = int(lengths.max())
        # Left padding with id 0: any id does, since the mask hides it.
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask = (torch.arange(longest)[None, :] >= longest - lengths[:, None]).long()  # (B, T); 1 = real token
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        batch = _Batch(
            cache=make_cache(self.model.config),
            logits=torch.empty(0),
            mask=mask.to(device),
            lengths=lengths.to(device),
        )
        self._forward(batch, ids.to(device), positions.to(device))
        return batch

    def _advance(self, batch: _Batch, chosen: Tensor) -> None:
        batch.mask = torch.cat([batch.mask, batch.mask.new_ones(len(chosen), 1)], dim=1)
        positions = batch.lengths[:, None]
        batch.lengths = batch.lengths + 1
        self._forward(batch, chosen[:, None], positions)

    def _forward(self, batch: _Batch, ids: Tensor, positions: Tensor) -> None:
        output = self.model(
            input_ids=ids,
            attention_mask=batch.mask,
            position_ids=positions,
            past_key_values=batch.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        batch.logits = output.logits[:, -1, :]

    def _completion(self, row: _Row) -> Completion:
        body = row.tokens[:-1] if row.ended else row.tokens
        return Completion(
            text=self.tokenizer.decode(body, skip_special_tokens=True, clean_up_tokenization_spaces=False),
            token_ids=tuple(row.tokens),
            logprobs=tuple(row.logprobs),
            finish_reason="stop" if row.ended else "length",
        )


class _Row:
    """One completion while it is drawn."""

    def __init__(self, prompt_index: int, seed_index: int, prompt: list[int], seed: int) -> None:
        self.prompt_index = prompt_index
        self.seed_index = seed_index
        self.prompt = prompt
        self.generator = random.Random(seed)
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.ended = False


@dataclass
class _Batch:
    """The model's state for B rows: KV cache, next-token logits (B, V), mask (B, T), real lengths (B,)."""

    cache: Any
    logits: Tensor
    mask: Tensor
    lengths: Tensor

    def select(self, lines: Sequence[int]) -> None:
        """Keep `lines` of the batch, in that order; a line may repeat."""
        if lines == list(range(len(self.mask))):
            return
        index = torch.tensor(lines, device=self.mask.device)
        self.cache.batch_select_indices(index)
        self.logits, self.mask, self.lengths = self.logits[index], self.mask[index], self.lengths[index]


def choose_tokens(
    logits: Tensor, params: SamplingParams, uniforms: Sequence[float] | None
) -> tuple[Tensor, Tensor]:
    """The next token of each row and its log-probability.

    Args:
        logits: (B, V) of the model, before any temperature.
        params: temperature and top_p.
        uniforms: one number in [0, 1) for each row; None for greedy decoding.

    Returns:
        Token ids (B,) and natural log-probabilities (B,), float32: of the distribution drawn from, or
        under greedy decoding of the model's own.
    """
    logits = logits.float()
    if uniforms is None:
        chosen = logits.argmax(dim=-1)
        return chosen, logits.log_softmax(dim=-1).gather(1, chosen[:, None])[:, 0]
    logits = logits / params.temperature
    if params.top_p < 1:
        logits = _keep_nucleus(logits, params.top_p)
    log_probs = logits.log_softmax(dim=-1)
    # Inverse CDF in float64: the first token whose cumulative mass exceeds u, which never has mass 0.
    cumulative = log_probs.double().exp().cumsum(dim=-1)
    total = cumulative[:, -1:]
    aim = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)[:, None] * total
    aim = torch.minimum(aim, torch.nextafter(total, torch.zeros_like(total)))
    chosen = torch.searchsorted(cumulative, aim, right=True)[:, 0]
    return chosen, log_probs.gather(1, chosen[:, None])[:, 0]


def _keep_nucleus(logits: Tensor, top_p: float) -> Tensor:
    """`logits` (B, V) with -inf outside the smallest set of most probable tokens of mass >= top_p."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probs = ordered.softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs  # mass of the more probable tokens
    dropped = before >= top_p
    dropped[:, 0] = False
    return logits.masked_fill(dropped.scatter(1, order, dropped), float("-inf"))


def default_eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that end a text: those of the model's generation config and the tokenizer's own."""
    found: set[int] = set()
    generation = getattr(model, "generation_config", None)
    for ids in (getattr(generation, "eos_token_id", None), tokenizer.eos_token_id):
        if isinstance(ids, int):
            found.add(ids)
        elif ids is not None:
            found.update(ids)
    return found


def load_sampler(
    path_or_name: str, device: str = "auto", dtype: str = "auto", batch_size: int = 64
) -> TransformersSampler:
    """The model and tokenizer in a folder, or of that name on the hub, as a sampler.

    Args:
        path_or_name: a folder written by `save_pretrained`, or a hub name.
        device: "auto" is a GPU where there is one; else a torch device.
        dtype: "auto" is the checkpoint's own on a GPU and float32 on a CPU; else a torch dtype's name.
        batch_size: rows decoded together.

    Raises:
        CheckpointError: there is no model there.
        ConfigError: there is no such device or dtype.
    """
    place = resolve_device(device)
    model, tokenizer = load_pretrained(path_or_name, resolve_dtype(dtype, place))
    return TransformersSampler(model.to(place).eval(), tokenizer, batch_size=batch_size)


def load_pretrained(
    path_or_name: str, dtype: torch.dtype | str, **more: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal language model and the tokenizer in a folder, or of that name on the hub.

    `more` goes to `from_pretrained` as it is.

    Raises:
        CheckpointError: there is no model there, or a damaged one.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    require_checkpoint(path_or_name)
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path_or_name)
        model, found = AutoModelForCausalLM.from_pretrained(
            path_or_name, dtype=dtype, output_loading_info=True, **more
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{path_or_name}: cannot load the model: {one_line(error)}") from error
    if missing := sorted(found["missing_keys"]):  # the library makes them up
        raise CheckpointError(
            f"{path_or_name}: lacks {len(missing)} of the model's tensors, {missing[0]} for one; the "
            "folder is incomplete, or its config.json is another model's"
        )
    return model, tokenizer


def resolve_device(device: str) -> torch.device:
    """The torch device meant by `device`; "auto" is a GPU where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"unknown device: {device}; use auto, cpu or cuda") from None
    present = torch.accelerator.current_accelerator()
    here = torch.accelerator.device_count() if present is not None and present.type == found.type else 0
    if found.type != "cpu" and (found.index or 0) >= here:
        raise ConfigError(f"device {device}: this machine has {here} {found.type} devices; use auto")
    return found


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    """The dtype meant by `dtype`; "auto" is the checkpoint's own on a GPU and float32 on a CPU."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"unknown dtype: {dtype}; use auto, float32, bfloat16 or float16")
    return found


def one_line(error: BaseException) -> str:
    """The first line of what `error` says."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)

"""What every sampler promises, whichever engine makes the tokens."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn.

    `temperature` 0 is greedy decoding. `top_p` keeps the smallest set of most probable tokens whose mass
    reaches it, after the temperature. `with_reference` asks for the base model's logprobs too, where the
    policy is an adapter on it (vLLM; without temperature).
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    with_reference: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError("max_new_tokens must be at least 1")
        if not self.temperature >= 0:
            raise ValueError("temperature must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError("top_p must be in (0, 1]")


@dataclass(frozen=True)
class Completion:
    """One sampled completion.

    `token_ids` include the EOS token when `finish_reason` is "stop"; `text` leaves special tokens out.
    `logprobs` are natural logarithms, one for each token, of the chosen token under the distribution it
    was drawn from (after temperature and top_p); under greedy decoding, of the model's own distribution.
    `reference_logprobs` are those of the same tokens under the base model, if they were asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "length"]
    reference_logprobs: tuple[float, ...] | None = None


class Sampler(Protocol):
    """Draws completions from a policy."""

    def encode(self, prompt: str) -> list[int]:
        """Token ids of `prompt`, with the special tokens the model expects before a text."""
        ...

    def sample(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        """`len(seeds[i])` completions of `prompts[i]`, one for each of its non-negative seeds.

        A completion is a function of (prompt, params, seed) alone: which other rows share its batch
        changes nothing beyond float rounding.
        """
        ...


@runtime_checkable
class StreamingSampler(Sampler, Protocol):
    """A sampler that tells of each prompt as soon as its completions are whole."""

    def sample_iter(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[Sequence[int]]
    ) -> Generator[tuple[int, list[Completion]]]:
        """(index of a prompt, its completions), in the order in which they end; closing it ends that."""
        ...

"""Tensors from completions: right-padded micro-batches, and the step-wide (B, T) view they index into.

Masks come from lengths alone; which id pads, and whether it is also the EOS, changes nothing. With right
padding and causal attention no real token ever sees padding, so no attention mask is needed either.

A step's rows are cut once into minibatches and these into micro-batches, and every forward pass of the
step (old logprobs, reference, each update) runs over the same micro-batches. Equal weights therefore give
bit-equal logprobs, and the first ratio of an update is exactly 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PAD_ID = 0


@dataclass(frozen=True)
class Row:
    """One prompt and one of its completions, as token ids, with the sampler's logprobs of the latter."""

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    sampler_logprobs: Sequence[float]

    def __post_init__(self) -> None:
        if not self.prompt_ids or not self.completion_ids:
            raise ValueError("a row needs at least one prompt token and one completion token")
        if len(self.completion_ids) != len(self.sampler_logprobs):
            raise ValueError("a row needs one sampler logprob for each completion token")

    @property
    def length(self) -> int:
        """Tokens in all."""
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True)
class MicroBatch:
    """Rows that share a forward pass. b rows, S positions, T completion positions (t_max of these rows).

    Attributes:
        rows_b: index of each row in the step's (B, T) tensors.
        input_ids_bS: prompt, completion, padding.
        completion_mask_bT: True at real completion tokens.
        completion_ids_bT: the tokens whose logprobs are wanted; `PAD_ID` outside the mask.
        state_index_bT: position in S of the state in which token t was chosen: the one before it.
    """

    rows_b: Tensor
    input_ids_bS: Tensor
    completion_mask_bT: Tensor
    completion_ids_bT: Tensor
    state_index_bT: Tensor


def micro_batch(
    rows: Sequence[Row], indices: Sequence[int], device: torch.device | str = "cpu", pad_id: int = PAD_ID
) -> MicroBatch:
    """The micro-batch of `rows[i]` for i in `indices`, in that order."""
    chosen = [rows[i] for i in indices]
    prompt_lengths_b = torch.tensor([len(row.prompt_ids) for row in chosen])
    completion_lengths_b = torch.tensor([len(row.completion_ids) for row in chosen])
    positions_T = torch.arange(int(completion_lengths_b.max()))
    mask_bT = positions_T[None, :] < completion_lengths_b[:, None]
    input_ids_bS = torch.full((len(chosen), max(row.length for row in chosen)), pad_id)
    completion_ids_bT = torch.full(mask_bT.shape, pad_id)
    for line, row in enumerate(chosen):
        input_ids_bS[line, : row.length] = torch.tensor([*row.prompt_ids, *row.completion_ids])
        completion_ids_bT[line, : len(row.completion_ids)] = torch.tensor(row.completion_ids)
    state_index_bT = (prompt_lengths_b[:, None] - 1 + positions_T[None, :]).masked_fill(~mask_bT, 0)
    return MicroBatch(
        rows_b=torch.tensor(list(indices), device=device),
        input_ids_bS=input_ids_bS.to(device),
        completion_mask_bT=mask_bT.to(device),
        completion_ids_bT=completion_ids_bT.to(device),
        state_index_bT=state_index_bT.to(device),
    )


def plan_micro_batches(
    rows: Sequence[Row], indices: Sequence[int], max_tokens: int, device: torch.device | str = "cpu"
) -> list[MicroBatch]:
    """Cut `indices` into micro-batches of similar lengths, each of at most `max_tokens` padded tokens.

    A row longer than `max_tokens` gets a micro-batch of its own.
    """
    ordered = sorted(indices, key=lambda i: rows[i].length, reverse=True)
    groups: list[list[int]] = []
    for i in ordered:
        # Rows come longest first, so the first row of a group sets its width.
        if groups and rows[groups[-1][0]].length * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [micro_batch(rows, group, device) for group in groups]


def completion_mask(rows: Sequence[Row], device: torch.device | str = "cpu") -> Tensor:
    """True at real completion tokens of the whole step, (B, T)."""
    lengths_B = torch.tensor([len(row.completion_ids) for row in rows], device=device)
    return torch.arange(int(lengths_B.max()), device=device)[None, :] < lengths_B[:, None]


def sampler_logprobs(rows: Sequence[Row], device: torch.device | str = "cpu") -> Tensor:
    """The sampler's logprobs of the whole step, (B, T), zero at padding."""
    width = max(len(row.completion_ids) for row in rows)
    padded = [[*row.sampler_logprobs, *[0.0] * (width - len(row.sampler_logprobs))] for row in rows]
    return torch.tensor(padded, dtype=torch.float32, device=device)

"""Tensors from completions: packed micro-batches, and the step-wide (B, T) view they index into.

A *pack* is one prompt followed by several of its completions. The prompt is read once for all of them:
each completion sees the prompt and itself, and its positions count on from the prompt's end, so that its
logprobs are those it would have alone. Packs are padded on the right.

Masks come from lengths alone; which id pads, and whether it is also the EOS, changes nothing.

A step's rows are cut once into minibatches and these into micro-batches, and every forward pass of the
step (old logprobs, reference, each update) runs over the same micro-batches. Equal weights therefore give
bit-equal logprobs, and the first ratio of an update is exactly 1.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PAD_ID = 0
PROMPT_SEGMENT = 0
PAD_SEGMENT = -1

# Attention within a pack costs the square of its width: beyond this, reading the prompt again is cheaper.
WIDEST_PACK = 2048


@dataclass(frozen=True)
class Row:
    """One prompt and one of its completions, as token ids, with the sampler's logprobs of the latter.

    `reference_logprobs` are there if the sampler gave them too.
    """

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    sampler_logprobs: Sequence[float]
    reference_logprobs: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if not self.prompt_ids or not self.completion_ids:
            raise ValueError("a row needs at least one prompt token and one completion token")
        if len(self.completion_ids) != len(self.sampler_logprobs):
            raise ValueError("a row needs one sampler logprob for each completion token")


@dataclass(frozen=True)
class MicroBatch:
    """Packs that share a forward pass: b packs of S positions, n completions of at most T tokens.

    Attributes:
        rows_n: index of each completion in the step's (B, T) tensors.
        input_ids_bS: prompt, completions, padding.
        position_ids_bS: place of each token in its own text.
        segment_ids_bS: 0 in the prompt, 1, 2, ... in the completions, -1 at padding.
        completion_mask_nT: True at real completion tokens.
        completion_ids_nT: the tokens whose logprobs are wanted; `PAD_ID` outside the mask.
        state_index_nT: flat position in (b, S) of the state in which token t was chosen: the token before it.
    """

    rows_n: Tensor
    input_ids_bS: Tensor
    position_ids_bS: Tensor
    segment_ids_bS: Tensor
    completion_mask_nT: Tensor
    completion_ids_nT: Tensor
    state_index_nT: Tensor

    def attention_mask(self) -> Tensor:
        """True (b, 1, S, S) where a query (dim 2) sees a key (dim 3): its prompt and its own past."""
        width = self.segment_ids_bS.shape[1]
        past_SS = torch.ones(width, width, dtype=torch.bool, device=self.segment_ids_bS.device).tril()
        query_bS1, key_b1S = self.segment_ids_bS[:, :, None], self.segment_ids_bS[:, None, :]
        return (past_SS & ((key_b1S == PROMPT_SEGMENT) | (key_b1S == query_bS1)))[:, None]


def micro_batch(
    rows: Sequence[Row],
    packs: Sequence[Sequence[int]],
    device: torch.device | str = "cpu",
    pad_id: int = PAD_ID,
) -> MicroBatch:
    """The micro-batch of `packs`, each a list of indices of rows that have the same prompt."""
    order = [i for pack in packs for i in pack]
    lengths_n = torch.tensor([len(rows[i].completion_ids) for i in order])
    positions_T = torch.arange(int(lengths_n.max()))
    mask_nT = positions_T[None, :] < lengths_n[:, None]
    ids_nT = torch.full(mask_nT.shape, pad_id)
    state_nT = torch.zeros(mask_nT.shape, dtype=torch.long)
    width = max(pack_width(rows, pack) for pack in packs)
    input_ids_bS = torch.full((len(packs), width), pad_id)
    position_ids_bS = torch.zeros(input_ids_bS.shape, dtype=torch.long)
    segment_ids_bS = torch.full(input_ids_bS.shape, PAD_SEGMENT)
    n = 0
    for line, pack in enumerate(packs):
        prompt = rows[pack[0]].prompt_ids
        start = len(prompt)
        input_ids_bS[line, :start] = torch.tensor(prompt)
        position_ids_bS[line, :start] = torch.arange(start)
        segment_ids_bS[line, :start] = PROMPT_SEGMENT
        for segment, i in enumerate(pack, start=1):
            completion = torch.tensor(rows[i].completion_ids)
            end = start + len(completion)
            input_ids_bS[line, start:end] = completion
            position_ids_bS[line, start:end] = torch.arange(len(prompt), len(prompt) + len(completion))
            segment_ids_bS[line, start:end] = segment
            ids_nT[n, : len(completion)] = completion
            state_nT[n, 0] = line * width + len(prompt) - 1
            state_nT[n, 1 : len(completion)] = line * width + torch.arange(start, end - 1)
            start, n = end, n + 1
    return MicroBatch(
        rows_n=torch.tensor(order, device=device),
        input_ids_bS=input_ids_bS.to(device),
        position_ids_bS=position_ids_bS.to(device),
        segment_ids_bS=segment_ids_bS.to(device),
        completion_mask_nT=mask_nT.to(device),
        completion_ids_nT=ids_nT.to(device),
        state_index_nT=state_nT.to(device),
    )


def pack_width(rows: Sequence[Row], pack: Sequence[int]) -> int:
    """Tokens of a pack: its prompt once, and its completions."""
    return len(rows[pack[0]].prompt_ids) + sum(len(rows[i].completion_ids) for i in pack)


def plan_packs(rows: Sequence[Row], indices: Sequence[int], max_width: int) -> list[list[int]]:
    """`indices` grouped by prompt into packs of at most `max_width` tokens (a longer row is a pack alone)."""
    by_prompt: defaultdict[tuple[int, ...], list[list[int]]] = defaultdict(list)
    for i in indices:
        packs = by_prompt[tuple(rows[i].prompt_ids)]
        if packs and pack_width(rows, [*packs[-1], i]) <= max_width:
            packs[-1].append(i)
        else:
            packs.append([i])
    return [pack for packs in by_prompt.values() for pack in packs]


def plan_micro_batches(
    rows: Sequence[Row],
    indices: Sequence[int],
    max_tokens: int,
    device: torch.device | str = "cpu",
    processes: int = 1,
) -> list[MicroBatch]:
    """Cut `indices` into micro-batches of at most `max_tokens` padded tokens, similar widths together.

    As few as it takes, a multiple of `processes` where there are rows enough, and the largest as small as
    can be. A row longer than `max_tokens` gets a micro-batch of its own.
    """
    packs = plan_packs(rows, indices, min(max_tokens, WIDEST_PACK))
    packs.sort(key=lambda pack: pack_width(rows, pack), reverse=True)
    widths = [pack_width(rows, pack) for pack in packs]

    def cut(limit: int) -> list[list[list[int]]]:
        groups: list[list[list[int]]] = []
        widest = 0
        for pack, width in zip(packs, widths, strict=True):
            # Packs come widest first, so the first one of a group sets its width.
            if groups and widest * (len(groups[-1]) + 1) <= limit:
                groups[-1].append(pack)
            else:
                groups.append([pack])
                widest = width
        return groups

    number = -(-len(cut(max_tokens)) // processes) * processes
    smallest = 1 + bisect_left(range(1, max_tokens), -number, key=lambda limit: -len(cut(limit)))
    return [micro_batch(rows, group, device) for group in cut(smallest)]


def completion_mask(rows: Sequence[Row], device: torch.device | str = "cpu") -> Tensor:
    """True at real completion tokens of the whole step, (B, T)."""
    lengths_B = torch.tensor([len(row.completion_ids) for row in rows], device=device)
    return torch.arange(int(lengths_B.max()), device=device)[None, :] < lengths_B[:, None]


def sampler_logprobs(rows: Sequence[Row], device: torch.device | str = "cpu") -> Tensor:
    """The sampler's logprobs of the whole step, (B, T), zero at padding."""
    return _padded([row.sampler_logprobs for row in rows], device)


def reference_logprobs(rows: Sequence[Row], device: torch.device | str = "cpu") -> Tensor | None:
    """The reference's logprobs of the whole step, (B, T), zero at padding, if the sampler gave them."""
    given = [row.reference_logprobs for row in rows if row.reference_logprobs is not None]
    if given and len(given) < len(rows):
        raise ValueError(f"{len(rows) - len(given)} of {len(rows)} rows lack the reference's logprobs")
    return _padded(given, device) if given else None


def _padded(logprobs: Sequence[Sequence[float]], device: torch.device | str) -> Tensor:
    width = max(map(len, logprobs))
    padded = [[*row, *[0.0] * (width - len(row))] for row in logprobs]
    return torch.tensor(padded, dtype=torch.float32, device=device)

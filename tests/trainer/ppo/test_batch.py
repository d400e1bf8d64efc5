"""Tensors from completions: masks from lengths, and micro-batches that hold every row once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from looper_trainer.ppo.batch import (
    Row,
    completion_mask,
    micro_batch,
    plan_micro_batches,
    plan_packs,
    reference_logprobs,
    sampler_logprobs,
)

ROWS = [Row([5, 6, 7], [8, 9], [-0.1, -0.2]), Row([5], [8, 1, 1, 3], [-0.3, -0.4, -0.5, -0.6])]

rows_strategy = st.lists(
    st.tuples(st.integers(1, 9), st.integers(1, 9)).map(lambda n: Row([2] * n[0], [3] * n[1], [0.0] * n[1])),
    min_size=1,
    max_size=12,
)


def test_a_micro_batch_holds_exactly_these_tensors() -> None:
    # Two packs: row 1 alone, then rows 0 and 2, which share the prompt [5, 6, 7].
    rows = [*ROWS, Row([5, 6, 7], [4], [-0.7])]
    batch = micro_batch(rows, [[1], [0, 2]], pad_id=99)
    assert batch.rows_n.tolist() == [1, 0, 2]
    assert batch.input_ids_bS.tolist() == [[5, 8, 1, 1, 3, 99], [5, 6, 7, 8, 9, 4]]
    assert batch.position_ids_bS.tolist() == [[0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 4, 3]]
    assert batch.segment_ids_bS.tolist() == [[0, 1, 1, 1, 1, -1], [0, 0, 0, 1, 1, 2]]
    assert batch.completion_mask_nT.tolist() == [[True] * 4, [True, True, False, False], [True, *[False] * 3]]
    assert batch.completion_ids_nT.tolist() == [[8, 1, 1, 3], [8, 9, 99, 99], [4, 99, 99, 99]]
    # Token t was chosen in the state of the token before it; the first one in that of the prompt's last.
    assert batch.state_index_nT.tolist() == [[0, 1, 2, 3], [8, 9, 0, 0], [8, 0, 0, 0]]


def test_a_completion_sees_its_prompt_and_its_own_past_and_nothing_else() -> None:
    batch = micro_batch([Row([5, 6], [7, 8], [0.0] * 2), Row([5, 6], [9], [0.0])], [[0, 1]])
    assert batch.attention_mask()[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]


def test_masks_come_from_lengths_so_that_real_tokens_equal_to_padding_stay_real() -> None:
    plain, hostile = micro_batch(ROWS, [[0], [1]], pad_id=0), micro_batch(ROWS, [[0], [1]], pad_id=1)
    assert torch.equal(plain.completion_mask_nT, hostile.completion_mask_nT)
    assert torch.equal(plain.attention_mask(), hostile.attention_mask())
    assert torch.equal(plain.completion_mask_nT, completion_mask(ROWS))
    assert hostile.completion_mask_nT[1].all()  # [8, 1, 1, 3] with pad 1


@given(rows_strategy, st.integers(1, 60))
@settings(max_examples=80, deadline=None)
def test_a_plan_holds_every_row_once_and_keeps_to_its_budget(rows: list[Row], max_tokens: int) -> None:
    plan = plan_micro_batches(rows, range(len(rows)), max_tokens)
    assert sorted(i for batch in plan for i in batch.rows_n.tolist()) == list(range(len(rows)))
    for batch in plan:
        assert batch.input_ids_bS.numel() <= max_tokens or len(batch.rows_n) == 1
    widths = [batch.input_ids_bS.shape[1] for batch in plan]
    assert widths == sorted(widths, reverse=True)


@pytest.mark.parametrize(
    ("max_tokens", "processes", "packs"),
    [
        (130, 1, [8, 8]),  # 13 packs of 10 tokens would fit into the first
        (1000, 1, [16]),
        (1000, 2, [8, 8]),  # every process gets one
        (60, 1, [6, 6, 4]),
        (60, 2, [4, 4, 4, 4]),  # three would do, but two processes would not share them evenly
        (1000, 32, [1] * 16),  # more processes than packs
    ],
)
def test_micro_batches_are_as_few_and_as_even_as_can_be(
    max_tokens: int, processes: int, packs: list[int]
) -> None:
    rows = [Row([number] * 5, [3] * 5, [0.0] * 5) for number in range(16)]
    plan = plan_micro_batches(rows, range(16), max_tokens, processes=processes)
    assert [len(batch.rows_n) for batch in plan] == packs


@given(rows_strategy, st.integers(1, 60))
@settings(max_examples=80, deadline=None)
def test_completions_of_one_prompt_share_packs_and_never_with_those_of_another(
    rows: list[Row], max_width: int
) -> None:
    packs = plan_packs(rows, range(len(rows)), max_width)
    assert sorted(i for pack in packs for i in pack) == list(range(len(rows)))
    for pack in packs:
        assert len({tuple(rows[i].prompt_ids) for i in pack}) == 1
        tokens = len(rows[pack[0]].prompt_ids) + sum(len(rows[i].completion_ids) for i in pack)
        assert tokens <= max_width or len(pack) == 1


def test_sampler_logprobs_are_padded_with_zero() -> None:
    expected = torch.tensor([[-0.1, -0.2, 0.0, 0.0], [-0.3, -0.4, -0.5, -0.6]])
    assert torch.equal(sampler_logprobs(ROWS), expected)


def test_the_references_logprobs_are_those_of_all_rows_or_of_none() -> None:
    given = [replace(row, reference_logprobs=[2 * x for x in row.sampler_logprobs]) for row in ROWS]
    found = reference_logprobs(given)
    assert found is not None
    assert torch.equal(found, 2 * sampler_logprobs(ROWS))
    assert reference_logprobs(ROWS) is None
    with pytest.raises(ValueError, match="1 of 2 rows lack"):
        reference_logprobs([given[0], ROWS[1]])


@pytest.mark.parametrize(
    ("prompt", "completion", "logprobs"), [([], [1], [0.0]), ([1], [], []), ([1], [2, 3], [0.0])]
)
def test_a_row_without_tokens_or_with_missing_logprobs_is_refused(
    prompt: list[int], completion: list[int], logprobs: list[float]
) -> None:
    with pytest.raises(ValueError, match="a row needs"):
        Row(prompt, completion, logprobs)

"""Tensors from completions: masks from lengths, and micro-batches that hold every row once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from looper_trainer.ppo.batch import Row, completion_mask, micro_batch, plan_micro_batches, sampler_logprobs

ROWS = [Row([5, 6, 7], [8, 9], [-0.1, -0.2]), Row([5], [8, 1, 1, 3], [-0.3, -0.4, -0.5, -0.6])]

rows_strategy = st.lists(
    st.tuples(st.integers(1, 9), st.integers(1, 9)).map(lambda n: Row([2] * n[0], [3] * n[1], [0.0] * n[1])),
    min_size=1,
    max_size=12,
)


def test_a_micro_batch_holds_exactly_these_tensors() -> None:
    batch = micro_batch(ROWS, [1, 0], pad_id=4)
    assert batch.rows_b.tolist() == [1, 0]
    assert batch.input_ids_bS.tolist() == [[5, 8, 1, 1, 3], [5, 6, 7, 8, 9]]
    assert batch.completion_mask_bT.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.completion_ids_bT.tolist() == [[8, 1, 1, 3], [8, 9, 4, 4]]
    # Token t was chosen in the state one position before it; row 1 has one prompt token, row 0 has three.
    assert batch.state_index_bT.tolist() == [[0, 1, 2, 3], [2, 3, 0, 0]]


def test_masks_come_from_lengths_so_that_real_tokens_equal_to_padding_stay_real() -> None:
    plain, hostile = micro_batch(ROWS, [0, 1], pad_id=0), micro_batch(ROWS, [0, 1], pad_id=1)
    assert torch.equal(plain.completion_mask_bT, hostile.completion_mask_bT)
    assert torch.equal(plain.completion_mask_bT, completion_mask(ROWS))
    assert hostile.completion_mask_bT[1].all()  # [8, 1, 1, 3] with pad 1


@given(rows_strategy, st.integers(1, 60))
@settings(max_examples=80, deadline=None)
def test_a_plan_holds_every_row_once_and_keeps_to_its_budget(rows: list[Row], max_tokens: int) -> None:
    plan = plan_micro_batches(rows, range(len(rows)), max_tokens)
    assert sorted(i for batch in plan for i in batch.rows_b.tolist()) == list(range(len(rows)))
    for batch in plan:
        assert batch.input_ids_bS.numel() <= max_tokens or len(batch.rows_b) == 1
    widths = [batch.input_ids_bS.shape[1] for batch in plan]
    assert widths == sorted(widths, reverse=True)


def test_sampler_logprobs_are_padded_with_zero() -> None:
    expected = torch.tensor([[-0.1, -0.2, 0.0, 0.0], [-0.3, -0.4, -0.5, -0.6]])
    assert torch.equal(sampler_logprobs(ROWS), expected)


@pytest.mark.parametrize(
    ("prompt", "completion", "logprobs"), [([], [1], [0.0]), ([1], [], []), ([1], [2, 3], [0.0])]
)
def test_a_row_without_tokens_or_with_missing_logprobs_is_refused(
    prompt: list[int], completion: list[int], logprobs: list[float]
) -> None:
    with pytest.raises(ValueError, match="a row needs"):
        Row(prompt, completion, logprobs)

"""A transformer encoder in batches of fixed shapes, for GPUs.

A GPU library chooses another kernel, and so another order of summation, for another shape of matrix. So the
shapes never vary: a window is padded to the next multiple of BUCKET tokens, which depends on the window
alone, and every batch has BATCH rows, the missing ones being copies of its first. Rows do not see each
other, hence a window has the same bits whatever stands in the other rows and in whichever row it stands;
the tests hold the installed torch to that. Products are float32: TF32 is not used, whatever the default.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from regime_w.streams import Sums, Window

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BUCKET = 64
BATCH = 32


class FixedShapes:
    """Token-id windows of at most `window` tokens in, the sum of each window's token vectors out."""

    def __init__(self, model: torch.nn.Module | PreTrainedModel, window: int, device: str) -> None:
        self._model = model
        self._window = window
        self._device = device
        if device != "cpu":
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False

    @torch.inference_mode()
    def __call__(self, windows: Sequence[Window]) -> list[Sums]:
        """The sum of token vectors, (d,) float64, of each window, in order."""
        by_length: dict[int, list[int]] = defaultdict(list)
        for i, window in enumerate(windows):
            by_length[min(-(-len(window) // BUCKET) * BUCKET, self._window)].append(i)
        sums: list[Sums | None] = [None] * len(windows)
        for length, members in sorted(by_length.items()):
            for begin in range(0, len(members), BATCH):
                rows = members[begin : begin + BATCH]
                totals_BD = self._batch([windows[i] for i in rows], length).cpu().numpy()
                for i, total in zip(rows, totals_BD, strict=False):
                    sums[i] = total.copy()
        return [total for total in sums if total is not None]

    def _batch(self, windows: Sequence[Window], length: int) -> torch.Tensor:
        rows = [*windows, *[windows[0]] * (BATCH - len(windows))]
        ids_BT = torch.zeros((BATCH, length), dtype=torch.int64)
        mask_BT = torch.zeros((BATCH, length), dtype=torch.int64)  # 1: a token of the window
        for row, window in enumerate(rows):
            ids_BT[row, : len(window)] = torch.tensor(window)
            mask_BT[row, : len(window)] = 1
        mask_BT = mask_BT.to(self._device)
        hidden_BTD = self._model(input_ids=ids_BT.to(self._device), attention_mask=mask_BT).last_hidden_state
        sums_BD: torch.Tensor = (hidden_BTD.double() * mask_BT[..., None]).sum(dim=1)
        return sums_BD

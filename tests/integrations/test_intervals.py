from __future__ import annotations

import pytest
import torch

from fastft.integrations.transformers import intervals


def test_padding_hides_padding_and_nothing_else() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 1, 1, 0], [1, 1, 1, 1, 1]])
    seen = intervals.visible(intervals.of_padding(mask))[:, 0]
    for row, real in enumerate(mask.bool().tolist()):
        for q in range(5):
            assert seen[row, q].tolist() == [real[k] and k <= q for k in range(5)], (row, q)


def test_positions_that_restart_begin_a_sequence() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 5, 6], [3, 4, 5, 6, 7, 8, 9]])
    assert intervals.of_positions(positions).tolist() == [[3, 3, 3, 5, 5, 7, 7], [7] * 7]


def test_cu_seqlens() -> None:
    assert intervals.of_cu_seqlens(torch.tensor([0, 2, 2, 5]), 5).tolist() == [[2, 2, 5, 5, 5]]
    for wrong in ([0, 2, 4], [1, 5], [0, 3, 2, 5], [5]):
        with pytest.raises(ValueError, match="expected to rise from 0 to T = 5"):
            intervals.of_cu_seqlens(torch.tensor(wrong), 5)


def test_rows_end_to_end_see_their_own_row_alone() -> None:
    until = torch.tensor([[2, 2, 3], [3, 2, 3]], dtype=torch.int32)
    flat = intervals.visible(intervals.end_to_end(until)[None])[0, 0]
    apart = torch.block_diag(*intervals.visible(until)[:, 0].int()).bool()
    assert torch.equal(flat, apart)

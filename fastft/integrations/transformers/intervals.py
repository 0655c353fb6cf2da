"""What each token of a batch may see, as one integer a key: key k is visible to query q of its row exactly when
`k <= q < until[k]`.

Padding, packed sequences and shared beginnings are all of this form, where transformers would make a mask of T x T
entries. Letters: B rows of T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def of_padding(mask: Tensor) -> Tensor:
    """`[B, T]` int32 for an attention mask `[B, T]` (nonzero where a token is real), padded anywhere.

    A real token is visible to all that follow in its row, padding to nobody, as under other implementations. What
    padding before the first real token sees is nothing.
    """
    T = mask.shape[1]
    return torch.where(mask != 0, T, torch.arange(T, device=mask.device)).to(torch.int32)


def of_sequences(sequence: Tensor) -> Tensor:
    """`[B, T]` int32 for sequences one behind another: `[B, T]` integers that rise where a new one begins."""
    sequence = sequence.contiguous()
    return torch.searchsorted(sequence, sequence, right=True, out_int32=True)


def of_positions(positions: Tensor) -> Tensor:
    """`[B, T]` int32 for position ids `[B, T]`: a sequence begins wherever they do not rise by one."""
    begins = torch.diff(positions, dim=1, prepend=positions[:, :1] - 1) != 1
    return of_sequences(begins.cumsum(dim=1))


def of_cu_seqlens(cu_seqlens: Tensor, T: int) -> Tensor:
    """`[1, T]` int32 for `cu_seqlens` `[N + 1]`, where each sequence begins, and T.

    Raises:
        ValueError: it does not rise from 0 to T.
    """
    ends = cu_seqlens.to(torch.int32)
    if ends.ndim != 1 or len(ends) < 2 or ends[0] != 0 or ends[-1] != T or (ends.diff() < 0).any():
        raise ValueError(f"got cu_seq_lens {cu_seqlens.tolist()[:8]}, expected to rise from 0 to T = {T}")
    return ends[1:].repeat_interleave(ends.diff()).view(1, T)


def end_to_end(until: Tensor) -> Tensor:
    """`[B, T]` of rows -> `[B T]` of the same tokens laid end to end."""
    B, T = until.shape
    return (until + torch.arange(B, dtype=torch.int32, device=until.device)[:, None] * T).flatten()


def visible(until: Tensor) -> Tensor:
    """`[B, T]` -> the boolean mask `[B, 1, T, T]` that says the same: True where a query sees a key."""
    place = torch.arange(until.shape[1], device=until.device)
    return ((place[None, :] <= place[:, None]) & (place[:, None] < until[:, None, :]))[:, None]

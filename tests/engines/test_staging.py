"""Batches on their way to a device, on a CPU: their values, and which of them stay where they are."""

import numpy as np
import torch

from fastft.batches.batch import Batch, pack
from fastft.gpu.staging import Staging

DEVICE = torch.device("cpu")


def batch(seed: int, lengths: tuple[int, ...] = (9, 14)) -> Batch:
    random = np.random.default_rng(seed)
    return pack([random.integers(0, 97, n).astype(np.int32) for n in lengths], [3] * len(lengths))


def test_its_values_are_the_batchs_and_what_the_model_does_not_read_is_left_out() -> None:
    whole = batch(0)
    staged = Staging(DEVICE).put(whole).batch
    for name in ("tokens", "positions", "visible_until", "rows", "targets", "weights"):
        assert torch.equal(getattr(staged, name), getattr(whole, name)), name
    assert staged.pair_rows.numel() == staged.pair_examples.numel() == 0


def test_batches_that_stay_lie_at_one_place_and_overwrite_each_other() -> None:
    staging = Staging(DEVICE)
    first = staging.put(batch(0), lambda _: True)
    second = staging.put(batch(1))  # said once, for all that follow
    assert first.sizes == second.sizes
    assert first.batch.tokens.data_ptr() == second.batch.tokens.data_ptr()
    assert torch.equal(first.batch.tokens, batch(1).tokens)
    other = staging.put(batch(2, (9, 15)), lambda sizes: sizes == first.sizes)
    assert other.sizes != first.sizes
    assert torch.equal(first.batch.tokens, batch(1).tokens)


def test_nothing_is_kept_of_sizes_that_come_once() -> None:
    staging = Staging(DEVICE)
    for n in range(3, 20):
        staging.put(batch(0, (n, n + 5)))
    assert not staging._kept
    first, second = (staging.put(batch(seed)).batch for seed in range(2))
    assert torch.equal(first.tokens, batch(0).tokens)
    assert torch.equal(second.tokens, batch(1).tokens)

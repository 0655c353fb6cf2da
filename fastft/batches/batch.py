"""`Batch`: the one type that a model is given, whatever made it: `pack`, `padded_batch` or a converter.

Letters: `T` tokens, `R` loss rows, `P` supervised targets of single examples; a padded batch has `B` rows of `W`
tokens, `T = B W`, laid end to end.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from fastft_kernels import AttentionPlan, RowPlan, TileGroup, plan_tiles
from torch import Tensor

from fastft.batches.asked import IGNORE_INDEX, Asked, by_first_target, by_labels, by_spans
from fastft.common.errors import UserError
from fastft.data.encode import EncodedSet

Tiles = tuple[TileGroup, ...] | AttentionPlan
"""The parts of the score matrix that attention computes: those of the torch path, or of the Triton kernels."""
Planner = Callable[..., Tiles]
"""Finds them for `visible_until` `[T]`, and for the queries of `rows` `[R]` alone (`fastft.model.ops.planner`)."""
Rounding = Callable[[int], int]
"""Up to which size a pack's T or R is padded: `few_sizes`, `near_sizes`."""
RowPlanner = Callable[[Tensor], RowPlan]
"""Sorts the places that read each row, for gathers whose gradient is summed in a fixed order
(`fastft.model.ops.batcher`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Tokens, what each one sees, and which predictions are asked for.

    Attributes:
        tokens: `[T]` int64, token ids.
        positions: `[T]` int64, position of the token in its own example.
        visible_until: `[T]` int32; key `k` is visible to query `q` exactly when `k <= q < visible_until[k]`.
        rows: `[R]` int64, the token that each loss row reads its hidden state from.
        targets: `[R]` int64, the next token that the row is asked for.
        weights: `[R]` float32, how many examples supervise the row.
        pair_rows: `[P]` int64, the row of each supervised target of each example.
        pair_examples: `[P]` int64, the example (its index in the batch) of each supervised target.
        examples: how many examples the batch holds.
        tokens_real: inputs of all examples, each example's counted by itself.
        tokens_padded: positions that the same examples would take as rows of equal length.
        row_length: `W` where the batch is padded: it lets attention run on `[B, W]`. None elsewhere.
        tiles, row_tiles: the parts of the score matrix that attention computes, of all queries and of the loss
            rows'; None leaves finding them to the kernel.
        token_plan, position_plan, row_plan: where each token id, position and row is read; None likewise.
    """

    tokens: Tensor
    positions: Tensor
    visible_until: Tensor
    rows: Tensor
    targets: Tensor
    weights: Tensor
    pair_rows: Tensor
    pair_examples: Tensor
    examples: int
    tokens_real: int
    tokens_padded: int
    row_length: int | None = None
    tiles: Tiles | None = None
    row_tiles: Tiles | None = None
    token_plan: RowPlan | None = None
    position_plan: RowPlan | None = None
    row_plan: RowPlan | None = None

    @property
    def count(self) -> int:
        """`P`: supervised targets, each example's counted by itself."""
        return self.pair_rows.numel()

    def to(self, device: torch.device | str) -> Batch:
        """The batch with every tensor on `device`."""
        return with_tensors(self, lambda tensor: tensor.to(device))

    def tensors(self) -> list[Tensor]:
        """Its tensors and those of its plans, in the order of `with_tensors`."""
        found: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        with_tensors(self, note)
        return found

    def sizes(self) -> Hashable:
        """What the kernels that compute it depend on: shapes, and the numbers of its plans that they are given."""
        numbers = tuple(
            (plan.BM, plan.BN, plan.BQ, plan.BK, plan.slots) if isinstance(plan, AttentionPlan) else None
            for plan in (self.tiles, self.row_tiles)
        )
        return self.row_length, numbers, tuple((tensor.dtype, tuple(tensor.shape)) for tensor in self.tensors())

    def with_row_plans(self, planner: RowPlanner) -> Batch:
        """The batch with its gathers planned."""
        tokens, positions, rows = (planner(rows) for rows in (self.tokens, self.positions, self.rows))
        return replace(self, token_plan=tokens, position_plan=positions, row_plan=rows)

    def divided(self, count: int) -> Batch:
        """The batch with its weights divided by `count`: its loss is then a part of a mean."""
        return replace(self, weights=self.weights / count)

    def example_losses(self, row_losses: Tensor) -> Tensor:
        """Sums `row_losses` `[R]` over each example's targets: `[examples]`, in the dtype of `row_losses`."""
        sums = row_losses.new_zeros(self.examples)
        return sums.index_add_(0, self.pair_examples, row_losses.index_select(0, self.pair_rows))


T = TypeVar("T")


def with_tensors(value: T, change: Callable[[Tensor], Tensor]) -> T:
    """The same with each tensor changed: those of a batch, and of the plans that it holds, always in one order."""
    if isinstance(value, Tensor):
        return change(value)  # type: ignore[return-value] # a tensor for a tensor
    if isinstance(value, tuple):
        return tuple(with_tensors(one, change) for one in value)  # type: ignore[return-value] # likewise
    if not is_dataclass(value) or isinstance(value, type):
        return value
    changed = {f.name: with_tensors(getattr(value, f.name), change) for f in fields(value)}
    return replace(value, **changed)


def padded_batch(examples: Sequence[npt.NDArray[np.int32]], first_target: Sequence[int]) -> Batch:
    """The book's collate: every example padded at its end to the longest of the batch.

    Args:
        examples: the ids of each example, its end-of-text last; an example of n ids has n - 1 inputs.
        first_target: index within each example of the first supervised id, at least 1.

    Inputs are padded with the example's last id, its end-of-text, and targets end there: padding is told by length,
    never by value, so that an id equal to the padding changes nothing.
    """
    return padded_asked(by_first_target(examples, first_target), [int(ids[-1]) for ids in examples])


def padded_asked(asked: Sequence[Asked], padding: Sequence[int]) -> Batch:
    """`padded_batch` of examples each of which says itself what is asked of it, and with which id it is padded."""
    lengths = np.array([len(example.inputs) for example in asked], dtype=np.int64)
    B, W = len(asked), int(lengths.max())
    inputs = np.empty((B, W), dtype=np.int64)
    labels = np.full((B, W), IGNORE_INDEX, dtype=np.int64)
    for row, (example, filler) in enumerate(zip(asked, padding, strict=True)):
        inputs[row, : len(example.inputs)] = example.inputs
        inputs[row, len(example.inputs) :] = filler
        labels[row, example.at] = example.targets
    return from_padded(torch.from_numpy(inputs), torch.from_numpy(labels), tokens_real=int(lengths.sum()))


def from_padded(inputs: Tensor, labels: Tensor, *, tokens_real: int | None = None) -> Batch:
    """A `Batch` from what an ordinary collate gives.

    Args:
        inputs: `[B, W]` int64 token ids, padded at the end of each row.
        labels: `[B, W]` int64, the next token of each position, or -100 where none is asked for.
        tokens_real: how many inputs are not padding; all of them where it is not given.

    Raises:
        ValueError: the shapes differ or are not two-dimensional.
    """
    if inputs.ndim != 2 or inputs.shape != labels.shape:
        raise ValueError(
            f"got inputs {tuple(inputs.shape)} and labels {tuple(labels.shape)}, expected the same shape [B, W]"
        )
    B, W = inputs.shape
    rows = (labels.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
    row_ends = torch.arange(1, B + 1, dtype=torch.int32, device=inputs.device) * W
    return Batch(
        tokens=inputs.flatten(),
        positions=torch.arange(W, device=inputs.device).repeat(B),
        visible_until=row_ends.repeat_interleave(W),
        rows=rows,
        targets=labels.flatten()[rows],
        weights=torch.ones(len(rows), device=inputs.device),
        pair_rows=torch.arange(len(rows), device=inputs.device),
        pair_examples=rows // W,
        examples=B,
        tokens_real=B * W if tokens_real is None else tokens_real,
        tokens_padded=B * W,
        row_length=W,
    )


@dataclass(frozen=True, slots=True)
class Batcher:
    """Makes batches of a set's examples, as `--batching` and `--share_prefix` say."""

    packed: bool = True
    share_prefix: bool = True
    rounding: Rounding | None = None
    planner: Planner = plan_tiles
    row_planner: RowPlanner | None = None

    def __call__(self, encoded: EncodedSet, examples: npt.NDArray[np.int64]) -> Batch:
        """The batch of the examples with the given indices; of none, an `unasked` one."""
        asked = [by_spans(encoded[index], encoded.spans_of(index)) for index in examples]
        if not asked:
            return unasked(self._batch([_ONE_TOKEN], [0]))
        return self._batch(asked, [int(encoded[index][-1]) for index in examples])

    def _batch(self, asked: Sequence[Asked], padding: Sequence[int]) -> Batch:
        if self.packed:
            batch = pack_asked(asked, share_prefix=self.share_prefix, rounding=self.rounding, planner=self.planner)
        else:
            batch = padded_asked(asked, padding)
        return batch if self.row_planner is None else batch.with_row_plans(self.row_planner)


_ONE_TOKEN = by_spans(np.zeros(2, dtype=np.int32), np.array([[1, 2]]))  # of an id that every vocabulary has


def unasked(batch: Batch) -> Batch:
    """The batch as one of no example: its rows weigh nothing. What a rank computes that has no example in a step.

    It takes the same way through the model as any other batch, so that every parameter gets a gradient, of zero, and
    in the same order: ranks that exchange gradients as they come would otherwise mix them up, or wait for ever.
    """
    no_pair = batch.pair_rows[:0]
    return replace(
        batch,
        weights=torch.zeros_like(batch.weights),
        pair_rows=no_pair,
        pair_examples=no_pair,
        examples=0,
        tokens_real=0,
        tokens_padded=0,
    )


LEAST_SHARED = 8
"""Tokens that equal beginnings must have for sharing to be worth a branch of the tree."""


def pack(
    examples: Any,
    first_target: Sequence[int] | None = None,
    *,
    labels: Any = None,
    attention_mask: Any = None,
    shifted: bool = False,
    share_prefix: bool = True,
    least_shared: int = LEAST_SHARED,
    rounding: Rounding | None = None,
    planner: Planner = plan_tiles,
) -> Batch:
    """Examples laid end to end with no padding, equal beginnings once.

    The tokens are those of a prefix tree in depth-first order: sorted lexicographically, each example adds what
    follows the beginning that it shares with the one before it. A token that several examples supervise has one loss
    row for each different next token, weighted by the number of examples that ask for it.

    What is asked is told by `first_target` or by `labels`.

    Args:
        examples: with `first_target`, arrays of ids, each one's end-of-text last; an example of n ids has n - 1 inputs.
            With `labels`, what a tokenizer or a collate gives: `[B, W]` ids, or B sequences of any lengths.
        first_target: index within each example of the first supervised id, at least 1.
        labels: in the shape of `examples`, -100 where nothing is asked; not shifted, as Hugging Face has them, unless
            `shifted`. Each is held against the ids, so that the other layout is refused.
        attention_mask: with `labels`, 1 for a token and 0 for padding, at the right or left; without it all ids are
            tokens. Positions count from a row's first token.
        shifted: a label is the token after its place (nanoGPT, the book), not the token at it.
        share_prefix: off, every example's tokens stand by themselves.
        least_shared: shorter equal beginnings are not shared.
        rounding: up to which sizes T and R are padded, so that what was compiled or captured for one pack fits others.
            Padding sees itself alone, and its loss rows weigh nothing.
        planner: finds the parts of the score matrix that attention computes.

    Raises:
        ValueError: there is no example.
        UserError: not one of `first_target` and `labels`; labels, masks or shapes that do not fit.
    """
    if (first_target is None) == (labels is None):
        raise UserError("pack: got both or none of first_target and labels, expected one of them")
    if first_target is not None and (attention_mask is not None or shifted):
        raise UserError("pack: got first_target with attention_mask or shifted, which belong to labels")
    if first_target is not None:
        asked = by_first_target(examples, first_target)
    else:
        asked = by_labels(examples, labels, attention_mask, shifted=shifted)
    return pack_asked(asked, share_prefix=share_prefix, least_shared=least_shared, rounding=rounding, planner=planner)


def pack_asked(
    asked: Sequence[Asked],
    *,
    share_prefix: bool = True,
    least_shared: int = LEAST_SHARED,
    rounding: Rounding | None = None,
    planner: Planner = plan_tiles,
) -> Batch:
    """`pack` of examples each of which says itself what is asked of it; none without an input.

    Raises:
        ValueError: there is no example.
    """
    if not asked:
        raise ValueError("got no example, expected at least one")
    laid = _laid_out(asked, least_shared if share_prefix else None)
    return (laid if rounding is None else laid.with_sizes(rounding)).batch(planner)


@dataclass(frozen=True, slots=True)
class _Laid:
    """A pack before it is made of tensors.

    Attributes:
        tokens, positions, visible_until: `[T]`, and `rows`, `targets`: `[R]`, as in `Batch`.
        counts: `[R]`, the examples that ask for each row's target.
        pair_rows, pair_examples: as in `Batch`.
        lengths: `[examples]`, the inputs of each.
    """

    tokens: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    visible_until: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    pair_rows: npt.NDArray[np.int64]
    pair_examples: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]

    def with_sizes(self, rounding: Rounding) -> _Laid:
        """The same with T and R padded."""
        T, R = len(self.tokens), len(self.rows)
        more_tokens, more_rows = rounding(T) - T, rounding(R) - R
        themselves = np.arange(T, T + more_tokens, dtype=np.int32) + 1
        last = T + more_tokens - 1
        return replace(
            self,
            tokens=np.pad(self.tokens, (0, more_tokens)),
            positions=np.pad(self.positions, (0, more_tokens)),
            visible_until=np.append(self.visible_until, themselves),
            rows=np.pad(self.rows, (0, more_rows), constant_values=last),
            targets=np.pad(self.targets, (0, more_rows)),
            counts=np.pad(self.counts, (0, more_rows)),
        )

    def batch(self, planner: Planner) -> Batch:
        """The pack as tensors, with the plans of its attention."""
        visible_until, rows = torch.from_numpy(self.visible_until), torch.from_numpy(self.rows)
        return Batch(
            tokens=torch.from_numpy(self.tokens),
            positions=torch.from_numpy(self.positions),
            visible_until=visible_until,
            rows=rows,
            targets=torch.from_numpy(self.targets),
            weights=torch.from_numpy(self.counts.astype(np.float32)),
            pair_rows=torch.from_numpy(self.pair_rows),
            pair_examples=torch.from_numpy(self.pair_examples),
            examples=len(self.lengths),
            tokens_real=int(self.lengths.sum()),
            tokens_padded=len(self.lengths) * int(self.lengths.max()),
            tiles=planner(visible_until),
            row_tiles=planner(visible_until, rows),
        )


def _laid_out(asked: Sequence[Asked], least_shared: int | None) -> _Laid:
    """The examples end to end; beginnings are shared from `least_shared` tokens on, or not at all."""
    order, shared = _as_they_are(asked) if least_shared is None else _sorted_with_shared(asked, least_shared)
    lengths = np.array([len(asked[index].inputs) for index in order])
    begins = np.concatenate([[0], np.cumsum(lengths - shared)])  # where each example's own tokens begin
    T = int(begins[-1])
    tokens = np.empty(T, dtype=np.int64)
    positions = np.empty(T, dtype=np.int64)
    place = np.empty(int(lengths.max()), dtype=np.int64)  # of the current example's tokens in the pack
    wanted_by: list[npt.NDArray[np.int64]] = []
    for index, length, own, begin in zip(order, lengths, shared, begins, strict=False):
        mine = slice(begin, begin + length - own)
        tokens[mine] = asked[index].inputs[own:]
        positions[mine] = np.arange(own, length)
        place[own:length] = np.arange(mine.start, mine.stop)
        wanted_by.append(place[asked[index].at])
    wanted = [asked[index].targets for index in order]
    rows, targets, counts, pair_rows = _rows(np.concatenate(wanted_by), np.concatenate(wanted))
    pair_examples = np.repeat(np.array(order, dtype=np.int64), [len(ids) for ids in wanted])
    visible_until = visible_until_of(lengths, shared, begins)
    return _Laid(tokens, positions, visible_until, rows, targets, counts, pair_rows, pair_examples, lengths)


def few_sizes(n: int) -> int:
    """The next multiple of 64, and from 1,024 on of the form 2^e * (8 ... 15): at most an eighth more than `n` there.

    For GPUs, where a step is captured for each pair of sizes. Below, 64 tokens cost a GPU next to nothing, and batches
    of 8 of the book's examples have 9 pairs of sizes instead of 39.
    """
    return _up_to_multiple(n, 1 << max(6, n.bit_length() - 4))


def near_sizes(n: int) -> int:
    """The next multiple of 16, and from 1,024 on of the form 2^e * (32 ... 63): at most a 32nd more than `n` there.

    For 16-bit products on CPUs: oneDNN makes machine code for each shape of a product, which takes it several times as
    long as a step's product itself, and keeps that of the last 1,024 shapes.
    """
    return _up_to_multiple(n, 1 << max(4, n.bit_length() - 6))


def _up_to_multiple(n: int, step: int) -> int:
    return max(1, -(-n // step)) * step


def _sorted_with_shared(asked: Sequence[Asked], least_shared: int) -> tuple[list[int], npt.NDArray[np.int64]]:
    """The examples' order by content, and how many inputs each shares with the one before it."""
    # Big-endian bytes compare as the ids do; an input that another one continues comes first.
    order = sorted(range(len(asked)), key=lambda index: asked[index].inputs.astype(">u4").tobytes())
    shared = np.zeros(len(order), dtype=np.int64)
    for at in range(1, len(order)):
        before, this = asked[order[at - 1]].inputs, asked[order[at]].inputs
        least = min(len(before), len(this))
        differs = np.flatnonzero(before[:least] != this[:least])
        equal = int(differs[0]) if len(differs) else least
        shared[at] = equal if equal >= least_shared else 0
    return order, shared


def _as_they_are(asked: Sequence[Asked]) -> tuple[list[int], npt.NDArray[np.int64]]:
    return list(range(len(asked))), np.zeros(len(asked), dtype=np.int64)


def visible_until_of(
    lengths: npt.NDArray[np.int64], shared: npt.NDArray[np.int64], begins: npt.NDArray[np.int64]
) -> npt.NDArray[np.int32]:
    """`[T]` int32: where the group ends that shares each token.

    Going backwards, `until[p]` is the beginning of the next example that does not share position p.

    Args:
        lengths: `[examples]`, the tokens of each.
        shared: `[examples]`, how many of them are the example's before it.
        begins: `[examples + 1]`, where each one's own tokens begin, and T.
    """
    T = int(begins[-1])
    visible_until = np.empty(T, dtype=np.int32)
    until = np.full(int(lengths.max()), T, dtype=np.int32)
    for at in range(len(lengths) - 1, -1, -1):
        own = shared[at]
        visible_until[begins[at] : begins[at + 1]] = until[own : lengths[at]]
        until[own:] = begins[at]
    return visible_until


def _rows(
    tokens: npt.NDArray[np.int64], targets: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows, targets and counts `[R]` of the different (token, target) pairs, sorted, and the row of each pair `[P]`."""
    pairs = tokens * (1 << 32) + targets
    different, row_of_pair, counts = np.unique(pairs, return_inverse=True, return_counts=True)
    return different >> 32, different & ((1 << 32) - 1), counts, row_of_pair.reshape(-1)


def from_cu_seqlens(tokens: Tensor, labels: Tensor, cu_seqlens: Tensor) -> Batch:
    """A `Batch` from sequences packed end to end, as users of varlen attention have them.

    Args:
        tokens: `[T]` int64.
        labels: `[T]` int64, the next token of each position, or -100 where none is asked for.
        cu_seqlens: `[N + 1]` integers, where each sequence begins, and T.

    Raises:
        ValueError: the shapes differ, or `cu_seqlens` does not rise from 0 to T.
    """
    ends = cu_seqlens.to(torch.int64)
    lengths = ends.diff()
    if tokens.ndim != 1 or tokens.shape != labels.shape:
        raise ValueError(f"got tokens {tuple(tokens.shape)}, labels {tuple(labels.shape)}, expected the same shape [T]")
    if len(ends) < 2 or ends[0] != 0 or ends[-1] != len(tokens) or (lengths < 1).any():
        raise ValueError(f"got cu_seqlens {ends.tolist()[:8]}, expected to rise from 0 to T = {len(tokens)}")
    sequence = torch.arange(len(lengths), device=tokens.device).repeat_interleave(lengths)
    rows = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    return Batch(
        tokens=tokens,
        positions=torch.arange(len(tokens), device=tokens.device) - ends[:-1][sequence],
        visible_until=ends[1:][sequence].to(torch.int32),
        rows=rows,
        targets=labels[rows],
        weights=torch.ones(len(rows), device=tokens.device),
        pair_rows=torch.arange(len(rows), device=tokens.device),
        pair_examples=sequence[rows],
        examples=len(lengths),
        tokens_real=len(tokens),
        tokens_padded=len(lengths) * int(lengths.max()),
    )

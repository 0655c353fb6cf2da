"""Which examples form which optimizer step, and how a step is cut into packs, before any tensor exists.

The plan depends on the lengths, the seed and the epoch alone, so a run can be resumed at any step. Which examples form
a step does not depend on how it is cut: packs, accumulation and ranks only cut it, and the loss is one sum over all of
them divided by one count.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastft.common.errors import UserError
from fastft.data.encode import EncodedSet

Indices = npt.NDArray[np.int64]
EpochOrder = Callable[[int], Indices]

_DRAWN_AT_ONCE = 4096

WINDOW_STEPS = 64
"""Steps whose examples `bucketed` sorts by length together."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What an example costs, in floating-point operations of a forward pass.

    Attributes:
        token: for each token, of the blocks' matrix products.
        pair: for each pair of tokens that see each other, of attention.
        row: for each supervised target, of the head.
    """

    token: float = 1.0
    pair: float = 0.0
    row: float = 0.0

    @classmethod
    def of_gpt2(cls, n_layer: int, n_embd: int, vocab_size: int) -> Cost:
        """Two operations for each weight that a token meets; scores and weighted values for each pair."""
        return cls(token=24 * n_layer * n_embd**2, pair=4 * n_layer * n_embd, row=2 * vocab_size * n_embd)

    def __call__(self, lengths: Indices, shared: int, supervised: Indices) -> npt.NDArray[np.float64]:
        """The cost of each example of `lengths` inputs, the first `shared` of them computed elsewhere."""
        own = lengths - shared
        pairs = own * (lengths + shared + 1) / 2
        costs: npt.NDArray[np.float64] = self.token * own + self.pair * pairs + self.row * supervised
        return costs


@dataclass(frozen=True, slots=True)
class Packing:
    """How a step is cut into packs.

    Attributes:
        pack_tokens: the most tokens of a pack that holds more than one example; None cuts a step into `accumulate`
            equal numbers of examples for each rank instead.
        shared: beginning that all examples have in common, once a pack.
        ranks: processes; each gets the same number of packs of every step.
        cost: what is balanced over the packs.
    """

    pack_tokens: int | None = None
    shared: int = 0
    ranks: int = 1
    cost: Cost = Cost()


@dataclass(frozen=True, slots=True)
class Mix:
    """The examples of several files, drawn in a ratio.

    An epoch has as many examples as all files together, of each file its `counts`. The file's examples are gone through
    again and again, each time in another order, on over the ends of epochs: none comes again before all have come.

    Attributes:
        sizes: examples of each file; in the encoded set they stand one file after another.
        weights: how many of each file are drawn for those of the others.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]

    def counts(self) -> list[int]:
        """How many examples of each file an epoch has: by the weights, rounded so that their sum stays (the largest
        remainders up)."""
        n, total = sum(self.sizes), sum(self.weights)
        exact = [n * weight / total for weight in self.weights]
        counts = [int(one) for one in exact]
        by_remainder = sorted(range(len(exact)), key=lambda file: (counts[file] - exact[file], file))
        for file in by_remainder[: n - sum(counts)]:
            counts[file] += 1
        return counts

    def drawn(self, seed: int, epoch: int) -> Indices:
        """The examples of an epoch, `[sum of sizes]` int64, file by file."""
        begins = np.cumsum((0, *self.sizes[:-1]))
        files = zip(begins.tolist(), self.sizes, self.counts(), strict=True)
        drawn = [begin + _gone_through(size, epoch * n, n, (seed, file)) for file, (begin, size, n) in enumerate(files)]
        return np.concatenate(drawn)


def _gone_through(size: int, begin: int, n: int, seed: tuple[int, int]) -> Indices:
    """Draws `begin` to `begin + n` of an endless row of permutations of `size` examples; short ones are made some at a
    time, as each seed costs its microseconds."""
    in_order = np.tile(np.arange(size, dtype=np.int64), (max(1, _DRAWN_AT_ONCE // size), 1))
    first, last = begin // in_order.size, -(-(begin + n) // in_order.size)
    # Spawned: the plain seeds [seed, number] are those of the epochs' own orders.
    seeds = [np.random.SeedSequence(seed[0], spawn_key=(seed[1], number)) for number in range(first, last)]
    drawn = [np.random.default_rng(one).permuted(in_order, axis=1).reshape(-1) for one in seeds]
    return np.concatenate(drawn)[begin - first * in_order.size :][:n]


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step.

    Attributes:
        index: the step's number in the run, from 0.
        epoch: the epoch that it belongs to, from 0.
        packs: the examples (indices into the encoded set) of each forward and backward pass; the packs of rank r are
            `packs[r::ranks]`. A pack is empty where a step has fewer examples than there are ranks.
        count: supervised targets of the whole step: the one divisor of its loss.
    """

    index: int
    epoch: int
    packs: list[Indices]
    count: int

    @property
    def examples(self) -> Indices:
        """All examples of the step."""
        return np.concatenate(self.packs)


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps of a run. Built by `make_plan`."""

    supervised: Indices
    lengths: Indices
    batch_size: int
    accumulate: int
    packing: Packing
    steps_per_epoch: int
    total_steps: int
    epoch_order: EpochOrder

    def step(self, index: int) -> Step:
        """The step with number `index`, from 0."""
        epoch, within = divmod(index, self.steps_per_epoch)
        begin = within * self.batch_size
        examples = self.epoch_order(epoch)[begin : begin + self.batch_size]
        packs = self._dealt(self._cut(examples), first=index)
        return Step(index=index, epoch=epoch, packs=packs, count=int(self.supervised[examples].sum()))

    def largest_step(self) -> Step:
        """The step with the dearest pack of the run, by tokens and loss rows: what memory must suffice for."""

        def size(index: int) -> float:
            return max(self._size(pack) for pack in self.step(index).packs if len(pack))

        return self.step(max(range(self.total_steps), key=size))

    def _size(self, pack: Indices) -> float:
        lengths, cost = self.lengths[pack], self.packing.cost
        packed = int(lengths.sum()) - (len(pack) - 1) * self.packing.shared
        tokens = len(pack) * int(lengths.max()) if self.packing.pack_tokens is None else packed
        return cost.token * tokens + cost.row * float(self.supervised[pack].sum())

    def _cut(self, examples: Indices) -> list[Indices]:
        ranks, budget, shared = self.packing.ranks, self.packing.pack_tokens, self.packing.shared
        if budget is None:
            passes = min(self.accumulate, -(-len(examples) // ranks))
            return np.array_split(examples, passes * ranks)
        own = self.lengths[examples] - shared
        least = max(self.accumulate * ranks, -(-int(own.sum()) // max(1, budget - shared)))
        n_packs = -(-min(least, len(examples)) // ranks) * ranks
        if n_packs == 1 and own.sum() <= budget - shared:  # a budget may have no room beyond what is shared
            return [examples]
        costs = self.packing.cost(self.lengths[examples], shared, self.supervised[examples])
        in_order = _dearest_first(costs, own)
        while n_packs < len(examples):
            packs = _assign(in_order, n_packs, room=budget - shared)
            if packs is not None:
                return [examples[pack] for pack in packs]
            n_packs += ranks
        return [examples[pack] for pack in balanced(costs, n_packs)]

    def _dealt(self, packs: list[Indices], *, first: int) -> list[Indices]:
        """The packs in the order in which the ranks take them, so that a step costs each of them nearly the same: the
        dearest pack first, each to the rank that has the least so far. Another rank is the `first` in each step, so
        that none has the dearest pack of all steps."""
        ranks = self.packing.ranks
        if ranks == 1:
            return packs
        examples, sizes = np.concatenate(packs), [len(pack) for pack in packs]
        shared = 0 if self.packing.pack_tokens is None else self.packing.shared
        costs = self.packing.cost(self.lengths[examples], shared, self.supervised[examples])
        of_packs = np.bincount(np.repeat(np.arange(len(packs)), sizes), weights=costs, minlength=len(packs))
        hands: list[list[int]] = [[] for _ in range(ranks)]
        cheapest = [(0.0, turn) for turn in range(ranks)]
        for pack in np.argsort(-of_packs, kind="stable").tolist():
            so_far, turn = heapq.heappop(cheapest)
            hand = hands[(turn + first) % ranks]
            hand.append(pack)
            if len(hand) < len(packs) // ranks:
                heapq.heappush(cheapest, (so_far + of_packs[pack], turn))
        return [packs[pack] for turn in zip(*hands, strict=True) for pack in turn]


def balanced(costs: npt.NDArray[np.float64], n_packs: int) -> list[Indices]:
    """Assigns each item to one of `n_packs` so that their costs are nearly equal: the dearest item first, each to the
    cheapest pack so far (Graham 1969, "Bounds on multiprocessing timing anomalies": at most 4/3 of the best)."""
    packs = _assign(_dearest_first(costs, np.zeros(len(costs), dtype=np.int64)), n_packs, room=0)
    assert packs is not None  # items without a size fit
    return packs


def _dearest_first(costs: npt.NDArray[np.float64], sizes: Indices) -> list[tuple[int, float, int]]:
    """(item, its cost, its size), the dearest first. Plain numbers: the loop over them is what planning takes."""
    order = np.argsort(-costs, kind="stable")
    return list(zip(order.tolist(), costs[order].tolist(), sizes[order].tolist(), strict=True))


def _assign(in_order: list[tuple[int, float, int]], n_packs: int, *, room: int) -> list[Indices] | None:
    """The packs of `balanced`; None as soon as one of several items is larger than `room`."""
    packs: list[list[int]] = [[] for _ in range(n_packs)]
    sizes = [0] * n_packs
    cheapest = [(0.0, pack) for pack in range(n_packs)]
    for item, cost, size in in_order:
        so_far, pack = cheapest[0]
        sizes[pack] += size
        if packs[pack] and sizes[pack] > room:
            return None
        packs[pack].append(item)
        heapq.heapreplace(cheapest, (so_far + cost, pack))
    return [np.array(sorted(pack), dtype=np.int64) for pack in packs]


def make_plan(
    encoded: EncodedSet,
    *,
    batch_size: int,
    epochs: int = 1,
    steps: int | None = None,
    accumulate: int = 1,
    seed: int = 123,
    drop_last: bool = False,
    bucketed: bool = False,
    packing: Packing | None = None,
    epoch_order: EpochOrder | None = None,
    mix: Mix | None = None,
) -> Plan:
    """Plans a run.

    Args:
        encoded: the training examples.
        batch_size: examples in one optimizer step.
        epochs: passes over the examples; `steps`, where given, overrides it.
        steps: optimizer steps in all, over as many epochs as they need.
        accumulate: the least number of forward and backward passes that a step is cut into, on each rank.
        seed: with the epoch it determines the order of the examples.
        drop_last: leave a last incomplete step out, as the book does.
        bucketed: examples of similar length form a step: sorted within windows of `WINDOW_STEPS` steps.
        packing: how a step is cut; into `accumulate` equal parts where it is not given.
        epoch_order: epoch to `[n]` order of the examples, in place of the seeded one.
        mix: in which ratio the examples of several files are drawn; every example once an epoch where it is not given.

    Raises:
        UserError: there are no examples, or too few for one step with `drop_last`.
    """
    n = len(encoded)
    if n == 0:
        raise UserError("no training example: the data has too few records for its split (85% / 10% / 5%, or --split)")
    if drop_last and n < batch_size:
        raise UserError(f"got {n} training examples, expected at least --batch_size {batch_size} of them")
    per_epoch = n // batch_size if drop_last else -(-n // batch_size)
    lengths = encoded.lengths
    return Plan(
        supervised=encoded.supervised,
        lengths=lengths,
        batch_size=batch_size,
        accumulate=accumulate,
        packing=packing or Packing(),
        steps_per_epoch=per_epoch,
        total_steps=epochs * per_epoch if steps is None else steps,
        epoch_order=epoch_order or _Shuffled(n, seed, _Bucketed(lengths, batch_size) if bucketed else None, mix),
    )


class _Shuffled:
    """A permutation of `n` examples, or of those that a mix draws, for each epoch; the newest one is kept, as steps ask
    for it one by one."""

    def __init__(self, n: int, seed: int, bucketed: _Bucketed | None, mix: Mix | None) -> None:
        self.n = n
        self.seed = seed
        self._bucketed = bucketed
        self._mix = mix
        self._newest: tuple[int, Indices] | None = None

    def __call__(self, epoch: int) -> Indices:
        if self._newest is None or self._newest[0] != epoch:
            random = np.random.default_rng([self.seed, epoch])
            order = random.permutation(self.n if self._mix is None else self._mix.drawn(self.seed, epoch))
            self._newest = epoch, order if self._bucketed is None else self._bucketed.sort(order, random)
        return self._newest[1]


@dataclass(frozen=True, slots=True)
class _Bucketed:
    """Sorts a shuffled order by length within windows, and shuffles the steps that come out."""

    lengths: Indices
    batch_size: int

    def sort(self, order: Indices, random: np.random.Generator) -> Indices:
        """The order with examples of similar length side by side; an incomplete last step stays last."""
        window = WINDOW_STEPS * self.batch_size
        whole = len(order) // self.batch_size * self.batch_size
        windows = [order[i : min(i + window, whole)] for i in range(0, whole, window)]
        by_length = [part[np.argsort(self.lengths[part], kind="stable")] for part in windows]
        steps = np.concatenate([*by_length, order[:0]]).reshape(-1, self.batch_size)
        return np.concatenate([random.permutation(steps).reshape(-1), order[whole:]])

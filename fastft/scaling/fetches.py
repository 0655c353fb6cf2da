"""What stage 3 gathers, and when it gives it back: DeepSpeed's `PartitionedParameterCoordinator`, played through."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fastft.scaling.setup import Buckets, Layout


class Fetches(NamedTuple):
    """What stage 3 gathers in the forward and backward passes of a step, in elements.

    Attributes:
        gathered: each parameter that it gathers, as often as it does, in all passes.
        forward: what is there, beyond what persists, while each block computes: weights, and the buffers that they were
            gathered in, which stay until all of it is used.
        loss: the same when the loss is computed.
        backward: the same while each block, from the last to the lowest that does, goes back.
        left: what is there until the update: blocks that no backward pass gives back.
    """

    gathered: list[int]
    forward: list[int]
    loss: int
    backward: list[int]
    left: int


_Parameter = tuple[int, int, int]
"""A module's number (0: the model itself, k + 1: block k), a parameter's in it, and its elements."""


@functools.cache
def fetches(tensors: Layout, buckets: Buckets, again: bool, packs: int = 1) -> Fetches:
    """`PartitionedParameterCoordinator.fetch_sub_module` and `release_sub_module`, once it knows the order of modules:
    what a module needs is gathered, and ahead of it what follows; when it is through, given back unless it is used
    again soon. With `again` blocks are computed a second time before they go back. A block below all that is trained
    has no backward pass, and what the forward pass did not give back stays for the next pack."""
    L, times = tensors.layers, 2 if again else 1
    modules = [
        [(k, at, weight.elements) for at, weight in enumerate(weights)]
        for k, weights in enumerate((tensors.root, *tensors.blocks))
    ]
    back = [k for k in range(L, tensors.lowest, -1) for _ in range(times)]
    first = _Coordinator(modules, [*range(L + 1), 0, *back], buckets)
    during, after = zip(*first.run(), strict=True)
    gathered, left = first.gathered, {p for p in first.there - first.persistent if 0 < p[0] <= tensors.lowest}
    if packs > 1:
        later = _Coordinator(modules, [*range(L + 1), 0, *back], buckets, there=left)
        during_later, after_later = zip(*later.run(), strict=True)
        during, after = tuple(map(max, during, during_later)), tuple(map(max, after, after_later))
        gathered = gathered + later.gathered * (packs - 1)
    backward = [max(during[at : at + times]) for at in range(L + 2, len(during), times)]
    return Fetches(gathered, list(during[1 : L + 1]), after[L], backward, _elements(left))


@dataclass
class _Gathered:
    """Parameters gathered together: in one buffer, and once the first is waited for in tensors of their own too."""

    parameters: list[_Parameter]
    unused: set[_Parameter]
    waited_for: bool = False

    @property
    def buffer(self) -> int:
        """Its elements, where it is still held; one parameter alone keeps the buffer as its own."""
        held = self.unused if len(self.parameters) > 1 or not self.waited_for else ()
        return sum(size for _, _, size in self.parameters) if held else 0


class _Coordinator:
    """The state of `fetches`."""

    def __init__(
        self,
        modules: list[list[_Parameter]],
        order: Sequence[int],
        buckets: Buckets,
        there: Iterable[_Parameter] = (),
    ) -> None:
        self.modules, self.order, self.buckets = modules, order, buckets
        self.uses = deque((parameter, step) for step, number in enumerate(order) for parameter in modules[number])
        self.there: set[_Parameter] = {p for module in modules for p in module if p[2] <= buckets.persistence}
        self.persistent = frozenset(self.there)
        self.there.update(there)
        self.last_seen: dict[_Parameter, int] = {}
        self.gathered: list[int] = []
        self.in_flight: list[_Gathered] = []

    def run(self) -> Iterator[tuple[int, int]]:
        """Elements that are there while each module computes, and after it."""
        for step, number in enumerate(self.order):
            module = self.modules[number]
            self._gather([p for p in module if p not in self.there])
            self._use(module)
            self._look_ahead(step, module)
            during = self._held()
            if number:
                self._release(step + 1, number)
            if step == len(self.modules) - 1:  # the forward pass is through, and with it the model itself
                self._release(step + 1, 0)
            yield during, self._held()

    def _held(self) -> int:
        waiting = {p for group in self.in_flight if not group.waited_for for p in group.parameters}
        tensors = self.there - self.persistent - waiting
        return _elements(tensors) + sum(group.buffer for group in self.in_flight)

    def _gather(self, parameters: list[_Parameter]) -> None:
        if parameters:
            self.there.update(parameters)
            self.gathered += [size for _, _, size in parameters]
            self.in_flight.append(_Gathered(parameters, set(parameters)))

    def _use(self, module: list[_Parameter]) -> None:
        for group in self.in_flight:
            group.waited_for = group.waited_for or not group.unused.isdisjoint(module)
            group.unused.difference_update(module)
        self.in_flight = [group for group in self.in_flight if group.unused]

    def _look_ahead(self, step: int, module: list[_Parameter]) -> None:
        for _ in {p for p in module if self.last_seen.get(p, -1) < step}:
            parameter, at = self.uses.popleft()
            self.last_seen[parameter] = at
        room = min(self.buckets.max_live - _elements(self.there - self.persistent), self.buckets.prefetch)
        ahead: list[_Parameter] = []
        while self.uses and room > 0:
            parameter, at = self.uses.popleft()
            self.last_seen[parameter] = max(self.last_seen.get(parameter, -1), at)
            if parameter not in self.there and parameter not in ahead:
                ahead.append(parameter)
                room -= parameter[2]
        self._gather(ahead)

    def _release(self, step: int, number: int) -> None:
        if not self._is_soon_used_again(step, number):
            kept = self.persistent | {p for p in self.modules[number] if self.last_seen[p] > step}
            self.there -= set(self.modules[number]) - kept

    def _is_soon_used_again(self, step: int, number: int) -> bool:
        """Whether the module comes again within `max_reuse` elements. The model itself counts as all of its modules."""
        passed = 0
        for later in self.order[step:]:
            if passed >= self.buckets.max_reuse:
                return False
            if later in (0, number):
                return True
            passed += _elements(self.modules[later])
        return False


def _elements(parameters: Iterable[_Parameter]) -> int:
    return sum(size for _, _, size in parameters)

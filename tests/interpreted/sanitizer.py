"""What Triton's interpreter does not see by itself: accesses outside every argument, races, float atomics.

A GPU runs the programs of a launch in any order. `install` has every launch checked: each address that is read or
written lies within a tensor argument, no element that one program writes is read or written by another one, and no
store has different values for one element. Where that holds and no float is added atomically, the result does not
depend on the order, so it is the same each time.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter


class Violation(AssertionError):
    """A kernel did what it must not."""


@dataclass
class Statistics:
    """What was seen since the process began."""

    launches: int = 0
    programs: int = 0
    loads: int = 0
    stores: int = 0
    float_atomics: int = 0


statistics = Statistics()

_UNTOUCHED, _MANY, _ATOMIC = -1, -2, -3
_order: list[np.random.Generator] = []


@dataclass
class _Memory:
    """The elements of one tensor argument: which program wrote and which ones read each of them in this launch."""

    name: str
    tensor: Tensor
    begin: int = field(init=False)
    end: int = field(init=False)

    def __post_init__(self) -> None:
        x = self.tensor
        extent = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
        self.item = x.element_size()
        self.begin = x.data_ptr()
        self.end = self.begin + extent * self.item
        self.writer = np.full(extent, _UNTOUCHED, np.int64)
        self.reader = np.full(extent, _UNTOUCHED, np.int64)

    def touch(self, at: np.ndarray, program: int, kind: str) -> None:
        """Notes an access to elements; raises where another program's write is among them."""
        writer, reader = self.writer[at], self.reader[at]
        clash = (writer != _UNTOUCHED) & (writer != program)
        if kind == "atomic":  # several programs may, but no other access may be among them
            clash &= writer != _ATOMIC
        if kind == "load":
            self.reader[at] = np.where((reader == _UNTOUCHED) | (reader == program), program, _MANY)
        else:
            clash |= (reader != _UNTOUCHED) & (reader != program)
            self.writer[at] = program if kind == "store" else _ATOMIC
        if clash.any():
            element = int(at[np.argmax(clash)])
            raise Violation(f"race: program {program} {kind}s {self.name}[{element}], which another one touches too")


_arguments: list[_Memory] = []


def _check(builder: Any, pointers: np.ndarray, mask: np.ndarray, kind: str, values: np.ndarray | None = None) -> None:
    shape = np.broadcast_shapes(pointers.shape, mask.shape)
    addresses = np.broadcast_to(pointers, shape)[np.broadcast_to(mask, shape)].astype(np.int64)
    (x, y, z), (_, ny, nz) = builder.grid_idx, builder.grid_dim
    program = (x * ny + y) * nz + z
    if values is not None and (np.diff(addresses) <= 0).any():
        order = addresses.argsort(kind="stable")
        stored = np.broadcast_to(values, shape)[np.broadcast_to(mask, shape)][order]
        if ((np.diff(addresses[order]) == 0) & (stored[1:] != stored[:-1])).any():
            raise Violation(f"race: program {program} stores different values to one element at once")
    outside = np.ones(addresses.shape, bool)
    for memory in _arguments:
        inside = outside & (addresses >= memory.begin) & (addresses < memory.end)
        if inside.any():
            outside &= ~inside
            memory.touch((addresses[inside] - memory.begin) // memory.item, program, kind)
    if outside.any():
        near = min(_arguments, key=lambda memory: abs(int(addresses[outside][0]) - memory.end))
        element = (int(addresses[outside][0]) - near.begin) // near.item
        raise Violation(f"out of bounds: program {program} {kind}s near {near.name}[{element}]")


@contextlib.contextmanager
def random_order(seed: int) -> Iterator[None]:
    """Within it, the programs of each grid run in a random order."""
    _order.append(np.random.default_rng(seed))
    try:
        yield
    finally:
        _order.pop()


def install() -> None:
    """Patches the interpreter, for the rest of the process."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, atomic = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        statistics.loads += 1
        _check(self, pointers.data, mask.data, "load")
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        statistics.stores += 1
        _check(self, pointers.data, mask.data, "store", value.data)
        return store(self, pointers, value, mask, *rest)

    def checked_atomic(self: Any, operation: Any, pointer: Any, value: Any, mask: Any, *rest: Any) -> Any:
        _check(self, pointer.data, mask.data, "atomic")
        statistics.float_atomics += int(value.dtype.scalar.is_floating())
        return atomic(self, operation, pointer, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    builder.create_atomic_rmw = checked_atomic
    to_host, place = executor._init_args_hst, builder.set_grid_idx

    def noted_arguments(self: Any, arguments: Any, named: Any) -> Any:
        host, host_named = to_host(self, arguments, named)
        statistics.launches += 1
        by_name = [*zip(self.arg_names, host, strict=False), *host_named.items()]
        tensors = ((name, getattr(value, "base", value)) for name, value in by_name)
        _arguments[:] = [_Memory(name, x) for name, x in tensors if isinstance(x, Tensor)]
        return host, host_named

    def placed(self: Any, x: int, y: int, z: int) -> None:
        statistics.programs += 1
        if _order:
            x, y, z = _permuted(self, x, y, z)
        place(self, x, y, z)

    executor._init_args_hst, builder.set_grid_idx = noted_arguments, placed
    call_helper = interpreter.InterpretedFunction.__call__

    def called(self: Any, *arguments: Any, **named: Any) -> Any:
        try:
            return call_helper(self, *arguments, **named)
        except interpreter.InterpreterError as error:
            raise error.__cause__ or error from None  # what went wrong in a helper arrives as what it is

    interpreter.InterpretedFunction.__call__ = called


_grids: dict[int, list[tuple[int, int, int]]] = {}


def _permuted(builder: Any, x: int, y: int, z: int) -> tuple[int, int, int]:
    """The program that runs in the place of (x, y, z): a new permutation of the grid for each launch."""
    nx, ny, nz = builder.grid_dim
    if (x, y, z) == (0, 0, 0):
        programs = list(itertools.product(range(nx), range(ny), range(nz)))
        _grids[0] = [programs[i] for i in _order[-1].permutation(len(programs))]
    return _grids[0][(x * ny + y) * nz + z]


def poison() -> None:
    """Makes `torch.empty` and its like give NaN (the largest number, for integers): what is never written shows."""

    def poisoned(make: Any) -> Any:
        def filled(*arguments: Any, **named: Any) -> Tensor:
            x: Tensor = make(*arguments, **named)
            if x.device.type == "cpu" and not x.is_sparse:
                with torch.no_grad():
                    x.fill_(torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max if _is_int(x) else 1)
            return x

        return filled

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty"), (torch, "empty_strided")):
        setattr(owner, name, poisoned(getattr(owner, name)))


def _is_int(x: Tensor) -> bool:
    return not x.dtype.is_floating_point and not x.dtype.is_complex and x.dtype != torch.bool

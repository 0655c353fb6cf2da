"""Making things ahead of their use, in a thread beside the one that uses them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
K = TypeVar("K")


@contextmanager
def ahead(make: Callable[[K], T], keys: Iterable[K], *, depth: int) -> Iterator[Iterator[T]]:
    """What `make` gives for each key, in their order, made up to `depth` ahead for the length of the block.

    An error of `make` is raised where its result would have been given. With a depth of 0 there is no thread, and each
    is made when it is asked for.
    """
    if depth == 0:
        yield map(make, keys)
        return
    made: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    over = threading.Event()

    def put(result: T | None, error: BaseException | None) -> None:
        while not over.is_set():
            try:
                made.put((result, error), timeout=0.1)  # so that a block that is left does not leave a thread behind
            except queue.Full:
                continue
            return

    def work() -> None:
        try:
            for key in keys:
                put(make(key), None)
                if over.is_set():
                    return
        except BaseException as error:
            put(None, error)
        else:
            put(None, StopIteration())

    thread = threading.Thread(target=work, name="ahead", daemon=True)
    thread.start()
    try:
        yield _taken(made)
    finally:
        over.set()
        thread.join()


def _taken(made: queue.Queue[tuple[T | None, BaseException | None]]) -> Iterator[T]:
    while True:
        result, error = made.get()
        if isinstance(error, StopIteration):
            return
        if error is not None:
            raise error
        yield result  # type: ignore[misc] # None only beside an error, or where it was made

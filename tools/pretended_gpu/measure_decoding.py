"""What a decoding step costs the host on the pretended GPU: `slots` as it is called, beside the steps of `ragged`.

    python -m tools.pretended_gpu run FOLDER -m tools.pretended_gpu.measure_decoding --size gpt2-medium

A step is one token of all rows. Kernels compute nothing here, so that the tokens would be whatever lies in memory: the
host is told a fixed one in their place, after all that it does to read them. `slots` is measured from one token of the
first answer to a later one, everything between them included; of `ragged`, whose prompts need values from the device,
the steps alone. What a real GPU takes to launch a graph is not in these figures.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastft.decoding import ragged, sampling, slots
from fastft.decoding.answers import Answer, Request
from fastft.decoding.decode import NO_STOP, decode
from fastft.decoding.inference import prepared
from fastft.decoding.kv_cache import KVCache
from fastft.decoding.sampling import GREEDY, NO_OTHER, Choice, Chosen, Sampler, Sampling
from fastft.model.gpt2 import GPT2, config_for
from tools.pretended_gpu.counters import counts
from tools.pretended_gpu.measuring import arguments, say_and_write

TOKEN = 464
"""Which all rows are told to have chosen."""
FIRST, LAST = 25, 81
"""Tokens of an answer between which `slots` is measured: whole looks, in a cache that does not grow."""
SHOWN = {
    "launches": ("runtime_launches", "driver_launches", "products", "graph_launches", "memsets"),
    "replayed": ("replayed_kernels", "replayed_products", "replayed_copies"),
    "waits": ("stream_waits", "device_waits", "h2d_synchronous", "d2h_synchronous", "h2d_pageable", "d2h_pageable"),
    "event waits": ("event_waits",),
    "copies": ("h2d_pinned", "d2h_pinned", "d2d"),
    "allocations": ("device_mallocs",),
}
"""Counters, by what they are called in the table; a pageable copy waits as well."""
SAMPLINGS = {
    "greedy": GREEDY,
    "penalty": Sampling(repetition_penalty=1.2),
    "drawn": Sampling(temperature=0.8, top_k=40, top_p=0.95),
    "drawn from all": Sampling(temperature=1.0, top_p=0.95),
}


@dataclass(frozen=True)
class Figures:
    """Host milliseconds of a step, and what it asks of the device."""

    milliseconds: float
    counted: dict[str, float]


class FixedTokens(Chosen):
    """Reads the table as it comes, and takes it for one in which all chose the same token."""

    def __init__(self, table: Tensor) -> None:
        table[..., 0], table[..., 1] = TOKEN, NO_OTHER
        super().__init__(table)


def prompts_of(rows: int) -> list[list[int]]:
    """30 tokens that all begin with, and 5 to 24 of their own."""
    return [[100] * 30 + [row] * (5 + row % 20) for row in range(rows)]


def by_slots(model: GPT2, rows: int, chosen: Sampling, *, graphs: bool) -> Figures:
    """Whole answers, measured between two tokens of the first one."""
    marks: dict[int, tuple[float, dict[str, int]]] = {}

    def heard(answer: Answer) -> None:
        if answer.index == 0 and len(answer.ids) in (FIRST, LAST):
            marks[len(answer.ids)] = (time.perf_counter(), counts())

    for _ in decode(
        model, prompts_of(rows), max_new_tokens=LAST + 8, stop=NO_STOP, sampling=chosen, heard=heard, graphs=graphs,
        batch_size=rows, decoder="slots",
    ):  # fmt: skip
        pass
    steps = LAST - FIRST
    return _figures(marks[LAST][0] - marks[FIRST][0], marks[LAST][1], steps)


def by_ragged(model: GPT2, rows: int, chosen: Sampling, *, steps: int = 16) -> Figures:
    """Steps of rows whose prompts are taken for computed."""
    prompts = [[row] for row in range(rows)]
    request = Request(
        model=model, prompts=prompts, max_new_tokens=LAST, stop=NO_STOP, batch_size=rows, sampling=chosen,
        streams=range(rows), heard=lambda _: None, impl="triton", graphs=False,
    )  # fmt: skip
    decoder, sampler = ragged._Decoder(request), Sampler(chosen, prompts, request.streams)
    decoder.answers = [Answer(row) for row in range(rows)]
    decoder._cache._resize(rows, 128)
    decoder._cache.lengths = decoder._last = torch.full((rows,), 64).cuda()

    def step() -> None:
        hidden = decoder.step()
        choices = sampler.choose(model, hidden, range(rows), [answer.ids for answer in decoder.answers])
        for answer, choice in zip(decoder.answers, choices, strict=True):
            request.take(answer, choice.token, choice.near)
        decoder.note([choice.token for choice in choices], 0)

    for _ in range(3):
        step()
    counts()
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    return _figures(time.perf_counter() - begin, counts(), steps)


def _figures(seconds: float, counted: dict[str, int], steps: int) -> Figures:
    by_name = {name: sum(counted[key] for key in keys) / steps for name, keys in SHOWN.items()}
    return Figures(1e3 * seconds / steps, by_name)


def _tell_fixed_tokens() -> None:
    """Puts them in place of what is read, and what the host would compute from it."""

    def best(n: int, scored: Iterable[object]) -> list[Choice]:
        list(scored)
        return [Choice(TOKEN)] * n

    def make_room(cache: KVCache) -> None:
        int(cache.lengths.max())  # waits, for a value that is none

    replaced: list[tuple[Any, str, Any]] = [
        (slots, "Chosen", FixedTokens), (sampling, "_best", best), (KVCache, "_make_room", make_room),
    ]  # fmt: skip
    for owner, name, value in replaced:
        setattr(owner, name, value)


def _ways(model: GPT2, options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Figures]]]:
    for name, chosen in SAMPLINGS.items():
        if chosen == GREEDY:  # the others look up what is not there
            yield f"ragged, {name}", lambda chosen=chosen: by_ragged(model, options.rows, chosen)
        for graphs in (False, True):
            label = f"slots, {'graph' if graphs else 'eager'}, {name}"
            yield label, lambda chosen=chosen, graphs=graphs: by_slots(model, options.rows, chosen, graphs=graphs)


def main() -> None:
    """A line for each way of decoding: the median of the host's time, and counts of the last round."""
    parser = arguments(__doc__)
    parser.add_argument("--size", default="gpt2-medium")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="part of the names of the lines to measure")
    options = parser.parse_args()
    torch.backends.cuda.enable_cudnn_sdp(False)  # the pretended GPU has no cuDNN
    model = prepared(GPT2(config_for(options.size)).cuda().eval(), torch.bfloat16, rows=options.rows)
    _tell_fixed_tokens()
    results: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        for name, measure in _ways(model, options):
            if options.only in name:
                rounds = [measure() for _ in range(options.rounds)]
                middle = statistics.median(one.milliseconds for one in rounds)
                results[name] = {"host ms": round(middle, 3), **rounds[-1].counted}
    lines = [
        f"{options.size}, bf16, {options.rows} rows, a step of all rows, median of {options.rounds} rounds",
        f"{'':34}" + "".join(f"{name:>13}" for name in ("host ms", *SHOWN)),
        *(f"{name:34}" + "".join(f"{n:13.3f}" for n in row.values()) for name, row in results.items()),
    ]
    say_and_write(results, lines, options.json)


if __name__ == "__main__":
    main()

"""Answering test prompts: fastft beside the book's `generate` and transformers' batched one, in turn.

All have the same weights and give each prompt the same number of new tokens, greedily. The book answers a few of the
prompts, one at a time, since all would take twenty minutes; transformers answers all, padded on the left, in batches of
the size that is the best of several in the first round. Whether they say the same is said too: fastft's float32 answers
are held against the book's, token for token, those places apart where the two best logits lie within 1e-4.

`floor` is what no decoder goes below: the matrix products of the prompts and of each step, with the weights laid out as
fastft has them, and one read a step of the keys and values that are there then, at the memory's measured bandwidth. It
is measured in the midst of fastft's own decoding, in the same process; on a GPU behind it, by its own clock.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks import common

if TYPE_CHECKING:
    from fastft.model.gpt2 import GPT2Config

MODULE = "benchmarks.generation"
PROBE_EVERY = 6
"""Steps of decoding between two measurements of a step's bare products."""
BATCH_SIZES = (16, 32, 64, 128)
"""That transformers is tried with."""


def prompts_of(options: argparse.Namespace) -> list[list[int]]:
    """Token ids of the test split's prompts."""
    from fastft.data.prompts import ALPACA
    from fastft.data.reading import load_records
    from fastft.data.records import split
    from fastft.data.tokenizer import gpt2_tokenizer

    records = load_records(os.environ.get("FASTFT_BOOK_DATA") or "sample").good
    test = [records[index] for index in split(len(records)).test][: options.prompts]
    return gpt2_tokenizer().encode_many([ALPACA.prompt(record.instruction, record.input) for record in test])


def model_of(options: argparse.Namespace) -> Any:
    """A GPT2 with the weights that all peers have: random ones by name, or those of `--weights`."""
    from benchmarks.peers import shared
    from fastft.model.gpt2 import GPT2, config_for
    from fastft.model.weights import load

    if options.weights:
        return load(options.weights)
    config = config_for(options.size)
    model = GPT2(config)
    shared.initialise(model.named_parameters(), config)
    return model


def by_fastft(options: argparse.Namespace) -> dict[str, Any]:
    """All prompts at once; making the model ready is part of the time."""
    import torch

    from fastft.decoding.decode import NO_STOP, decode
    from fastft.decoding.inference import prepared

    device = common.chosen_device(options.device)
    model, prompts = model_of(options).eval().to(device), prompts_of(options)
    begin = time.perf_counter()
    model = prepared(model, torch.bfloat16 if options.dtype == "bf16" else torch.float32, rows=options.batch_size)
    answers = decode(model, prompts, max_new_tokens=options.new_tokens, stop=NO_STOP, batch_size=options.batch_size)
    answers = sorted(answers, key=lambda answer: answer.index)
    return {
        "seconds": time.perf_counter() - begin,
        "answers": [answer.ids for answer in answers],
        "near_ties": [[tie.position for tie in answer.near_ties] for answer in answers],
        "peak_bytes": common.peak_bytes(device),
    }


def by_book(options: argparse.Namespace) -> dict[str, Any]:
    """A few prompts, evenly spread, one after the other."""
    import torch
    from llms_from_scratch.ch04 import GPTModel
    from llms_from_scratch.ch05 import generate, load_weights_into_gpt

    from benchmarks.peers import shared

    device = common.chosen_device(options.device)
    ours, prompts = model_of(options), prompts_of(options)
    model = GPTModel({**shared.book_layout(ours.config), "drop_rate": 0.0, "qkv_bias": True})
    load_weights_into_gpt(model, _openai_layout(ours))
    model.eval().to(device)
    few = list(range(0, len(prompts), -(-len(prompts) // options.book_prompts)))
    begin = time.perf_counter()
    answers = []
    for index in few:
        prompt = torch.tensor([prompts[index]], device=device)
        answer = generate(model, prompt, options.new_tokens, ours.config.n_ctx)
        answers.append(answer[0, prompt.shape[1] :].tolist())
    return {"seconds": time.perf_counter() - begin, "indices": few, "answers": answers}


def by_transformers(options: argparse.Namespace) -> dict[str, Any]:
    """All prompts in batches padded on the left; `attention_mask` given, as it must be."""
    import torch
    from transformers import GPT2LMHeadModel

    from benchmarks.peers import hf

    device = common.chosen_device(options.device)
    ours, prompts = model_of(options), prompts_of(options)
    model = GPT2LMHeadModel._from_config(hf.hf_config(ours.config), attn_implementation="sdpa")
    weights = {name: value.t() if _is_linear(name) else value for name, value in ours.state_dict().items()}
    model.transformer.load_state_dict({name: value for name, value in weights.items() if name != "lm_head.weight"})
    model = model.to(device, torch.bfloat16 if options.dtype == "bf16" else torch.float32).eval()
    answers: list[list[int]] = []
    begin = time.perf_counter()
    with torch.no_grad():
        for at in range(0, len(prompts), options.batch_size):
            some = prompts[at : at + options.batch_size]
            width = max(map(len, some))
            ids = torch.tensor([[hf.PAD] * (width - len(prompt)) + prompt for prompt in some], device=device)
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in some], device=device)
            out = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=options.new_tokens,
                min_new_tokens=options.new_tokens, do_sample=False, pad_token_id=hf.PAD, eos_token_id=None,
            )  # fmt: skip
            answers += out[:, width:].tolist()
    return {"seconds": time.perf_counter() - begin, "answers": answers, "versions": common.versions("transformers")}


def floor(options: argparse.Namespace) -> dict[str, Any]:
    """The floor's parts, and fastft's own seconds in their midst, without those that make the model ready."""
    import torch

    from benchmarks.bandwidth import stream_bandwidth
    from fastft.decoding.decode import NO_STOP, decode
    from fastft.decoding.inference import prepared

    device = common.chosen_device(options.device)
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    prompts = prompts_of(options)
    model = prepared(model_of(options).eval().to(device), dtype, rows=options.batch_size)

    work = Work.of(model.config, prompts, options.new_tokens, options.batch_size)

    @torch.no_grad()
    def products(tokens: int, rows: int) -> float:
        return _products_seconds(model, tokens, rows, device)

    def ours(new_tokens: int, heard: Callable[[object], object] = lambda _: None) -> float:
        rest: dict[str, Any] = {"stop": NO_STOP, "batch_size": options.batch_size, "heard": heard}
        begin = time.perf_counter()
        [*decode(model, prompts, max_new_tokens=new_tokens, **rest)]
        common.wait_for(device)
        return time.perf_counter() - begin

    among = _Among(lambda: products(work.rows, work.rows), every=PROBE_EVERY * work.rows)
    ours(2)
    prefills = [sum(products(*part) for part in work.parts)]
    # A shared machine's speed changes within seconds. A GPU's does not, and there the host is ahead of the device.
    decode_seconds = ours(options.new_tokens, among.heard if device == "cpu" else lambda _: None) - among.spent
    prefills.append(sum(products(*part) for part in work.parts))
    # The mean, as all steps together are: what others take from the machine falls on both.
    step = statistics.fmean(among.seconds or [products(work.rows, work.rows) for _ in range(9)])
    prefill = statistics.fmean(prefills)
    bandwidth = stream_bandwidth(device=device)
    cache = work.numbers_read * dtype.itemsize / bandwidth
    return {
        "seconds": prefill + work.steps * step + cache, "decode_seconds": decode_seconds, "prefill_seconds": prefill,
        "step_seconds": step, "cache_seconds": cache, "bytes_per_second": bandwidth,
    }  # fmt: skip


class _Among:
    """Measures something again and again while something else goes on, and how long that took in all."""

    def __init__(self, measured: Callable[[], float], every: int) -> None:
        """Args: what gives its own seconds, and at each how many-th call of `heard` it is measured."""
        self._measured, self._every, self._calls = measured, every, 0
        self.seconds: list[float] = []
        self.spent = 0.0

    def heard(self, _: object) -> None:
        """One more thing has happened."""
        self._calls += 1
        if self._calls % self._every == 0:
            begin = time.perf_counter()
            self._measured()  # whose data is not in the caches yet
            self.seconds.append(self._measured())
            self.spent += time.perf_counter() - begin


@dataclass(frozen=True, slots=True)
class Work:
    """What answering prompts asks for, whoever does it.

    Attributes:
        parts: tokens that are computed together before the first step, and how many of them are asked for a token.
        rows: of a step.
        steps: how many; the first token of an answer needs none.
        numbers_read: keys and values, once in each step that sees them: those of the common beginning once for all.
    """

    parts: list[tuple[int, int]]
    rows: int
    steps: int
    numbers_read: int

    @classmethod
    def of(cls, config: GPT2Config, prompts: list[list[int]], new_tokens: int, batch_size: int) -> Work:
        """Counted from the lengths of the prompts, which begin at once or, in a smaller batch, one after another."""
        from fastft.decoding.answers import next_prompts
        from fastft.decoding.decode import common_beginning

        shared = common_beginning(prompts)
        own = [len(prompt) - shared for prompt in prompts]
        steps_of = [min(new_tokens, config.n_ctx + 1 - len(prompt)) - 1 for prompt in prompts]
        rows, waiting = min(batch_size, len(prompts)), deque(range(len(prompts)))
        parts = [(shared, 0)] if shared else []
        while waiting:
            some = next_prompts(waiting, own.__getitem__, rows)
            parts.append((sum(own[index] for index in some), len(some)))
        steps = -(-sum(steps_of) // rows)
        places = sum(more * length + more * (more + 1) // 2 for length, more in zip(own, steps_of, strict=True))
        return cls(parts, rows, steps, 2 * config.n_layer * config.n_embd * (places + steps * shared))


def _products_seconds(model: Any, tokens: int, rows: int, device: str) -> float:
    """The products of all tokens, of which `rows` are asked for the next one: the last block computes no others."""
    import torch

    *_, last = model.h
    C, dtype = model.config.n_embd, model.head.dtype
    wide = torch.randn(tokens, 4 * C, device=device).to(dtype)
    narrow = wide[:, :C].contiguous()

    def work() -> None:
        for block in model.h:
            block.attn.c_attn(narrow)
            n = rows if block is last else tokens
            if n:
                block.attn.c_proj(narrow[:n]), block.mlp.c_fc(narrow[:n]), block.mlp.c_proj(wide[:n])
        if rows:
            model.logits_of(narrow[:rows])

    return common.seconds_of(work, device)


def _is_linear(name: str) -> bool:
    return name.startswith("h.") and name.endswith(".weight") and ".ln_" not in name


def _openai_layout(model: Any) -> dict[str, Any]:
    """The weights as chapter 5 reads them from OpenAI's checkpoint: nested, linear layers as `[in, out]`."""
    values = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    blocks = []
    for layer in range(model.config.n_layer):

        def linear(name: str, layer: int = layer) -> dict[str, Any]:
            return {"w": values[f"h.{layer}.{name}.weight"].T, "b": values[f"h.{layer}.{name}.bias"]}

        def norm(name: str, layer: int = layer) -> dict[str, Any]:
            return {"g": values[f"h.{layer}.{name}.weight"], "b": values[f"h.{layer}.{name}.bias"]}

        blocks.append(
            {
                "ln_1": norm("ln_1"), "ln_2": norm("ln_2"),
                "attn": {"c_attn": linear("attn.c_attn"), "c_proj": linear("attn.c_proj")},
                "mlp": {"c_fc": linear("mlp.c_fc"), "c_proj": linear("mlp.c_proj")},
            }
        )  # fmt: skip
    return {
        "wte": values["wte.weight"], "wpe": values["wpe.weight"], "blocks": blocks,
        "g": values["ln_f.weight"], "b": values["ln_f.bias"],
    }  # fmt: skip


WORKERS = {"fastft": by_fastft, "book": by_book, "transformers": by_transformers, "floor": floor}
PEERS = ("transformers", "floor", "book")


def same_text(fastft: dict[str, Any], other: dict[str, Any]) -> dict[str, int]:
    """How many answers are the same, token for token, and how many part at a place that fastft lists as a near tie.

    Raises:
        ValueError: one parts elsewhere.
    """
    counts = {"answers": 0, "same": 0, "part_at_a_near_tie": 0}
    for index, theirs in zip(other.get("indices", range(len(other["answers"]))), other["answers"], strict=True):
        ours = fastft["answers"][index]
        parts = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
        if parts is not None and parts not in fastft["near_ties"][index]:
            raise ValueError(f"prompt {index} is answered otherwise from token {parts} on, and that is no near tie")
        counts["answers"] += 1
        counts["same" if parts is None else "part_at_a_near_tie"] += 1
    return counts


def _options(options: argparse.Namespace, peer: str, dtype: str, batch_size: int) -> list[object]:
    given = ["--peer", peer, "--dtype", dtype, "--batch_size", batch_size]
    for name in ("size", "device", "prompts", "new_tokens", "book_prompts"):
        given += [f"--{name}", getattr(options, name)]
    return [*given, *(("--weights", options.weights) if options.weights else ())]


def best_batch_sizes(options: argparse.Namespace) -> dict[str, int]:
    """transformers' batch size, by dtype: the fastest of `BATCH_SIZES`."""
    best = {}
    for dtype in options.dtypes:
        seconds = {}
        for size in BATCH_SIZES:
            worker = _options(options, "transformers", dtype, size)
            seconds[size] = common.run_worker(MODULE, *worker, threads=options.threads)["seconds"]
        best[dtype] = min(seconds, key=lambda size: seconds[size])
    return best


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Runs all in turn and gives the figures."""
    sizes = best_batch_sizes(options) if "transformers" in options.peers else {}
    workers: dict[str, tuple[str, list[object]]] = {}
    for dtype in options.dtypes:
        workers[f"fastft {dtype}"] = (MODULE, _options(options, "fastft", dtype, options.batch_size))
        if "transformers" in options.peers:
            workers[f"transformers {dtype}"] = (MODULE, _options(options, "transformers", dtype, sizes[dtype]))
        if "floor" in options.peers:
            workers[f"floor {dtype}"] = (MODULE, _options(options, "floor", dtype, options.batch_size))
    if "book" in options.peers:
        workers["book"] = (MODULE, _options(options, "book", "fp32", 1))
    turns = common.in_turn(workers, rounds=options.rounds, threads=options.threads)
    n_prompts = len(turns[f"fastft {options.dtypes[0]}"][0]["answers"])

    def speeds(name: str) -> list[float]:
        return [len(turn.get("answers", range(n_prompts))) / turn["seconds"] for turn in turns[name]]

    result: dict[str, Any] = {
        "machine": common.machine(), "data": common.data_name(), "size": options.size, "prompts": n_prompts,
        "weights": "trained" if options.weights else "random", "new_tokens": options.new_tokens,
        "threads": options.threads, "rounds": options.rounds, "batch_size": options.batch_size,
        "transformers_batch_size": sizes, "answers_per_second": {name: common.spread(speeds(name)) for name in turns},
        "fastft_to": {}, "time_to_floor": {}, "same_text": {},
    }  # fmt: skip
    for dtype in options.dtypes:
        ours = speeds(f"fastft {dtype}")
        for name in turns.keys() & {f"transformers {dtype}", "book"}:
            result["fastft_to"][f"{dtype}: {name}"] = common.ratios(ours, speeds(name))
        if floors := turns.get(f"floor {dtype}"):
            pairs = [(turn["decode_seconds"], turn["seconds"]) for turn in floors]
            result["time_to_floor"][dtype] = {
                "ratio": common.spread(time / least for time, least in pairs), "parts": floors,
            }  # fmt: skip
    if "fp32" in options.dtypes:
        for name in turns.keys() & {"book", "transformers fp32"}:
            result["same_text"][name] = same_text(turns["fastft fp32"][0], turns[name][0])
    return result


def main() -> None:
    """The command line, of the comparison and of its workers."""
    parser = common.arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=110, help="of the test split")
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--book_prompts", type=int, default=4, help="that the book's loop answers in a round")
    parser.add_argument("--batch_size", type=int, default=128, help="fastft's")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--weights", default="", help="a model folder of a run; random ones without it")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--peer", choices=WORKERS, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="fp32", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        common.begin(options.threads)
        common.say(WORKERS[options.peer](options))
        return
    result = compare(options)
    ratios, dtypes = result["fastft_to"], options.dtypes
    common.print_table(
        f"{result['prompts']} prompts, {options.new_tokens} new tokens each, {options.size}, {options.threads} threads",
        ["", "answers/s", *(f"fastft {dtype} to it" for dtype in dtypes)],
        [
            [name, common.shown(speed), *(common.shown(ratios.get(f"{dtype}: {name}")) for dtype in dtypes)]
            for name, speed in result["answers_per_second"].items()
        ],
        [
            common.in_words(result["machine"]),
            f"the same text: {result['same_text']}",
            *(f"{dtype}: time / floor {common.shown(to['ratio'])}" for dtype, to in result["time_to_floor"].items()),
        ],
    )
    common.write_result(options.results, "generation", result)


if __name__ == "__main__":
    main()

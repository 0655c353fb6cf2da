from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import fastft_kernels
import pytest
import torch
from fastft_kernels import registry, support, tables
from fastft_kernels.roofline import (
    CARDS,
    Cost,
    adamw_cost,
    attention_cost,
    card_named,
    cross_entropy_cost,
    gelu_cost,
    layer_norm_cost,
    liger_linear_cross_entropy_cost,
    linear_cost,
    linear_cross_entropy_cost,
    predicted_seconds,
    rows_cost,
    total,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

needs_triton = pytest.mark.skipif(not support.HAS_TRITON, reason="Triton is not installed")


def size(x: Tensor) -> int:
    """Bytes of a tensor in memory: an expanded axis has one element."""
    n = x.element_size()
    for length, stride in zip(x.shape, x.stride(), strict=True):
        n *= length if stride or not length else 1
    return n


def is_view(function: Any, result: Tensor, args: Any) -> bool:
    """Whether an operation returned a view of its first argument, which launches nothing."""
    alias = function._schema.returns[0].alias_info
    may_be = alias is not None and not alias.is_write
    return may_be and result.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr()


class Meter(TorchDispatchMode):
    """Counts launches, and the bytes of all tensors that each launch is given or returns, each tensor once."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.launches = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "fastft_kernels":
            with self:
                return registry.body_of(function)(*args, **(kwargs or {}))
        result = function(*args, **(kwargs or {}))
        name = function.__name__.split(".")[0]
        if isinstance(result, Tensor) and "empty" not in name and not is_view(function, result, args):
            if name == "index_select":  # reads some rows
                args = (args[0][: result.shape[0]], *args[1:])
            given = [*torch.utils._pytree.tree_leaves((args, kwargs)), result]
            self.launched({str(i): x for i, x in enumerate(given)}, adds=name in ("addmm_", "add_"))
        return result

    def launched(self, arguments: dict[str, Any], adds: bool = False) -> None:
        tensors = {x.data_ptr(): x for x in arguments.values() if isinstance(x, Tensor)}
        if adds:  # reads its result, and writes it
            self.bytes += size(arguments["0"])
        self.launches += 1
        self.bytes += sum(size(x) for x in tensors.values() if x.numel())


@contextmanager
def metered(monkeypatch: pytest.MonkeyPatch) -> Iterator[Meter]:
    """Within it, what runs on CPU tensors as for a GPU is counted; Triton's launches do nothing."""
    from fastft_kernels.support import triton

    meter = Meter()

    def launch(kernel: Any, grid: Any) -> Callable[..., None]:
        def count(*arguments: Any, **named: Any) -> None:
            by_name = dict(zip(kernel.arg_names, arguments, strict=False)) | named
            if "first" in by_name:  # some columns of the vocabulary
                begin = by_name["first"]
                by_name["W"] = by_name["W"][begin : begin + by_name["stride_out"]]
            if "IDS" in by_name:  # some rows of the output
                by_name["OUT"] = by_name["OUT"][: len(by_name["IDS"])]
                meter.bytes += size(by_name["OUT"]) if by_name["ADD"] else 0
            meter.launched(by_name)

        return count

    monkeypatch.setattr(triton.KernelInterface, "__getitem__", launch)
    with support.offline("sm_80"), meter:
        yield meter


def assert_counted(
    monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any], learnt: list[Tensor], forward: Cost, backward: Cost
) -> None:
    """Holds the costs against what the code launches, and the tensors that it launches on."""
    with metered(monkeypatch) as meter:
        outputs = run()
        assert (meter.launches, meter.bytes) == (forward.launches, forward.bytes)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    flowing = [torch.ones_like(x) for x in outputs]
    with metered(monkeypatch) as meter:
        torch.autograd.grad(outputs, learnt, flowing)
        assert (meter.launches, meter.bytes) == (backward.launches, backward.bytes)


def of(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype, requires_grad=True)


@needs_triton
@pytest.mark.parametrize(("dtype", "stream"), [*itertools.product((torch.float32, torch.bfloat16), (0, 2, 4))])
def test_layer_norm_is_counted_as_it_is_launched(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, stream: int
) -> None:
    if stream and stream < dtype.itemsize:
        pytest.skip("the stream is at least as wide")
    rows, C = 1030, 48
    x, weight, bias = of(rows, C, dtype=dtype), of(C), of(C)
    residual = of(rows, C, dtype={2: torch.bfloat16, 4: torch.float32}[stream]) if stream else None
    forward = layer_norm_cost(rows, C, dtype.itemsize, stream=stream)
    backward = layer_norm_cost(rows, C, dtype.itemsize, stream=stream, backward=True)

    def run() -> object:
        return fastft_kernels.layer_norm(x, weight, bias, residual=residual, impl="triton")

    assert_counted(monkeypatch, run, [x, weight, bias, *([residual] if stream else [])], forward, backward)


@needs_triton
@pytest.mark.parametrize("bias", [0, 2, 4])
def test_gelu_is_counted_as_it_is_launched(monkeypatch: pytest.MonkeyPatch, bias: int) -> None:
    rows, F = 301, 96
    x = of(rows, F, dtype=torch.bfloat16)
    b = of(F, dtype={2: torch.bfloat16, 4: torch.float32}[bias]) if bias else None
    costs = [gelu_cost(rows, F, 2, bias=bias, backward=backward) for backward in (False, True)]
    assert_counted(monkeypatch, lambda: fastft_kernels.gelu(x, b, impl="triton"), [x, *([b] if bias else [])], *costs)


@needs_triton
def test_cross_entropy_is_counted_as_it_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    N, V = 5, 131
    logits, targets = of(N, V, dtype=torch.bfloat16), torch.zeros(N, dtype=torch.int64)
    forward, backward = (cross_entropy_cost(N, N, V, 2, backward=b) for b in (False, True))

    def run() -> object:
        return fastft_kernels.cross_entropy(logits, targets, reduction="none", impl="triton")

    assert_counted(monkeypatch, run, [logits], forward, backward)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_bytes", [1, 53760, 1 << 20])
def test_linear_cross_entropy_is_counted_as_it_is_launched(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk_bytes: int
) -> None:
    R, C, V = 70, 32, 500
    hidden, weight, targets = of(R, C, dtype=dtype), of(V, C, dtype=dtype), torch.zeros(R, dtype=torch.int64)
    weights = torch.ones(R)
    costs = [
        linear_cross_entropy_cost(R, C, V, dtype.itemsize, chunk_bytes=chunk_bytes, backward=b) for b in (False, True)
    ]

    def run() -> Tensor:
        return fastft_kernels.linear_cross_entropy_with_losses(
            hidden, weight, targets, row_weights=weights, logit_chunk_bytes=chunk_bytes, impl="triton"
        )[0]

    assert_counted(monkeypatch, run, [hidden, weight], *costs)


@needs_triton
@pytest.mark.parametrize("out", [0, 4])
@pytest.mark.parametrize("often", [False, True])
def test_rows_are_counted_as_they_are_launched(monkeypatch: pytest.MonkeyPatch, out: int, often: bool) -> None:
    N, C, R = 500, 48, 300
    rows = torch.arange(R).clamp_max(20 if often else R)
    plan = fastft_kernels.plan_rows(rows)
    assert len(plan.whole) == (2 if often else 0)
    x = of(N, C, dtype=torch.bfloat16)
    out_dtype = torch.float32 if out else None
    sizes: dict[str, Any] = {"out": out, "segments": 21 if often else R, "chunks": 2 if often else 0}

    def run() -> Tensor:
        return fastft_kernels.take_rows(x, rows, plan=plan, out_dtype=out_dtype, impl="triton")

    forward = rows_cost(R, C, 2, out=out)
    assert_counted(monkeypatch, run, [x], forward, rows_cost(R, C, 2, N=N, backward=True, **sizes))
    total, grad = torch.zeros(N, C, dtype=torch.bfloat16), torch.zeros(R, C, dtype=out_dtype or torch.bfloat16)
    with metered(monkeypatch) as meter:
        fastft_kernels.add_rows_(total, grad, plan, "triton")
    added = rows_cost(R, C, 2, backward=True, **sizes)
    assert (meter.launches, meter.bytes) == (added.launches, added.bytes)


def traffic_of_tiles(M: int, K: int, N: int, BM: int, BN: int) -> tuple[int, int, int]:
    """Elements read and written, and multiply-adds, of a product in tiles: by going through them."""
    read = written = multiplied = 0
    for m, n in itertools.product(range(0, M, BM), range(0, N, BN)):
        rows, columns = min(BM, M - m), min(BN, N - n)
        read += (rows + columns) * K
        written += rows * columns
        multiplied += BM * BN * K
    return read, written, multiplied


def test_tiles_of_a_product() -> None:
    M, K, N = 300, 24, 200
    read, written, _ = traffic_of_tiles(M, K, N, 128, 128)
    cost = linear_cost(M, K, N, 2)
    assert cost.tile_bytes == 2 * (read + written)
    assert cost.bytes == 2 * (M * K + K * N + M * N)
    assert cost.matrix_flops == 2 * M * K * N
    backward = linear_cost(M, K, N, 2, backward=True)
    assert (backward.matrix_flops, backward.launches) == (2 * cost.matrix_flops, 2)


def test_tiles_of_the_logits() -> None:
    R, C, V = 300, 64, 1000
    config = tables.tiles("lse_tiles", "sm_80", 2)
    read, _, multiplied = traffic_of_tiles(R, C, V, config["BM"], config["BN"])
    tiles = -(-V // config["BN"])
    cost = linear_cross_entropy_cost(R, C, V, 2)
    assert cost.matrix_flops == 2 * multiplied
    assert cost.tile_bytes - cost.bytes == 2 * read + tiles * R * 8 - 2 * (R + V) * C - R * 8


def test_scores_of_attention() -> None:
    """A loop over pairs of tiles, plainly causal."""
    T, H, D, BM, BN = 256, 3, 64, 64, 32
    scores = read = products = 0
    for query, key in itertools.product(range(0, T, BM), range(0, T, BN)):
        if key < query + BM:
            scores += BM * BN
            read += 2 * BN * D
            products += 2 * BM * BN * D
    cost = attention_cost(scores, T, T, H, D, 2)
    assert cost.matrix_flops == 2 * products * H
    n = T * H * D * 2
    assert cost.bytes == 4 * n + T * H * 4 + T * 4
    visible_until = scores // BM * H * 4
    assert cost.tile_bytes == 2 * n + T * H * 4 + read * H * 2 + visible_until
    backward = attention_cost(scores, T, T, H, D, 2, backward=True)
    assert backward.matrix_flops == 7 * products * H
    assert backward.launches == 2
    with_slots = attention_cost(scores, T, T, H, D, 2, backward=True, slots=3)
    assert with_slots.launches == 3
    assert with_slots.bytes - backward.bytes == 2 * (3 * 64 * H * 2 * D * 4)


def test_linear_cross_entropy_has_the_known_closed_forms() -> None:
    R, C, V = 512, 1024, 50304  # whole tiles, and one chunk
    forward, backward = (linear_cross_entropy_cost(R, C, V, 2, backward=b) for b in (False, True))
    assert forward.matrix_flops == 2 * R * V * C
    assert backward.matrix_flops == 6 * R * V * C
    assert liger_linear_cross_entropy_cost(R, R, C, V, 2).matrix_flops == 6 * R * V * C
    assert liger_linear_cross_entropy_cost(R, R, C, V, 2, backward=False).matrix_flops == 2 * R * V * C
    assert linear_cross_entropy_cost(0, C, V, 2) == Cost()


def test_liger_by_its_chunks() -> None:
    """A loop over chunks and rows, as its code does it."""
    rows, valid, C, V = 700, 200, 64, 1000
    factor = -(-V // C)
    chunk = 1
    while chunk < -(-rows // factor):
        chunk *= 2
    moved = flops = chunks = 0
    for first in range(0, rows, chunk):
        n = min(chunk, rows - first)
        chunks += 1
        moved += n * C + V * C + n * V  # logits
        for row in range(first, first + n):
            moved += 3 * V if row < valid else V
        moved += n * V + V * C + n * C  # the input's gradient
        moved += n * V + n * C + 2 * V * C  # the weight's
        flops += 3 * 2 * n * V * C
    zeros = rows * C + V * C
    small = rows * 8 + rows + rows + 8 + rows * 4 + rows * 8 + valid * 4 + rows * 4 + 4
    cost = liger_linear_cross_entropy_cost(rows, valid, C, V, 2)
    assert cost.matrix_flops == flops
    assert cost.bytes == 2 * (moved + zeros) + small
    assert cost.launches == 4 * chunks + 6


def test_adamw_moves_28_bytes_a_parameter() -> None:
    assert adamw_cost(1000).bytes == 28_000
    assert adamw_cost(1000, gradient=2, shadow=2).bytes == 28_000
    assert adamw_cost(1000, clipped=True).launches == 2


def test_costs_add_up() -> None:
    a, b = Cost(1, 2, 3, 4, 5), Cost(10, 20, 30, 40, 50)
    assert a + b == Cost(11, 22, 33, 44, 55)
    assert 3 * a == a * 3 == a + a + a == total([a, a, a])
    assert total([]) == Cost()
    both = layer_norm_cost(64, 32, 2, stream=4) + layer_norm_cost(192, 32, 2, stream=4)
    at_once = layer_norm_cost(256, 32, 2, stream=4)
    assert both.other_flops == at_once.other_flops
    assert both.tile_bytes == at_once.tile_bytes
    assert both.bytes - at_once.bytes == 2 * 32 * 4  # the weights a second time


def test_compulsory_traffic_is_the_least() -> None:
    costs = [
        linear_cost(300, 64, 200, 2, backward=b, bias=True) for b in (False, True)
    ] + [
        linear_cross_entropy_cost(300, 64, 1000, 2, T=500, backward=b) for b in (False, True)
    ] + [
        layer_norm_cost(300, 64, 2, stream=4, backward=b) for b in (False, True)
    ] + [
        gelu_cost(300, 64, 2, backward=b) for b in (False, True)
    ] + [liger_linear_cross_entropy_cost(300, 100, 64, 1000, 2)]  # fmt: skip
    for cost in costs:
        assert 0 < cost.bytes <= cost.tile_bytes
        assert cost.other_flops > 0


@pytest.mark.parametrize(
    ("device", "card"),
    [("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H200", "H200"), ("NVIDIA L40S", "L40S"), ("NVIDIA L4", "L4")],
)
def test_a_card_is_known_by_its_name(device: str, card: str) -> None:
    assert card_named(device) is CARDS[card]


@pytest.mark.parametrize(
    "device", ["NVIDIA L40", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-40GB", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", ""]
)
def test_a_card_of_other_rates_is_not_taken_for_it(device: str) -> None:
    assert card_named(device) is None


def test_seconds_are_those_of_the_scarcest() -> None:
    card = CARDS["A100"]
    assert predicted_seconds(Cost(bytes=2039 * 10**9), card) == pytest.approx(1)
    assert predicted_seconds(Cost(matrix_flops=312 * 10**12), card) == pytest.approx(1)
    assert predicted_seconds(Cost(2039 * 10**9, 624 * 10**12), card, efficiency=0.5) == pytest.approx(4)
    assert predicted_seconds(Cost(launches=1000), card, launch_seconds=5e-6) == pytest.approx(5e-3)
    assert predicted_seconds(Cost(bytes=1, tile_bytes=2039 * 10**9), card, tiles=True) == pytest.approx(1)
    for efficiency in (0, 1.5, -1):
        with pytest.raises(ValueError, match="efficiency"):
            predicted_seconds(Cost(), card, efficiency=efficiency)


def test_half_of_liger_over_the_padded_batch() -> None:
    """64 examples of about 65 tokens, about 27 in 100 of which are supervised, padded to the longest."""
    random = torch.Generator().manual_seed(0)
    lengths = (65 + 15 * torch.randn(64, generator=random)).round().clamp(35, 120).int()
    rows = 64 * int(lengths.max())
    supervised = int((0.27 * lengths).round().sum())
    tokens = int(lengths.sum())
    for C in (768, 1024, 1280, 1600):
        ours = total([linear_cross_entropy_cost(supervised, C, 50257, 2, T=tokens, backward=b) for b in (False, True)])
        theirs = liger_linear_cross_entropy_cost(rows, supervised, C, 50257, 2)
        assert ours.matrix_flops <= 0.5 * theirs.matrix_flops
        assert ours.bytes <= 0.5 * theirs.bytes
        assert ours.tile_bytes <= 0.5 * theirs.tile_bytes

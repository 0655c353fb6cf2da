"""A cost model: what each operation moves and computes, counted from its shapes and tiles, and the time that a card's
peak rates PREDICT for it. Nothing here is measured.

Two counts of memory traffic are kept apart, as the truth lies between them:

- `bytes`, the compulsory traffic: each launch reads each of its operands from memory once, and writes each of its
  results once. Nothing stays in a cache from one launch to the next, everything does within a launch.
- `tile_bytes`: each program reads all that it works on from memory, and no cache serves two programs. A matrix product
  `[M, K] @ [K, N]` in tiles of BM x BN then reads its first operand N / BN times and its second one M / BM times.

Matrix products of the Triton kernels are counted by whole tiles, as they are computed: rows and columns beyond the edge
included. Those of torch (cuBLAS) are counted without, as its tiles are not known; for `tile_bytes` they are taken to be
128 x 128. A multiplication and an addition are two operations. Conversions, comparisons and index arithmetic are none.

Letters: T tokens, R loss rows, C and F widths, V vocab, H heads, D head dim; `element` is the bytes of an element.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastft_kernels import tables
from fastft_kernels.sums import rows_of_programs

FLOAT32 = 4
INT32, INT64 = 4, 8
ARCH = "sm_80"
"""The architecture whose tiles are counted where none is given."""
CUBLAS_TILE = (128, 128)
"""The tile that torch's matrix products are taken to have, for `tile_bytes` alone."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What some work needs; costs add up, and are multiplied by how often the work is done.

    Attributes:
        bytes: compulsory traffic from and to memory.
        matrix_flops: operations of matrix products.
        other_flops: all other floating-point operations.
        launches: kernels launched.
        tile_bytes: traffic where no cache serves two programs.
    """

    bytes: int = 0
    matrix_flops: int = 0
    other_flops: int = 0
    launches: int = 0
    tile_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.bytes + other.bytes,
            self.matrix_flops + other.matrix_flops,
            self.other_flops + other.other_flops,
            self.launches + other.launches,
            self.tile_bytes + other.tile_bytes,
        )

    def __mul__(self, times: int) -> Cost:
        return Cost(
            self.bytes * times,
            self.matrix_flops * times,
            self.other_flops * times,
            self.launches * times,
            self.tile_bytes * times,
        )

    __rmul__ = __mul__


def total(costs: list[Cost]) -> Cost:
    """The sum of costs."""
    return sum(costs, Cost())


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU's peak rates, from its maker's data sheet; no work reaches them.

    Attributes:
        name: as its maker calls it.
        device: as its driver, and so torch, names it.
        bandwidth: of its memory, bytes a second.
        matrix_flops: of dense bf16 and fp16 products on tensor cores, operations a second.
        other_flops: of float32 outside tensor cores.
    """

    name: str
    device: str
    bandwidth: float
    matrix_flops: float
    other_flops: float


CARDS = {
    # NVIDIA A100 Tensor Core GPU datasheet (2021), column "A100 80GB SXM": 312 TFLOPS bf16, 19.5 TFLOPS FP32,
    # 2,039 GB/s
    "A100": Card("A100 80GB SXM", "NVIDIA A100-SXM4-80GB", 2039e9, 312e12, 19.5e12),
    # NVIDIA H100 Tensor Core GPU datasheet (2023), column "H100 SXM": 1,979 TFLOPS bf16 "with sparsity", so 989 dense;
    # 67 TFLOPS FP32; 3.35 TB/s
    "H100": Card("H100 SXM", "NVIDIA H100 80GB HBM3", 3350e9, 989e12, 67e12),
    # NVIDIA H200 Tensor Core GPU datasheet (2024), column "H200 SXM": 1,979 TFLOPS bf16 "with sparsity", so 989 dense;
    # 67 TFLOPS FP32; 4.8 TB/s
    "H200": Card("H200 SXM", "NVIDIA H200", 4800e9, 989e12, 67e12),
    # NVIDIA Blackwell Architecture Technical Brief (2024), HGX B200: 4.5 PFLOPS bf16 "with sparsity" a GPU, so 2.25
    # dense; 80 TFLOPS FP32; 8 TB/s
    "B200": Card("B200 SXM", "NVIDIA B200", 8000e9, 2250e12, 80e12),
    # NVIDIA L40S datasheet (2023): 362.05 TFLOPS bf16 (733 "with sparsity"); 91.6 TFLOPS FP32; 864 GB/s
    "L40S": Card("L40S", "NVIDIA L40S", 864e9, 362.05e12, 91.6e12),
    # NVIDIA L4 Tensor Core GPU datasheet (2023): 242 TFLOPS bf16 "with sparsity", so 121 dense; 30.3 TFLOPS FP32;
    # 300 GB/s
    "L4": Card("L4", "NVIDIA L4", 300e9, 121e12, 30.3e12),
}
"""Cards that times are predicted for."""


def card_named(device: str) -> Card | None:
    """The card that torch names so (`torch.cuda.get_device_name`); None where its rates are not known here: other forms
    of a card (PCIe, NVL, 40 GB) have other rates, and a part of one (MIG) has a part of them."""
    return next((card for card in CARDS.values() if card.device == device), None)


def predicted_seconds(
    cost: Cost, card: Card, *, efficiency: float = 1.0, tiles: bool = False, launch_seconds: float = 0.0
) -> float:
    """The time that a card is PREDICTED to need, never measured: the largest of what memory, tensor cores and other
    arithmetic need, as they work side by side.

    It is for 16-bit matrix products. For several kernels in a row, add up the predictions of each: the prediction of
    their sum takes memory and arithmetic of different kernels to overlap, and is a lower bound.

    Args:
        cost: of the work.
        card: one of `CARDS`, or another one.
        efficiency: the part of the peak rates that is reached, above 0 and at most 1.
        tiles: count `tile_bytes` in place of `bytes`.
        launch_seconds: added for each launch; 0 where the launches are hidden behind the work, as in a CUDA graph.

    Raises:
        ValueError: an efficiency that is none.
    """
    if not 0 < efficiency <= 1:
        raise ValueError(f"got efficiency={efficiency}, expected more than 0 and at most 1")
    moving = (cost.tile_bytes if tiles else cost.bytes) / card.bandwidth
    computing = max(cost.matrix_flops / card.matrix_flops, cost.other_flops / card.other_flops)
    return max(moving, computing) / efficiency + cost.launches * launch_seconds


def moved(*numbers_of_bytes: int, flops: int = 0, launches: int = 1) -> Cost:
    """The cost of going through tensors once: copies, sums, gathers, each given by its bytes."""
    moving = sum(numbers_of_bytes)
    return Cost(moving, 0, flops, launches, moving)


def _tiles(size: int, tile: int) -> int:
    return -(-size // tile)


def _product(
    M: int, K: int, N: int, element: int, out_element: int, *, adds: bool = False, tile: tuple[int, int] = CUBLAS_TILE
) -> Cost:
    """`[M, K] @ [K, N]` by torch, into a new tensor or, with `adds`, onto one that is there."""
    result = M * N * out_element * (2 if adds else 1)
    reads = (_tiles(N, tile[1]) * M + _tiles(M, tile[0]) * N) * K * element
    return Cost((M + N) * K * element + result, 2 * M * K * N, 0, 1, reads + result)


def linear_cost(
    rows: int, C: int, F: int, element: int, *, backward: bool = False, bias: bool = False, weight_element: int = 0
) -> Cost:
    """A linear layer, `[rows, C] -> [rows, F]`, by torch's products.

    Args:
        rows, C, F: its shapes.
        element: of activations, and of the weights that the product reads.
        backward: its backward pass, two products, in place of the forward one.
        bias: add one in the forward product; in the backward pass sum its gradient over the rows.
        weight_element: of the weight's gradient; `element` where it is 0.
    """
    if not backward:
        added = F * element if bias else 0
        return _product(rows, C, F, element, element) + Cost(added, 0, rows * F if bias else 0, 0, added)
    of_input = _product(rows, F, C, element, element)
    of_weight = _product(F, rows, C, element, weight_element or element)
    of_bias = moved(rows * F * element, F * element, flops=rows * F) if bias else Cost()
    return of_input + of_weight + of_bias


def _sum_rows(P: int, C: int, out_element: int) -> Cost:
    return moved(P * C * FLOAT32, C * out_element, flops=P * C)


_LN_FORWARD, _LN_BACKWARD = 7, 14
"""Operations an element: centre, two sums, square, scale by three; and what the gradient's formula has."""


def layer_norm_cost(
    rows: int,
    C: int,
    element: int,
    *,
    stream: int = 0,
    out: int = 0,
    weight: int = FLOAT32,
    backward: bool = False,
    stream_gradient: bool = True,
    arch: str = ARCH,
) -> Cost:
    """`layer_norm` of x `[rows, C]`, one launch forward and two backward.

    Args:
        rows, C: shape of x.
        element: of x.
        stream: element of the residual that is added, and of the sum; 0 for none.
        out: element of y; that of x where it is 0.
        weight: element of weight and bias, and of their gradients.
        backward: the backward pass, in place of forward.
        stream_gradient: whether a gradient of the sum flows in besides y's, as it does inside a model.
        arch: whose tiles.
    """
    n, out = rows * C, out or element
    of_sum, statistics = stream or element, 2 * rows * FLOAT32
    if not backward:
        traffic = n * (element + out + 2 * stream) + statistics
        flops = n * (_LN_FORWARD + (1 if stream else 0))
        return Cost(traffic + 2 * C * weight, 0, flops, 1, traffic + rows * 2 * C * weight)
    programs, _ = rows_of_programs(
        rows, tables.tiles("layer_norm_backward", arch, 1 << (C - 1).bit_length())["programs"]
    )
    flowing = of_sum if stream and stream_gradient else 0
    written = of_sum + (element if element != of_sum else 0)
    traffic = n * (out + flowing + of_sum + written) + statistics + programs * 2 * C * FLOAT32
    flops = n * (_LN_BACKWARD + (1 if flowing else 0))
    gradients = Cost(traffic + C * weight, 0, flops, 1, traffic + programs * C * weight)
    return gradients + _sum_rows(programs, 2 * C, weight)


def rows_cost(
    R: int,
    C: int,
    element: int,
    *,
    out: int = 0,
    N: int = 0,
    segments: int = 0,
    chunks: int = 0,
    backward: bool = False,
) -> Cost:
    """`take_rows`: forward torch's index_select, and a cast where the result has another dtype; backward the zeros, and
    one launch of sums, two with chunks.

    Args:
        R, C: shape of the result.
        element: of x and of its gradient.
        out: of the result and of what flows in; `element` where it is 0.
        N: rows of x, for the backward pass; with 0 it is that of `add_rows_`, which adds to what is there.
        segments: of the plan; R where it is 0, as if no row was taken twice.
        chunks: of the plan, `len(plan.whole)`; all of them are counted, which is most where not all are of one row.
        backward: the gradient, in place of the rows.
    """
    out, segments = out or element, segments or R
    if not backward:
        gathered = moved(2 * R * C * element, R * INT64)
        return gathered + (moved(R * C * (element + out)) if out != element else Cost())
    dy, partial = R * C * out, chunks * C * FLOAT32
    plan = (R + 2 * segments + 1) * INT32
    written = segments * C * element * (1 if N else 2)
    sums = moved(dy, plan, written, partial, flops=R * C)
    of_chunks = moved(dy, (R + chunks) * INT32, partial) if chunks else Cost()
    return (moved(N * C * element) if N else Cost()) + of_chunks + sums


_GELU_FORWARD, _GELU_BACKWARD = 12, 23
"""Operations an element, an exponential or a division counted as one."""


def gelu_cost(
    rows: int, F: int, element: int, *, bias: int = FLOAT32, backward: bool = False, arch: str = ARCH
) -> Cost:
    """`gelu` of x `[rows, F]`, one launch forward and two backward (one without a bias).

    Args:
        rows, F: shape of x.
        element: of x and y.
        bias: element of the bias and its gradient; 0 for none.
        backward: the backward pass, in place of forward.
        arch: whose tiles.
    """
    n = rows * F
    config = tables.tiles("gelu_backward" if backward else "gelu_forward", arch)
    row_tiles = _tiles(rows, config["BN"])
    if not backward:
        flops = n * (_GELU_FORWARD + (1 if bias else 0))
        return Cost(2 * n * element + F * bias, 0, flops, 1, 2 * n * element + row_tiles * F * bias)
    programs, _ = rows_of_programs(row_tiles, config["programs"])
    traffic = 3 * n * element + (programs * F * FLOAT32 if bias else 0)
    flops = n * (_GELU_BACKWARD + (1 if bias else 0))
    gradients = Cost(traffic + F * bias, 0, flops, 1, traffic + programs * F * bias)
    return gradients + (_sum_rows(programs, F, bias) if bias else Cost())


def cross_entropy_cost(rows: int, valid: int, V: int, element: int, *, backward: bool = False) -> Cost:
    """`cross_entropy` of logits `[rows, V]`: the loss of each row, or the gradient of the logits
    (two launches).

    Args:
        rows, V: shape of the logits.
        valid: rows that are not ignored; the logits of no other are read.
        element: of the logits.
        backward: the backward pass, in place of forward.
    """
    looked_at = rows * INT64
    if not backward:
        traffic = looked_at + valid * V * element + 2 * rows * FLOAT32
        return Cost(traffic, 0, 7 * valid * V, 1, traffic)
    width = _tiles(V, 64) * 64  # rows of the gradient begin at whole 128 bytes
    traffic = looked_at + valid * (V * element + 2 * FLOAT32) + rows * width * element
    zeros = moved(rows * FLOAT32)  # that autograd makes for the log-sum-exps
    return Cost(traffic, 0, 4 * valid * V, 1, traffic) + zeros


def linear_cross_entropy_cost(
    R: int,
    C: int,
    V: int,
    element: int,
    *,
    T: int | None = None,
    backward: bool = False,
    chunk_bytes: int = 64 << 20,
    arch: str = ARCH,
) -> Cost:
    """`linear_cross_entropy` with `rows`, by its Triton kernels and torch's products.

    Forward, one product whose result stays on the chip: 2 R V C. Backward, the same again, whose result is the logits'
    gradient, some columns of the vocabulary at a time, and two products with it: 6 R V C.

    Args:
        R, C, V: loss rows, width, vocab.
        element: of hidden states and head.
        T: tokens that the rows are picked from, one launch, and two backward; None where they are there already.
        backward: the backward pass, in place of forward.
        chunk_bytes: as given to the operation.
        arch: whose tiles.
    """
    if not R:
        return Cost()
    return (
        _lce_backward(R, C, V, element, T, chunk_bytes, arch) if backward else _lce_forward(R, C, V, element, T, arch)
    )


def _logit_tiles(R: int, C: int, columns: int, there: int, element: int, config: tables.Config) -> Cost:
    """What the kernels that compute a block of logits read and multiply, without their results: `columns` of them, of
    which `there` are in the vocabulary."""
    down, across = _tiles(R, config["BM"]), _tiles(columns, config["BN"])
    flops = 2 * down * config["BM"] * across * config["BN"] * C
    return Cost((R + there) * C * element, flops, 0, 1, (across * R + down * there) * C * element)


def _lce_forward(R: int, C: int, V: int, element: int, T: int | None, arch: str) -> Cost:
    config = tables.tiles("lse_tiles", arch, element)
    tiles = _tiles(V, config["BN"])
    written = (2 * tiles + 1) * R * FLOAT32
    logits = _logit_tiles(R, C, V, V, element, config)
    logits += Cost(R * INT64 + written, 0, 5 * R * V, 0, tiles * R * INT64 + written)
    combined = moved(written, R * INT64, 2 * R * FLOAT32, flops=6 * tiles * R)
    weighted = moved(3 * R * FLOAT32, flops=R) + moved(R * FLOAT32, FLOAT32, flops=R)
    picked = Cost() if T is None else rows_cost(R, C, element)
    return picked + logits + combined + weighted


def _lce_backward(R: int, C: int, V: int, element: int, T: int | None, chunk_bytes: int, arch: str) -> Cost:
    config = tables.tiles("logit_gradient", arch, element)
    n, most = _tiles(V, config["BN"]), max(1, chunk_bytes // (R * element * config["BN"]))
    width = config["BN"] * _tiles(n, _tiles(n, most))
    # What flows into each row's loss: its weight times the scalar's gradient. Autograd makes zeros for `lse`.
    cost = moved((2 * R + 1) * FLOAT32, flops=R) + moved(R * FLOAT32)
    wide_sum = width < V and element != FLOAT32  # of the chunks' parts of the hidden states' gradient
    for first in range(0, V, width):
        columns = min(width, V - first)
        gradient, across = R * width * element, width // config["BN"]
        of_rows = R * (INT64 + 2 * FLOAT32)
        cost += _logit_tiles(R, C, width, columns, element, config)
        cost += Cost(of_rows + gradient, 0, 4 * R * width, 0, across * of_rows + gradient)
        cost += _product(R, columns, C, element, element, adds=first > 0 and not wide_sum)
        if wide_sum:
            cost += moved(R * C * (element + FLOAT32 + (FLOAT32 if first else 0)), flops=R * C if first else 0)
        cost += _product(columns, R, C, element, element)
    if wide_sum:
        cost += moved(R * C * (FLOAT32 + element))
    if T is not None:
        cost += rows_cost(R, C, element, N=T, backward=True)
    return cost


def liger_linear_cross_entropy_cost(
    rows: int, valid: int, C: int, V: int, element: int, *, accumulator: int = 0, backward: bool = True
) -> Cost:
    """Liger-Kernel's fused linear cross-entropy, forward and backward in one, over `rows` of a padded batch.

    Counted from what it publishes (github.com/linkedin/Liger-Kernel, src/liger_kernel/ops/fused_linear_cross_entropy.py
    and cross_entropy.py): rows in chunks of `next_power_of_2(ceil(rows / ceil(V / C)))`; a chunk's logits, of all its
    rows, in the dtype of the input; one kernel a row that reads them twice and writes the gradient over them, or only
    zeros where the row is ignored; one product for the input's gradient; one that adds onto the weight's. Tensors that
    it adds onto begin as zeros. Where the two counts could differ, the smaller one is taken: no tile beyond an edge, no
    temporary of the weight's size, no second scaling of the gradients.

    Args:
        rows: of the padded batch, ignored ones included: all are computed.
        valid: rows that are not ignored.
        C, V: width and vocab.
        element: of input and weight.
        accumulator: of the weight's gradient; `element` where it is 0, which is Liger's default.
        backward: with gradients; without them, as in evaluation, the logits are read once, and only zeros written.
    """
    if not rows:
        return Cost()
    chunk = min(rows, 1 << (_tiles(rows, _tiles(V, C)) - 1).bit_length())
    accumulator = accumulator or element
    logits = V * element
    cost = (
        moved(rows * INT64, rows) + moved(rows, INT64) + moved(rows * FLOAT32) + moved(rows * C * element)
    )  # mask, zeros
    if backward:
        cost += moved(V * C * accumulator)
    for first in range(0, rows, chunk):
        n = min(chunk, rows - first)
        cost += _product(n, C, V, element, element) + Cost(launches=1)
        if backward:
            cost += _product(n, V, C, element, element) + _product(V, n, C, element, accumulator, adds=True)
    per_valid = logits * (3 if backward else 1) + FLOAT32
    per_ignored = logits
    in_place = rows * INT64 + valid * per_valid + (rows - valid) * per_ignored
    cost += Cost(in_place, 0, valid * V * (11 if backward else 5), 0, in_place)
    return cost + moved(rows * FLOAT32, FLOAT32, flops=rows)


def attention_cost(
    scores: int,
    T: int,
    R: int,
    H: int,
    D: int,
    element: int,
    *,
    backward: bool = False,
    scores_dkv: int | None = None,
    tiles: tuple[int, int, int, int] = (64, 32, 32, 64),
    slots: int = 0,
) -> Cost:
    """`attention` of R queries over T keys, from the scores that its tiles compute (`AttentionPlan` counts them).

    Forward: two products a score. Backward: dQ computes the scores again and has three products, dK and dV four.

    Args:
        scores: entries of the score matrix that forward, and dQ, compute for one head, tiles and all.
        T, R, H, D: keys, queries, heads, head dim.
        element: of q, k, v and the output.
        backward: the backward pass, in place of forward.
        scores_dkv: the same for dK and dV; `scores` where it is not given.
        tiles: BM, BN (forward and dQ), BQ, BK (dK and dV).
        slots: partial sums of dK and dV, float32, that a further launch adds up.
    """
    BM, BN, BQ, BK = tiles
    q, kv, lse = R * H * D * element, 2 * T * H * D * element, R * H * FLOAT32
    pairs = scores // (BM * BN)
    read_kv = pairs * BN * H * (2 * D * element + FLOAT32)  # of each pair of tiles: keys, values, visible_until
    if not backward:
        flops = scores * H * 4 * D
        results = q + lse
        return Cost(q + kv + T * FLOAT32 + results, flops, 5 * scores * H, 1, q + read_kv + results)
    # dQ: reads q, o, do, lse; writes dq and delta, the sum of o * do
    own = 4 * q + 2 * lse
    of_queries = Cost(own + kv + T * FLOAT32, scores * H * 6 * D, H * (5 * scores + 2 * R * D), 1, own + read_kv)
    scores_dkv = scores if scores_dkv is None else scores_dkv
    return of_queries + _keys_cost(scores_dkv, T, R, H, D, element, BQ, BK, slots)


def _keys_cost(scores: int, T: int, R: int, H: int, D: int, element: int, BQ: int, BK: int, slots: int) -> Cost:
    """Of the launch for dK and dV, and of the one that adds up its partial sums, where there are some."""
    q, kv, lse = R * H * D * element, 2 * T * H * D * element, R * H * FLOAT32
    pairs = scores // (BQ * BK)
    read_q = pairs * BQ * H * (2 * D * element + 2 * FLOAT32)
    partial = slots * BK * H * 2 * D * FLOAT32
    results = kv + partial
    of_keys = Cost(
        2 * q + 2 * lse + kv + T * FLOAT32 + results,
        scores * H * 8 * D,
        5 * scores * H,
        1,
        read_q + kv + T * FLOAT32 + results,
    )
    added = moved(partial, flops=partial // FLOAT32) if slots else Cost()
    return of_keys + added


def adamw_cost(
    parameters: int, *, gradient: int = FLOAT32, shadow: int = 0, launches: int = 1, clipped: bool = False
) -> Cost:
    """AdamW over float32 parameters and moments: read with the gradient, and written, once.

    Args:
        parameters: their number.
        gradient: its element.
        shadow: element of a narrow copy that is written too; 0 for none.
        launches: 1 over one flat buffer; torch's fused optimizer needs a few.
        clipped: the gradient's norm is computed first, in one more pass over it.
    """
    traffic = parameters * (6 * FLOAT32 + gradient + shadow)
    cost = Cost(traffic, 0, 14 * parameters, launches, traffic)
    return cost + (moved(parameters * gradient, FLOAT32, flops=2 * parameters) if clipped else Cost())

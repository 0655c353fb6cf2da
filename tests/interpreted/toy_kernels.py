"""Small kernels, right and wrong, that the tests of the tests run."""

from fastft_kernels.support import tl, triton


@triton.jit
def scale(X, Y, n, BS: tl.constexpr):
    o = tl.program_id(0) * BS + tl.arange(0, BS)
    x = tl.load(X + o, mask=o < n, other=0.0)
    tl.store(Y + o, x * 2.0, mask=o < n)


@triton.jit
def read_too_far(X, Y, n, BS: tl.constexpr):
    o = tl.program_id(0) * BS + tl.arange(0, BS)
    tl.store(Y + o, tl.load(X + o), mask=o < n)


@triton.jit
def write_too_far(X, Y, n, BS: tl.constexpr):
    o = tl.program_id(0) * BS + tl.arange(0, BS)
    tl.store(Y + o, tl.load(X + o, mask=o < n, other=0.0))


@triton.jit
def lost_update(X, Y, n, BS: tl.constexpr):
    o = tl.program_id(0) * BS + tl.arange(0, BS)
    total = tl.sum(tl.load(X + o, mask=o < n, other=0.0), 0)
    tl.store(Y, tl.load(Y) + total)


@triton.jit
def overlapping_stores(X, Y, n, BS: tl.constexpr):
    o = tl.program_id(0) * (BS - 1) + tl.arange(0, BS)
    tl.store(Y + o, tl.load(X + o, mask=o < n, other=0.0), mask=o < n)


@triton.jit
def atomic_sum(X, Y, n, BS: tl.constexpr):
    o = tl.program_id(0) * BS + tl.arange(0, BS)
    tl.atomic_add(Y, tl.sum(tl.load(X + o, mask=o < n, other=0.0), 0))


@triton.jit
def order_of_programs(SEEN, Y, n):
    at = tl.load(SEEN)
    tl.atomic_add(SEEN, 1)
    tl.store(Y + at, tl.program_id(0))


@triton.jit
def bf16_arithmetic(A, B, SUM, PRODUCT, DOT, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    a = tl.load(A + at)
    b = tl.load(B + at)
    tl.store(SUM + at, a + b)
    tl.store(PRODUCT + at, (a.to(tl.float32) * b.to(tl.float32)).to(tl.bfloat16))
    tl.store(DOT + at, tl.dot(a, b))


@triton.jit
def wrong_slot(X, Y, n, BS: tl.constexpr):
    o = tl.program_id(0) * BS + tl.arange(0, BS)
    tl.store(Y + 0 * tl.program_id(0), tl.sum(tl.load(X + o, mask=o < n, other=0.0), 0))


@triton.jit
def twice_in_one_store(X, Y, n, BS: tl.constexpr):
    o = tl.program_id(0) * BS + tl.arange(0, BS)
    tl.store(Y + o // 2 * 2, tl.load(X + o, mask=o < n, other=0.0), mask=o < n)


@triton.jit
def atomic_sum_read_at_once(X, Y, n, BS: tl.constexpr):
    o = tl.program_id(0) * BS + tl.arange(0, BS)
    tl.atomic_add(Y, tl.sum(tl.load(X + o, mask=o < n, other=0.0), 0))
    tl.store(Y + 1 + tl.program_id(0), tl.load(Y))


@triton.jit
def doubled(x):
    return x * 2.0


@triton.jit
def scale_by_helper(X, Y, n, BS: tl.constexpr):
    o = tl.program_id(0) * BS + tl.arange(0, BS)
    x = tl.load(X + o, mask=o < n, other=0.0)
    tl.store(Y + o, doubled(x), mask=o < n)


@triton.jit
def scale_column(X, Y, n, stride, BS: tl.constexpr):
    o = tl.program_id(0) * BS + tl.arange(0, BS)
    x = tl.load(X + o * stride, mask=o < n, other=0.0)
    tl.store(Y + o * stride, x * 2.0, mask=o < n)


@triton.jit
def bf16_sum(X, Y, N: tl.constexpr):
    tl.store(Y, tl.sum(tl.load(X + tl.arange(0, N)), 0))


@triton.jit
def bf16_fma(X, Y, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X + i)
    tl.store(Y + i, tl.fma(x, x, x))


@triton.jit
def bf16_scalars(X, Y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(Y + i, tl.load(X + i) * 2.5 + tl.cast(i, tl.bfloat16))

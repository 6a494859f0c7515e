"""Kernels of a few lines with known outputs: what the emulator is proven on."""

import triton
import triton.language as tl


@triton.jit
def product(
    p_a,
    p_b,
    p_c,
    M,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TRANSPOSED_A: tl.constexpr,
    TRANSPOSED_B: tl.constexpr,
    PRECISION: tl.constexpr,
):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    b_c = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        at_a = k[None, :] * M + m[:, None] if TRANSPOSED_A else m[:, None] * K + k[None, :]
        at_b = n[None, :] * K + k[:, None] if TRANSPOSED_B else k[:, None] * N + n[None, :]
        b_a = tl.load(p_a + at_a, mask=(m[:, None] < M) & (k[None, :] < K), other=0.0)
        b_b = tl.load(p_b + at_b, mask=(n[None, :] < N) & (k[:, None] < K), other=0.0)
        b_c = tl.dot(b_a, b_b, b_c, input_precision=PRECISION)
    tl.store(p_c + m[:, None] * N + n[None, :], b_c, mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def softmax(p_x, p_y, N, B: tl.constexpr):
    row, o = tl.program_id(0), tl.arange(0, B)
    b_x = tl.load(p_x + row * N + o, mask=o < N, other=-float("inf"))
    b_x = tl.exp(b_x - tl.max(b_x, 0))
    tl.store(p_y + row * N + o, b_x / tl.sum(b_x, 0), mask=o < N)


@triton.jit
def transpose(p_x, p_y, M, N, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    j = tl.program_id(1) * B + tl.arange(0, B)
    m = (i[:, None] < M) & (j[None, :] < N)
    b_x = tl.load(p_x + i[:, None] * N + j[None, :], mask=m)
    tl.store(p_y + j[:, None] * M + i[None, :], tl.trans(b_x), mask=tl.trans(m))


@triton.jit
def scan(p_x, p_y, p_sum, B: tl.constexpr):
    """Running sums down the columns, and the rows' sums of squares."""
    o = tl.arange(0, B)
    at = o[:, None] * B + o[None, :]
    b_x = tl.load(p_x + at)
    tl.store(p_y + at, tl.cumsum(b_x, 0))
    tl.store(p_sum + o, tl.sum(b_x * b_x, 1))


@triton.jit
def reverse(p_x, p_y, B: tl.constexpr, BARRIER: tl.constexpr):
    """Through global memory: without the barrier, a race between the warps."""
    o = tl.arange(0, B)
    tl.store(p_x + o, o.to(tl.float32))
    if BARRIER:
        tl.debug_barrier()
    tl.store(p_y + o, tl.load(p_x + B - 1 - o))


@triton.jit
def overlap(p_x, B: tl.constexpr):
    """Programs whose stores meet in one element, with values of their own."""
    i = tl.program_id(0)
    tl.store(p_x + i * (B - 1) + tl.arange(0, B), i.to(tl.float32))


@triton.jit
def copy(p_x, p_y, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(p_y + o, tl.load(p_x + o))


@triton.jit
def nested(b, p_y, B: tl.constexpr):
    """Arguments in tuples, as the package's records are: (x, factor, (x', none, 1))."""
    o = tl.arange(0, B)
    tl.store(p_y + o, tl.load(b[0] + o) * b[1] + tl.load(b[2][0] + o) + b[2][2])

"""A product of matrices, to try the support itself on."""

import torch
import triton
import triton.language as tl


@triton.jit
def matmul_kernel(
    p_a,
    p_b,
    p_o,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """o [BM, BN] = a [BM, K] b [K, BN] in one program; K is a multiple of BK."""
    o_m = tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    ACC: tl.constexpr = tl.float64 if p_a.dtype.element_ty == tl.float64 else tl.float32
    b_o = tl.zeros([BM, BN], ACC)
    for k in range(0, K, BK):
        b_a = tl.load(p_a + o_m[:, None] * K + (k + o_k)[None, :])  # [BM, BK]
        b_b = tl.load(p_b + (k + o_k)[:, None] * BN + o_n[None, :])  # [BK, BN]
        b_o = tl.dot(b_a, b_b, b_o, input_precision=PRECISION, out_dtype=ACC)  # over BK
    tl.store(p_o + o_m[:, None] * BN + o_n[None, :], b_o.to(p_o.dtype.element_ty))


@triton.jit
def two_sums_kernel(p_a, p_b, p_o, n, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """n (2 a + 1) b, from two sums at once: twice the accumulators of a product."""
    o_a = tl.arange(0, BM)[:, None] * BK + tl.arange(0, BK)[None, :]
    o_b = tl.arange(0, BK)[:, None] * BN + tl.arange(0, BN)[None, :]
    o_o = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
    b_a = tl.load(p_a + o_a)  # [BM, BK]
    b_b = tl.load(p_b + o_b)  # [BK, BN]
    b_x = tl.zeros([BM, BN], tl.float32)
    b_y = tl.zeros([BM, BN], tl.float32)
    for _ in range(n):
        b_x = tl.dot(b_a, b_b, b_x)  # over BK
        b_y = tl.dot(b_a + 1.0, b_b, b_y)  # over BK
    tl.store(p_o + o_o, b_x + b_y)


def matmul(a: torch.Tensor, b: torch.Tensor, precision: str = "ieee", **launch) -> torch.Tensor:
    """a b, in the dtype of a."""
    (M, K), N = a.shape, b.shape[1]
    o = a.new_empty(M, N)
    matmul_kernel[(1,)](a, b, o, K, BM=M, BN=N, BK=32, PRECISION=precision, **launch)
    return o


def launch_matmul(dtype: str = "bfloat16", M: int = 64, N: int = 64, offset: int = 0) -> None:
    """For the compiler: contents do not matter, and `offset` elements spoil the alignment."""
    a = torch.zeros(M * 128 + offset, dtype=getattr(torch, dtype))[offset:].view(M, 128)
    matmul(a, a.new_zeros(128, N), num_warps=4, num_stages=2)


def launch_two_sums(M: int, N: int) -> None:
    """For the compiler: at 128 by 256 more than the tensor memory of a B200 holds."""
    a, b = (torch.zeros(*size, dtype=torch.bfloat16) for size in ((M, 64), (64, N)))
    two_sums_kernel[(1,)](a, b, torch.zeros(M, N), 4, BM=M, BN=N, BK=64, num_warps=8)

"""Tiles in and out of memory, and the one product: for all passes.

A matrix in memory has rows of tokens (or of a layer's inputs) `STRIDE` apart. `load` and `store`
take tiles as they lie, [rows, columns]; the `_t` forms take them transposed, [columns, rows].
Whatever is out of range is zero. A mask is None where nothing can be, known when a kernel is
compiled: then no predicate is computed, and no register set to zero. WIDE is how many columns a
thread accesses at once, if it is to be fewer than fit.
"""

import triton
import triton.language as tl


@triton.jit
def load(p, o_r, m_r, o_c, m_c, STRIDE: tl.constexpr, WIDE: tl.constexpr = None):
    p += o_r[:, None] * STRIDE + o_c[None, :]
    if WIDE is not None:
        p = tl.max_contiguous(p, [1, WIDE])
    if m_r is None and m_c is None:
        return tl.load(p)
    else:
        return tl.load(p, mask=inside(m_r, m_c), other=0.0)


@triton.jit
def load_t(p, o_r, m_r, o_c, m_c, STRIDE: tl.constexpr):
    p += o_r[None, :] * STRIDE + o_c[:, None]
    if m_r is None and m_c is None:
        return tl.load(p)
    else:
        return tl.load(p, mask=inside(m_c, m_r), other=0.0)


@triton.jit
def store(p, b, o_r, m_r, o_c, m_c, STRIDE: tl.constexpr):
    p += o_r[:, None] * STRIDE + o_c[None, :]
    b = b.to(p.dtype.element_ty)
    if m_r is None and m_c is None:
        tl.store(p, b)
    else:
        tl.store(p, b, mask=inside(m_r, m_c))


@triton.jit
def store_t(p, b, o_r, m_r, o_c, m_c, STRIDE: tl.constexpr):
    p += o_r[None, :] * STRIDE + o_c[:, None]
    b = b.to(p.dtype.element_ty)
    if m_r is None and m_c is None:
        tl.store(p, b)
    else:
        tl.store(p, b, mask=inside(m_c, m_r))


@triton.jit
def inside(m_r, m_c):
    """Of rows and columns, one of them None where all are in range."""
    if m_r is None:
        return m_c[None, :]
    elif m_c is None:
        return m_r[:, None]
    else:
        return m_r[:, None] & m_c[None, :]


@triton.jit
def dot(b_x, b_y, b_sum, PRECISION: tl.constexpr):
    """b_sum + b_x b_y; without a sum where that is None. float64 is for the interpreter."""
    ACC: tl.constexpr = tl.float64 if b_x.dtype == tl.float64 else tl.float32
    return tl.dot(b_x, b_y, b_sum, input_precision=PRECISION, out_dtype=ACC)

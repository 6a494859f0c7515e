"""Reading without learning: `f(q)` at given weights, parallel over blocks of queries and heads.

Grid: (sequences x blocks, heads).
"""

import triton
import triton.language as tl

from .network import activate, head


@triton.jit(do_not_specialize=["blocks"])
def recall_kernel(
    p_q,  # [M, H, D]
    p_W1,  # [N, H, D, HIDDEN]
    p_W2,  # [N, H, HIDDEN, D]
    p_norm,  # [H, 2, D], float32
    p_o,  # out [M, H, D]
    p_cu,  # [N + 1]
    blocks,  # to a sequence, at most
    hidden,
    H: tl.constexpr,
    D: tl.constexpr,
    HIDDEN: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BH: tl.constexpr,
    DEPTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_n, i_t = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0).to(tl.int64) % blocks
    i_h = tl.program_id(1)
    first, end = tl.load(p_cu + i_n).to(tl.int64) + i_t * BT, tl.load(p_cu + i_n + 1).to(tl.int64)
    if first >= end:
        return
    o_t, o_d, o_h = tl.arange(0, BT), tl.arange(0, BD), tl.arange(0, BH)
    m_d = o_d < D
    o = o_t[None, :] * (H * D) + o_d[:, None]  # [BD, BT]
    m = (first + o_t < end)[None, :] & m_d[:, None]
    OP: tl.constexpr = p_q.dtype.element_ty
    ACC: tl.constexpr = p_norm.dtype.element_ty
    p_q += (first * H + i_h) * D
    p_o += (first * H + i_h) * D
    p_W1 += (i_n * H + i_h) * D * HIDDEN
    p_W2 += (i_n * H + i_h) * D * HIDDEN

    b_y = tl.zeros([BD, BT], ACC)
    if DEPTH == 1:
        for j in tl.range(0, hidden, BH, disable_licm=True):
            m_h = j + o_h < D
            b_q = tl.load(  # [BH, BT]
                p_q + o_t[None, :] * (H * D) + (j + o_h)[:, None],
                mask=(first + o_t < end)[None, :] & m_h[:, None],
                other=0.0,
            )
            o_w = (j + o_h)[None, :] * D + o_d[:, None]
            b_w = tl.load(p_W1 + o_w, mask=m_h[None, :] & m_d[:, None], other=0.0)  # [BD, BH]
            b_y = tl.dot(b_w, b_q, b_y, input_precision=PRECISION, out_dtype=ACC)
    else:
        b_q = tl.load(p_q + o, mask=m, other=0.0)
        for j in tl.range(0, hidden, BH, disable_licm=True):
            m_h = j + o_h < HIDDEN
            o_w = o_d[None, :] * HIDDEN + (j + o_h)[:, None]
            b_w = tl.load(p_W1 + o_w, mask=m_d[None, :] & m_h[:, None], other=0.0)  # [BH, BD]
            b_z = tl.dot(b_w, b_q, input_precision=PRECISION, out_dtype=ACC)
            b_h = activate(b_z, ACTIVATION).to(OP)
            o_w = (j + o_h)[None, :] * D + o_d[:, None]
            b_w = tl.load(p_W2 + o_w, mask=m_h[None, :] & m_d[:, None], other=0.0)  # [BD, BH]
            b_y = tl.dot(b_w, b_h, b_y, input_precision=PRECISION, out_dtype=ACC)

    # The modifier, a load's default, keeps the compiler from holding q in registers all along.
    b_x = tl.load(p_q + o, mask=m, other=0.0, cache_modifier=".ca").to(ACC)
    b_o = head(b_y, b_x, p_norm + i_h * 2 * D, o_d, m_d, D, HAS_NORM, RESIDUAL)
    tl.store(p_o + o, b_o.to(OP), mask=m)

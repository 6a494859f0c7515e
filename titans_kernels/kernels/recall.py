"""Reading without learning: `f(q)` at given weights, parallel over blocks of queries and heads.

Grid: (sequences x blocks, heads).
"""

import triton
import triton.language as tl

from .network import activate, head
from .operands import dot, load_t, store_t


@triton.jit(do_not_specialize=["blocks"])
def recall_kernel(
    p_q,  # [M, H, D]
    weights,  # per layer [N, H, d_in, d_out]
    inputs,  # scratch [M, H, HIDDEN], per layer between two others its inputs
    p_norm,  # [H, 2, D], float32
    p_o,  # out [M, H, D]
    p_cu,  # [N + 1]
    blocks,  # to a sequence, at most
    hidden,
    sizes,  # Sizes
):
    H: tl.constexpr = sizes.H
    D: tl.constexpr = sizes.D
    HIDDEN: tl.constexpr = sizes.HIDDEN
    BH: tl.constexpr = sizes.BH
    LAST: tl.constexpr = sizes.DEPTH - 1
    OP: tl.constexpr = p_q.dtype.element_ty
    ACC: tl.constexpr = p_norm.dtype.element_ty
    i_n, i_t = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0).to(tl.int64) % blocks
    i_h = tl.program_id(1)
    first, end = tl.load(p_cu + i_n).to(tl.int64), tl.load(p_cu + i_n + 1).to(tl.int64)
    first += i_t * sizes.BT
    count = tl.minimum(end - first, sizes.BT).to(tl.int32)
    if count <= 0:
        return
    o_t, o_d, o_h = tl.arange(0, sizes.BT), tl.arange(0, sizes.BD), tl.arange(0, BH)
    m_t, m_d = o_t < count, o_d < D
    i_s, o_x = i_n * H + i_h, (first * H + i_h) * HIDDEN
    p_q += (first * H + i_h) * D
    p_o += (first * H + i_h) * D
    p_W = weights[LAST] + i_s * sizes.WIDTHS[LAST] * D

    b_y = tl.zeros([sizes.BD, sizes.BT], ACC)
    if LAST == 0:
        for j in tl.range(0, hidden, BH, disable_licm=True):
            m_h = None if D % BH == 0 else j + o_h < D
            b_q = load_t(p_q + j, o_t, m_t, o_h, m_h, H * D)  # [BH, BT]
            b_w = load_t(p_W, j + o_h, m_h, o_d, m_d, D)  # [BD, BH]
            b_y = dot(b_w, b_q, b_y, sizes.PRECISION)
    else:
        b_q = load_t(p_q, o_t, m_t, o_d, m_d, H * D)  # [BD, BT]
        for i_l in tl.static_range(LAST):
            p_w = weights[i_l] + i_s * sizes.WIDTHS[i_l] * HIDDEN
            if i_l > 0:  # reads what the layer below stored
                tl.debug_barrier()
            for j in tl.range(0, hidden, BH, disable_licm=True):
                m_h = None if HIDDEN % BH == 0 else j + o_h < HIDDEN
                if i_l == 0:
                    b_w = load_t(p_w, o_d, m_d, j + o_h, m_h, HIDDEN)  # [BH, BD]
                    b_z = dot(b_w, b_q, None, sizes.PRECISION)
                else:
                    b_z = tl.zeros([BH, sizes.BT], ACC)
                    for i in tl.range(0, hidden, BH, num_stages=1, disable_licm=True):
                        m_i = None if HIDDEN % BH == 0 else i + o_h < HIDDEN
                        p_x = inputs[i_l] + o_x
                        b_x = load_t(p_x, o_t, m_t, i + o_h, m_i, H * HIDDEN)  # [BH, BT]
                        b_w = load_t(p_w, i + o_h, m_i, j + o_h, m_h, HIDDEN)  # [BH, BH]
                        b_z = dot(b_w, b_x, b_z, sizes.PRECISION)
                b_h = activate(b_z, sizes.ACTIVATION).to(OP)
                if i_l + 1 < LAST:
                    store_t(inputs[i_l + 1] + o_x, b_h, o_t, m_t, j + o_h, m_h, H * HIDDEN)
                else:
                    b_w = load_t(p_W, j + o_h, m_h, o_d, m_d, D)  # [BD, BH]
                    b_y = dot(b_w, b_h, b_y, sizes.PRECISION)

    # The modifier only keeps the compiler from holding q in registers all along.
    o, m = o_t[None, :] * (H * D) + o_d[:, None], m_t[None, :] & m_d[:, None]
    b_x = tl.load(p_q + o, mask=m, other=0.0, cache_modifier=".ca").to(ACC)
    b_o = head(b_y, b_x, p_norm + i_h * 2 * D, o_d, m_d, sizes)
    tl.store(p_o + o, b_o.to(OP), mask=m)

"""Answers to queries: every token reads with the weights right after itself.

    y_l = a_t (x W_l) + c_t (x S_l) - sum_{i <= t} G[t, i] (x . X_i) D_i

Grid: (slots, heads, BT // BQ), everything parallel, BQ queries to a program. Reads the states,
inputs and errors that `scan` left.
"""

import triton
import triton.language as tl

from .blocks import block_of
from .network import activate, head


@triton.jit(do_not_specialize=["group"])
def retrieve_kernel(
    p_q,  # [Mq, H, D]
    p_k,  # [M, H, D]
    p_x,  # [slots, H, BT, HIDDEN], inputs of the last layer
    p_d1,  # [slots, H, BT, HIDDEN], errors of the first layer (D wide at depth 1)
    p_d2,  # [slots, H, BT, D], errors of the last layer
    p_W1,  # [slots, H, D, HIDDEN]
    p_S1,
    p_W2,  # [slots, H, HIDDEN, D]
    p_S2,
    p_a,  # [slots, H, L, BT]
    p_c,
    p_G,  # [slots, H, L, BT, BT]
    p_norm,  # [H, 2, D]
    p_o,  # out [Mq, H, D]
    p_z,  # or, where the backward pass wants them, out [slots, H, BT, HIDDEN]: first products,
    p_h,  # what the activation makes of them,
    p_y,  # [slots, H, BT, D]: last products,
    p_parts,  # [slots, H, 2, BT, D]: and what of them is W's and S's, before a and c
    p_bounds,  # [N, 2]
    p_tail,  # [N] tokens of tails
    p_ask,  # [N] first query
    group,
    hidden,
    BLOCKS: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    HIDDEN: tl.constexpr,
    L: tl.constexpr,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
    SPAN: tl.constexpr,
    BT: tl.constexpr,
    BQ: tl.constexpr,
    BD: tl.constexpr,
    BH: tl.constexpr,
    DEPTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
    KEEP: tl.constexpr,
):
    i_slot, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, count, _ = block_of(p_bounds, i_slot, group, BLOCKS, CHUNK, TOKENS, SPAN)
    o_q = tl.program_id(2) * BQ + tl.arange(0, BQ)
    if count <= tl.program_id(2) * BQ:
        return
    n = i_slot // BLOCKS
    # token `first + t` asks query `ask + t`, where there is one
    before = first - tl.load(p_bounds + 2 * n) - tl.load(p_tail + n)
    ask = tl.load(p_ask + n) + before
    o_t, o_d, o_h = tl.arange(0, BT), tl.arange(0, BD), tl.arange(0, BH)
    m_t, m_d = o_t < count, o_d < D
    m_q = (o_q < count) & (before + o_q >= 0)
    i_b = i_slot * H + i_h
    o_bh, o_bd, o_a, o_w = i_b * BT * HIDDEN, i_b * BT * D, i_b * L * BT, i_b * D * HIDDEN

    OP: tl.constexpr = p_k.dtype.element_ty
    ACC: tl.constexpr = p_G.dtype.element_ty
    p_q += (ask * H + i_h) * D
    p_o += (ask * H + i_h) * D
    p_k += (first * H + i_h) * D
    o_qd = o_q[None, :] * (H * D) + o_d[:, None]
    m_qd = m_q[None, :] & m_d[:, None]
    b_q = tl.load(p_q + o_qd, mask=m_qd, other=0.0)  # [BD, BQ]
    b_k = tl.load(  # [BT, BD]
        p_k + o_t[:, None] * (H * D) + o_d[None, :], mask=m_t[:, None] & m_d[None, :], other=0.0
    )
    b_a = tl.load(p_a + o_a + o_q)
    b_c = tl.load(p_c + o_a + o_q)
    b_G = tl.load(p_G + o_a * BT + o_q[None, :] * BT + o_t[:, None])  # [BT, BQ]
    b_s = tl.dot(b_k, b_q, input_precision=PRECISION, out_dtype=ACC)
    b_s = (-b_G * b_s).to(OP)  # [BT, BQ]

    if DEPTH == 1:
        b_yW = tl.zeros([BD, BQ], ACC)
        b_yS = tl.zeros([BD, BQ], ACC)
        for j in tl.range(0, hidden, BH, disable_licm=True):
            m_h = j + o_h < D
            b_x = tl.load(  # [BH, BQ]
                p_q + o_q[None, :] * (H * D) + (j + o_h)[:, None],
                mask=m_q[None, :] & m_h[:, None],
                other=0.0,
            )
            o_m = (j + o_h)[None, :] * D + o_d[:, None]
            m_w = m_h[None, :] & m_d[:, None]
            b_w = tl.load(p_W1 + o_w + o_m, mask=m_w, other=0.0)  # [BD, BH]
            b_yW = tl.dot(b_w, b_x, b_yW, input_precision=PRECISION, out_dtype=ACC)
            b_w = tl.load(p_S1 + o_w + o_m, mask=m_w, other=0.0)
            b_yS = tl.dot(b_w, b_x, b_yS, input_precision=PRECISION, out_dtype=ACC)
        b_d1 = tl.load(  # [BD, BT]
            p_d1 + o_bd + o_t[None, :] * D + o_d[:, None],
            mask=m_t[None, :] & m_d[:, None],
            other=0.0,
        ).to(OP)
        b_y = b_a[None, :] * b_yW + b_c[None, :] * b_yS
        b_y = tl.dot(b_d1, b_s, b_y, input_precision=PRECISION, out_dtype=ACC)
    else:
        i_l = 1 if L > 1 else 0
        b_yW = tl.zeros([BD, BQ], ACC)
        b_yS = tl.zeros([BD, BQ], ACC)
        b_s2 = tl.zeros([BT, BQ], ACC)
        for j in tl.range(0, hidden, BH, disable_licm=True):
            m_h = j + o_h < HIDDEN
            o_w1 = o_d[None, :] * HIDDEN + (j + o_h)[:, None]
            m_w1 = m_d[None, :] & m_h[:, None]
            o_x = o_t[None, :] * HIDDEN + (j + o_h)[:, None]
            m_x = m_t[None, :] & m_h[:, None]
            b_w = tl.load(p_W1 + o_w + o_w1, mask=m_w1, other=0.0)  # [BH, BD]
            b_z = b_a[None, :] * tl.dot(b_w, b_q, input_precision=PRECISION, out_dtype=ACC)
            b_w = tl.load(p_S1 + o_w + o_w1, mask=m_w1, other=0.0)
            b_z += b_c[None, :] * tl.dot(b_w, b_q, input_precision=PRECISION, out_dtype=ACC)
            b_d1 = tl.load(p_d1 + o_bh + o_x, mask=m_x, other=0.0).to(OP)  # [BH, BT]
            b_z = tl.dot(b_d1, b_s, b_z, input_precision=PRECISION, out_dtype=ACC)
            b_h = activate(b_z, ACTIVATION).to(OP)
            if KEEP:
                o_z = o_q[None, :] * HIDDEN + (j + o_h)[:, None]
                m_z = (o_q < count)[None, :] & m_h[:, None]
                tl.store(p_z + o_bh + o_z, b_z, mask=m_z)
                tl.store(p_h + o_bh + o_z, b_h, mask=m_z)

            o_xt = o_t[:, None] * HIDDEN + (j + o_h)[None, :]
            b_x = tl.load(
                p_x + o_bh + o_xt, mask=m_t[:, None] & m_h[None, :], other=0.0
            )  # [BT, BH]
            b_s2 = tl.dot(b_x, b_h, b_s2, input_precision=PRECISION, out_dtype=ACC)
            o_w2 = (j + o_h)[None, :] * D + o_d[:, None]
            m_w2 = m_h[None, :] & m_d[:, None]
            b_w = tl.load(p_W2 + o_w + o_w2, mask=m_w2, other=0.0)  # [BD, BH]
            b_yW = tl.dot(b_w, b_h, b_yW, input_precision=PRECISION, out_dtype=ACC)
            b_w = tl.load(p_S2 + o_w + o_w2, mask=m_w2, other=0.0)
            b_yS = tl.dot(b_w, b_h, b_yS, input_precision=PRECISION, out_dtype=ACC)
        # What G and q were loaded for first would fill registers all along. The modifier is the
        # default of a load: it only keeps the compiler from taking two loads for one.
        o_a += i_l * BT
        b_G = tl.load(p_G + o_a * BT + o_q[None, :] * BT + o_t[:, None], cache_modifier=".ca")
        b_d2 = tl.load(  # [BD, BT]
            p_d2 + o_bd + o_t[None, :] * D + o_d[:, None],
            mask=m_t[None, :] & m_d[:, None],
            other=0.0,
        ).to(OP)
        b_s2 = (-b_G * b_s2).to(OP)
        b_a = tl.load(p_a + o_a + o_q, cache_modifier=".ca")
        b_c = tl.load(p_c + o_a + o_q, cache_modifier=".ca")
        b_y = b_a[None, :] * b_yW + b_c[None, :] * b_yS
        b_y = tl.dot(b_d2, b_s2, b_y, input_precision=PRECISION, out_dtype=ACC)

    if KEEP:
        o_y = o_q[None, :] * D + o_d[:, None]
        m_y = (o_q < count)[None, :] & m_d[:, None]
        tl.store(p_y + o_bd + o_y, b_y, mask=m_y)
        tl.store(p_parts + 2 * o_bd + o_y, b_yW, mask=m_y)
        tl.store(p_parts + 2 * o_bd + BT * D + o_y, b_yS, mask=m_y)
    else:
        b_q = tl.load(p_q + o_qd, mask=m_qd, other=0.0, cache_modifier=".ca")
        b_o = head(b_y, b_q.to(ACC), p_norm + i_h * 2 * D, o_d, m_d, D, HAS_NORM, RESIDUAL)
        tl.store(p_o + o_qd, b_o.to(p_o.dtype.element_ty), mask=m_qd)

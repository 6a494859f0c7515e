"""The gradient of a layer's state over a block, on tiles: what it gives, and what is given to it.

The block hands on `W' = a W + c S - X^T (G D)` and `S' = p S - X^T (P D)`. Tokens that read with
`(a, c)` and whose product has the gradient g give `dW += h^T (a g)` and `dS += h^T (c g)`.
"""

import triton
import triton.language as tl


@triton.jit
def advance_backward(
    p_full,  # [BT, D], rows STRIDE apart: inputs of the layer, or its errors
    p_side,  # [BT, HIDDEN], the other of the two
    p_dfull,  # in and out [BT, D]
    p_dside,  # in and out [BT, HIDDEN]
    p_dW,  # gradient of the state that was handed on
    p_dS,
    p_end,  # coefficients of that state
    m_t,
    width,
    hidden,
    STRIDE: tl.constexpr,
    ROW: tl.constexpr,  # a matrix entry lies at full * ROW + hidden * COLUMN
    COLUMN: tl.constexpr,
    D: tl.constexpr,
    HIDDEN: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,  # of D at a time
    BN: tl.constexpr,  # of HIDDEN
    OP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of inputs and errors are added to; those of G and P are returned."""
    ACC: tl.constexpr = p_dW.dtype.element_ty
    o_t, o_d, o_h = tl.arange(0, BT), tl.arange(0, BR), tl.arange(0, BN)
    b_G = -tl.load(p_end + 4 + o_t)
    b_P = -tl.load(p_end + 4 + BT + o_t)
    b_dG = tl.zeros([BT], ACC)
    b_dP = tl.zeros([BT], ACC)
    for i in tl.range(0, width, BR, num_stages=1, disable_licm=True):
        m_d = i + o_d < D
        m_f = m_t[:, None] & m_d[None, :]
        b_full = tl.load(  # [BT, BR]
            p_full + o_t[:, None] * STRIDE + (i + o_d)[None, :], mask=m_f, other=0.0
        ).to(OP)
        b_dfull = tl.zeros([BT, BR], ACC)
        for j in tl.range(0, hidden, BN, num_stages=1, disable_licm=True):
            m_h = j + o_h < HIDDEN
            o_s, m_s = o_t[:, None] * HIDDEN + (j + o_h)[None, :], m_t[:, None] & m_h[None, :]
            b_side = tl.load(p_side + o_s, mask=m_s, other=0.0).to(ACC)  # [BT, BN]
            o_w, m_w = (
                (i + o_d)[:, None] * ROW + (j + o_h)[None, :] * COLUMN,
                m_d[:, None] & m_h[None, :],
            )
            b_dw = tl.load(p_dW + o_w, mask=m_w, other=0.0).to(OP)  # [BR, BN]
            b_part = tl.dot(b_full, b_dw, input_precision=PRECISION, out_dtype=ACC)
            b_dG -= tl.sum(b_part * b_side, 1)
            b_dside = b_G[:, None] * b_part
            b_dw = tl.load(p_dS + o_w, mask=m_w, other=0.0).to(OP)
            b_part = tl.dot(b_full, b_dw, input_precision=PRECISION, out_dtype=ACC)
            b_dP -= tl.sum(b_part * b_side, 1)
            b_dside += b_P[:, None] * b_part
            b_dside += tl.load(p_dside + o_s, mask=m_s, other=0.0)
            tl.store(p_dside + o_s, b_dside, mask=m_s)

            o_w, m_w = (
                (i + o_d)[None, :] * ROW + (j + o_h)[:, None] * COLUMN,
                m_d[None, :] & m_h[:, None],
            )
            b_dw = tl.load(p_dW + o_w, mask=m_w, other=0.0).to(OP)  # [BN, BR]
            b_scaled = (b_G[:, None] * b_side).to(OP)
            b_dfull = tl.dot(b_scaled, b_dw, b_dfull, input_precision=PRECISION, out_dtype=ACC)
            b_dw = tl.load(p_dS + o_w, mask=m_w, other=0.0).to(OP)
            b_scaled = (b_P[:, None] * b_side).to(OP)
            b_dfull = tl.dot(b_scaled, b_dw, b_dfull, input_precision=PRECISION, out_dtype=ACC)
        o_f = o_t[:, None] * D + (i + o_d)[None, :]
        b_dfull += tl.load(p_dfull + o_f, mask=m_f, other=0.0)
        tl.store(p_dfull + o_f, b_dfull, mask=m_f)
        if D > BR:  # the next part of D adds to what this one stored
            tl.debug_barrier()
    return b_dG, b_dP


@triton.jit
def add_readers(
    p_h,  # [BT, ROWS], rows STRIDE apart
    p_g,  # [BT, COLUMNS]
    b_a,  # [BT]
    b_c,
    b_dw,  # [BR, BN]
    b_ds,
    o_r,  # [BR]
    o_n,  # [BN]
    m_t,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What tokens that read h and had g give a tile of the state's gradient."""
    OP: tl.constexpr = p_h.dtype.element_ty
    ACC: tl.constexpr = b_dw.dtype
    o_t, m_r, m_n = tl.arange(0, BT), o_r < ROWS, o_n < COLUMNS
    b_h = tl.load(  # [BR, BT]
        p_h + o_t[None, :] * STRIDE + o_r[:, None], mask=m_t[None, :] & m_r[:, None], other=0.0
    )
    b_g = tl.load(  # [BT, BN]
        p_g + o_t[:, None] * COLUMNS + o_n[None, :], mask=m_t[:, None] & m_n[None, :], other=0.0
    )
    b_ag, b_cg = (b_a[:, None] * b_g).to(OP), (b_c[:, None] * b_g).to(OP)
    b_dw = tl.dot(b_h, b_ag, b_dw, input_precision=PRECISION, out_dtype=ACC)
    b_ds = tl.dot(b_h, b_cg, b_ds, input_precision=PRECISION, out_dtype=ACC)
    return b_dw, b_ds


@triton.jit
def hand_back(
    p_hq,  # [BT, ROWS], what queries read the layer with,
    p_gq,  # [BT, COLUMNS], and its gradient
    p_hk,  # what keys read it with
    p_gk,
    p_he,  # and, where TWO, what errors read it with
    p_ge,
    p_a,  # [BT]
    p_c,
    o_row,  # [BT], the row of p_a and p_c that keys read with; -1: the block's start
    p_W,  # state at the block's start, not rounded
    p_S,
    p_dW,  # in and out [ROWS, COLUMNS]
    p_dS,
    p_dW_anchor,  # in and out, where chunks span blocks: of the state that the chunk began with
    p_dS_anchor,
    p_end,
    m_q,  # [BT], tokens with a query
    m_t,
    FIRST,  # bool: the chunk begins with this block
    rows,
    columns,
    STRIDE: tl.constexpr,  # of p_hq and p_hk
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
    TWO: tl.constexpr,
    SPAN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One layer's state gradient, from the block's end to its start; da, dc, dp of the end."""
    ACC: tl.constexpr = p_dW.dtype.element_ty
    o_t = tl.arange(0, BT)
    a, c, p = tl.load(p_end), tl.load(p_end + 1), tl.load(p_end + 2)
    b_a = tl.load(p_a + o_t, mask=m_t, other=0.0)
    b_c = tl.load(p_c + o_t, mask=m_t, other=0.0)
    b_ak = tl.load(p_a + o_row, mask=o_row >= 0, other=1.0)
    b_ck = tl.load(p_c + o_row, mask=o_row >= 0, other=0.0)
    b_da = tl.zeros([BN], ACC)
    b_dc = tl.zeros([BN], ACC)
    b_dp = tl.zeros([BN], ACC)
    for i in tl.range(0, rows, BR, num_stages=1, disable_licm=True):
        o_r = i + tl.arange(0, BR)
        for j in tl.range(0, columns, BN, num_stages=1, disable_licm=True):
            o_n = j + tl.arange(0, BN)
            o = o_r[:, None] * COLUMNS + o_n[None, :]
            m = (o_r < ROWS)[:, None] & (o_n < COLUMNS)[None, :]
            b_dw = tl.load(p_dW + o, mask=m, other=0.0)
            b_ds = tl.load(p_dS + o, mask=m, other=0.0)
            b_s = tl.load(p_S + o, mask=m, other=0.0)
            b_da += tl.sum(tl.load(p_W + o, mask=m, other=0.0) * b_dw, 0)
            b_dc += tl.sum(b_s * b_dw, 0)
            b_dp += tl.sum(b_s * b_ds, 0)
            b_ds = c * b_dw + p * b_ds
            b_dw, b_ds = add_readers(
                p_hq,
                p_gq,
                b_a,
                b_c,
                a * b_dw,
                b_ds,
                o_r,
                o_n,
                m_q,
                STRIDE,
                ROWS,
                COLUMNS,
                BT,
                PRECISION,
            )
            b_wk, b_sk = b_dw, b_ds
            if SPAN > 1:
                b_wk = tl.load(p_dW_anchor + o, mask=m, other=0.0)
                b_sk = tl.load(p_dS_anchor + o, mask=m, other=0.0)
            b_wk, b_sk = add_readers(
                p_hk,
                p_gk,
                b_ak,
                b_ck,
                b_wk,
                b_sk,
                o_r,
                o_n,
                m_t,
                STRIDE,
                ROWS,
                COLUMNS,
                BT,
                PRECISION,
            )
            if TWO:
                b_wk, b_sk = add_readers(
                    p_he,
                    p_ge,
                    b_ak,
                    b_ck,
                    b_wk,
                    b_sk,
                    o_r,
                    o_n,
                    m_t,
                    ROWS,
                    ROWS,
                    COLUMNS,
                    BT,
                    PRECISION,
                )
            if SPAN > 1:
                if FIRST:  # the block's state and the chunk's are one
                    b_dw += b_wk
                    b_ds += b_sk
                    b_wk = tl.zeros_like(b_wk)
                    b_sk = tl.zeros_like(b_sk)
                tl.store(p_dW_anchor + o, b_wk, mask=m)
                tl.store(p_dS_anchor + o, b_sk, mask=m)
            else:
                b_dw, b_ds = b_wk, b_sk
            tl.store(p_dW + o, b_dw, mask=m)
            tl.store(p_dS + o, b_ds, mask=m)
    return tl.sum(b_da, 0), tl.sum(b_dc, 0), tl.sum(b_dp, 0)

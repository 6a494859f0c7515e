"""The gradient of a layer's state over a block: what it gives, and what is given to it.

The block hands on `W' = a W + c S - X^T (G D)` and `S' = p S - X^T (P D)`. Tokens that read with
`(a, c)` and whose product has the gradient g give `dW += h^T (a g)` and `dS += h^T (c g)`.
"""

import triton
import triton.language as tl

from .operands import dot, load, load_t, store


@triton.jit
def advance_backward(p_k, layer, coefficient, grad, block, ends, i_l: tl.constexpr, sizes):
    """What the state handed on gives a layer's inputs and errors; returns that of G and P, [BT].

    One of the two, `full`, goes with the outer loop, the other, `side`, with the inner one: inputs
    of the first layer, errors of any other.
    """
    IN: tl.constexpr = sizes.WIDTHS[i_l]
    OUT: tl.constexpr = sizes.WIDTHS[i_l + 1]
    FULL: tl.constexpr = IN if i_l == 0 else OUT
    SIDE: tl.constexpr = OUT if i_l == 0 else IN
    STRIDE: tl.constexpr = sizes.H * FULL if i_l == 0 else FULL  # of what is full
    BT: tl.constexpr = sizes.BT
    BR: tl.constexpr = sizes.BR
    BN: tl.constexpr = sizes.BH if sizes.BH < 32 else 32
    OP: tl.constexpr = p_k.dtype.element_ty
    ACC: tl.constexpr = grad.W.dtype.element_ty
    PRECISION: tl.constexpr = sizes.PRECISION
    i_s, i_b = block.state, block.slot
    o_t, o_d, o_h = tl.arange(0, BT), tl.arange(0, BR), tl.arange(0, BN)
    m_t, end = o_t < block.count, ends.width if FULL == sizes.D else ends.hidden
    p_dW, p_dS = grad.W + i_s * IN * OUT, grad.S + i_s * IN * OUT
    if i_l == 0:
        p_full, p_side = p_k, layer.d + i_b * BT * SIDE
        p_dfull, p_dside = grad.x + i_b * BT * FULL, grad.d + i_b * BT * SIDE
    else:
        p_full, p_side = layer.d + i_b * BT * FULL, layer.x + i_b * BT * SIDE
        p_dfull, p_dside = grad.d + i_b * BT * FULL, grad.x + i_b * BT * SIDE
    p_end = coefficient.end + (i_b * sizes.L + sizes.GATES[i_l]) * (4 + 2 * BT)
    b_G = -tl.load(p_end + 4 + o_t)
    b_P = -tl.load(p_end + 4 + BT + o_t)
    b_dG = tl.zeros([BT], ACC)
    b_dP = tl.zeros([BT], ACC)
    for i in tl.range(0, end, BR, num_stages=1, disable_licm=True):
        m_d = None if FULL % BR == 0 else i + o_d < FULL
        b_full = load(p_full, o_t, m_t, i + o_d, m_d, STRIDE).to(OP)  # [BT, BR]
        b_dfull_W = tl.zeros([BT, BR], ACC)
        b_dfull_S = tl.zeros([BT, BR], ACC)
        for j in tl.range(0, ends.hidden, BN, num_stages=1, disable_licm=True):
            m_h = None if SIDE % BN == 0 else j + o_h < SIDE
            b_dw = of_state(p_dW, i + o_d, m_d, j + o_h, m_h, OUT, i_l == 0).to(OP)  # [BR, BN]
            b_dside = b_G[:, None] * dot(b_full, b_dw, None, PRECISION)
            b_dw = of_state(p_dS, i + o_d, m_d, j + o_h, m_h, OUT, i_l == 0).to(OP)
            b_dside += b_P[:, None] * dot(b_full, b_dw, None, PRECISION)
            b_dside += load(p_dside, o_t, m_t, j + o_h, m_h, SIDE)
            store(p_dside, b_dside, o_t, m_t, j + o_h, m_h, SIDE)

            b_side = load(p_side, o_t, m_t, j + o_h, m_h, SIDE).to(OP)  # [BT, BN]
            b_dw = of_state(p_dW, j + o_h, m_h, i + o_d, m_d, OUT, i_l > 0).to(OP)  # [BN, BR]
            b_dfull_W = dot(b_side, b_dw, b_dfull_W, PRECISION)
            b_dw = of_state(p_dS, j + o_h, m_h, i + o_d, m_d, OUT, i_l > 0).to(OP)
            b_dfull_S = dot(b_side, b_dw, b_dfull_S, PRECISION)
        b_dG -= tl.sum(b_full.to(ACC) * b_dfull_W, 1)
        b_dP -= tl.sum(b_full.to(ACC) * b_dfull_S, 1)
        b_dfull = b_G[:, None] * b_dfull_W + b_P[:, None] * b_dfull_S
        b_dfull += load(p_dfull, o_t, m_t, i + o_d, m_d, FULL)
        store(p_dfull, b_dfull, o_t, m_t, i + o_d, m_d, FULL)
        if FULL > BR:  # the next part adds to what this one stored
            tl.debug_barrier()
    return b_dG, b_dP


@triton.jit
def of_state(p, o_r, m_r, o_c, m_c, STRIDE: tl.constexpr, ROWS: tl.constexpr):
    """A tile of a matrix, [r, c]; without ROWS, r are its columns."""
    return load(p, o_r, m_r, o_c, m_c, STRIDE) if ROWS else load_t(p, o_c, m_c, o_r, m_r, STRIDE)


@triton.jit
def hand_back(
    readers,
    layer,
    query_layer,
    coefficient,
    grad,
    block,
    ends,
    i_l: tl.constexpr,
    sizes,
):
    """A layer's state gradient, from the block's end to its start; returns da, dc, dp of the end.

    Queries read the state, and keys; of any layer but the first, errors too.
    """
    IN: tl.constexpr = sizes.WIDTHS[i_l]
    OUT: tl.constexpr = sizes.WIDTHS[i_l + 1]
    BT: tl.constexpr = sizes.BT
    BR: tl.constexpr = sizes.BR
    BN: tl.constexpr = sizes.BH if sizes.BH < 32 else 32
    STRIDE: tl.constexpr = sizes.H * IN if i_l == 0 else IN
    ACC: tl.constexpr = grad.W.dtype.element_ty
    i_s, i_b, o_row, m_q = block.state, block.slot, readers.row, readers.mask
    o_t, i_g = tl.arange(0, BT), i_b * sizes.L + sizes.GATES[i_l]
    m_t = o_t < block.count
    p_a, p_c = coefficient.a + i_g * BT, coefficient.c + i_g * BT
    p_end = coefficient.end + i_g * (4 + 2 * BT)
    a, c, p = tl.load(p_end), tl.load(p_end + 1), tl.load(p_end + 2)
    b_a = tl.load(p_a + o_t, mask=m_t, other=0.0)
    b_c = tl.load(p_c + o_t, mask=m_t, other=0.0)
    b_ak = tl.load(p_a + o_row, mask=o_row >= 0, other=1.0)
    b_ck = tl.load(p_c + o_row, mask=o_row >= 0, other=0.0)
    o_in, o_out = i_b * BT * IN, i_b * BT * OUT
    o_s, o_b = i_s * IN * OUT, i_b * IN * OUT
    if i_l == 0:
        query, key = (readers.q, query_layer.z + o_out), (readers.k, grad.d + o_out)
    else:
        query, key = (query_layer.h + o_in, query_layer.z + o_out), (layer.x + o_in, grad.d + o_out)
        m_q = m_t
    b_da = tl.zeros([BR, BN], ACC)
    b_dc = tl.zeros([BR, BN], ACC)
    b_dp = tl.zeros([BR, BN], ACC)
    end_in = ends.width if IN == sizes.D else ends.hidden
    end_out = ends.width if OUT == sizes.D else ends.hidden
    for i in tl.range(0, end_in, BR, num_stages=1, disable_licm=True):
        o_r = i + tl.arange(0, BR)
        for j in tl.range(0, end_out, BN, num_stages=1, disable_licm=True):
            o_n = j + tl.arange(0, BN)
            m_r = None if IN % BR == 0 else o_r < IN
            m_n = None if OUT % BN == 0 else o_n < OUT
            b_dw = load(grad.W + o_s, o_r, m_r, o_n, m_n, OUT)
            b_ds = load(grad.S + o_s, o_r, m_r, o_n, m_n, OUT)
            # Four to a thread, as of W: eight, as fit in an access, would be moved to W's layout.
            b_s = load(layer.S + o_b, o_r, m_r, o_n, m_n, OUT, 4).to(ACC)
            b_w = load(layer.W_exact + o_b, o_r, m_r, o_n, m_n, OUT)
            b_da += b_w * b_dw
            b_dc += b_s * b_dw
            b_dp += b_s * b_ds
            b_ds = c * b_dw + p * b_ds
            b_dw = a * b_dw
            if sizes.READ == "token":
                b_dw, b_ds = add_readers(
                    query, m_q, b_a, b_c, b_dw, b_ds, o_r, m_r, o_n, m_n, i_l, sizes, STRIDE, True
                )
            b_wk, b_sk = b_dw, b_ds
            if sizes.SPAN > 1:
                b_wk = load(grad.W_anchor + o_s, o_r, m_r, o_n, m_n, OUT)
                b_sk = load(grad.S_anchor + o_s, o_r, m_r, o_n, m_n, OUT)
            b_wk, b_sk = add_readers(
                key, m_t, b_ak, b_ck, b_wk, b_sk, o_r, m_r, o_n, m_n, i_l, sizes, STRIDE, sizes.EARLIER
            )
            if sizes.READ == "chunk":
                b_wk, b_sk = add_readers(
                    query, m_q, b_ak, b_ck, b_wk, b_sk, o_r, m_r, o_n, m_n, i_l, sizes, STRIDE, sizes.EARLIER
                )
            if i_l > 0:
                error = (grad.e + o_in, layer.d + o_out)
                b_wk, b_sk = add_readers(
                    error, m_t, b_ak, b_ck, b_wk, b_sk, o_r, m_r, o_n, m_n, i_l, sizes, STRIDE, sizes.EARLIER
                )
            if sizes.SPAN > 1:
                if readers.begins:  # the block's state and the chunk's are one
                    b_dw += b_wk
                    b_ds += b_sk
                    b_wk = tl.zeros_like(b_wk)
                    b_sk = tl.zeros_like(b_sk)
                store(grad.W_anchor + o_s, b_wk, o_r, m_r, o_n, m_n, OUT)
                store(grad.S_anchor + o_s, b_sk, o_r, m_r, o_n, m_n, OUT)
            else:
                b_dw, b_ds = b_wk, b_sk
            store(grad.W + o_s, b_dw, o_r, m_r, o_n, m_n, OUT)
            store(grad.S + o_s, b_ds, o_r, m_r, o_n, m_n, OUT)
    return tl.sum(b_da), tl.sum(b_dc), tl.sum(b_dp)


@triton.jit
def add_readers(
    reader,  # what was read with, h [BT, IN], and the gradient of its product, g [BT, OUT]
    m_t,
    b_a,  # [BT]
    b_c,
    b_dw,  # [BR, BN]
    b_ds,
    o_r,
    m_r,
    o_n,
    m_n,
    i_l: tl.constexpr,
    sizes,
    STRIDE: tl.constexpr,  # of h
    MOMENTUM: tl.constexpr,  # whether they read S too: else c is 0
):
    """What readers give a tile of the state's gradient."""
    p_h, p_g = reader
    OUT: tl.constexpr = sizes.WIDTHS[i_l + 1]
    OP: tl.constexpr = p_h.dtype.element_ty
    o_t = tl.arange(0, sizes.BT)
    b_h = load_t(p_h, o_t, m_t, o_r, m_r, STRIDE)  # [BR, BT]
    b_g = load(p_g, o_t, m_t, o_n, m_n, OUT)  # [BT, BN]
    b_dw = dot(b_h, (b_a[:, None] * b_g).to(OP), b_dw, sizes.PRECISION)
    if MOMENTUM:
        b_ds = dot(b_h, (b_c[:, None] * b_g).to(OP), b_ds, sizes.PRECISION)
    return b_dw, b_ds

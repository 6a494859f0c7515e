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

    Queries read the state, and keys; of any layer but the first, errors too. The outer loop holds
    what they read with, inputs of the first layer, gradients of the products of any other.
    """
    IN: tl.constexpr = sizes.WIDTHS[i_l]
    OUT: tl.constexpr = sizes.WIDTHS[i_l + 1]
    BT: tl.constexpr = sizes.BT
    BR: tl.constexpr = sizes.BR
    BN: tl.constexpr = sizes.BH if sizes.BH < 32 else 32
    STRIDE: tl.constexpr = sizes.H * IN if i_l == 0 else IN
    ACC: tl.constexpr = grad.W.dtype.element_ty
    i_b, o_row, m_q = block.slot, readers.row, readers.mask
    o_t, i_g = tl.arange(0, BT), i_b * sizes.L + sizes.GATES[i_l]
    m_t = o_t < block.count
    p_a, p_c = coefficient.a + i_g * BT, coefficient.c + i_g * BT
    b_ak = tl.load(p_a + o_row, mask=o_row >= 0, other=1.0)
    b_ck = tl.load(p_c + o_row, mask=o_row >= 0, other=0.0)
    if sizes.READ == "token":
        b_a = tl.load(p_a + o_t, mask=m_t, other=0.0)
        b_c = tl.load(p_c + o_t, mask=m_t, other=0.0)
    else:
        b_a, b_c = b_ak, b_ck
    o_in, o_out = i_b * BT * IN, i_b * BT * OUT
    p_gq, p_gk = query_layer.z + o_out, grad.d + o_out
    p_ge = layer.d + o_out
    if i_l == 0:
        p_hq, p_hk = readers.q, readers.k
        p_he = p_hk
    else:
        p_hq, p_hk = query_layer.h + o_in, layer.x + o_in
        p_he = grad.e + o_in
        m_q = m_t
    b_da = tl.zeros([BR, BN], ACC)
    b_dc = tl.zeros([BR, BN], ACC)
    b_dp = tl.zeros([BR, BN], ACC)
    end_in = ends.width if IN == sizes.D else ends.hidden
    end_out = ends.width if OUT == sizes.D else ends.hidden
    if i_l == 0:
        for i in tl.range(0, end_in, BR, num_stages=1, disable_licm=True):
            o_r = i + tl.arange(0, BR)
            m_r = None if IN % BR == 0 else o_r < IN
            b_hq = load_t(p_hq, o_t, m_q, o_r, m_r, STRIDE)
            b_hk = load_t(p_hk, o_t, m_t, o_r, m_r, STRIDE)
            for j in tl.range(0, end_out, BN, num_stages=1, disable_licm=True):
                o_n = j + tl.arange(0, BN)
                m_n = None if OUT % BN == 0 else o_n < OUT
                gq = scaled(p_gq, b_a, b_c, o_t, m_q, o_n, m_n, OUT, b_hq.dtype)
                gk = scaled(p_gk, b_ak, b_ck, o_t, m_t, o_n, m_n, OUT, b_hq.dtype)
                read = ((b_hq, gq), (b_hk, gk))
                b_da, b_dc, b_dp = hand_back_tile(
                    read, (b_da, b_dc, b_dp), readers, layer, coefficient, grad, block,
                    o_r, m_r, o_n, m_n, i_l, sizes
                )
    else:
        for j in tl.range(0, end_out, BN, num_stages=1, disable_licm=True):
            o_n = j + tl.arange(0, BN)
            m_n = None if OUT % BN == 0 else o_n < OUT
            gq = scaled(p_gq, b_a, b_c, o_t, m_q, o_n, m_n, OUT, p_hq.dtype.element_ty)
            gk = scaled(p_gk, b_ak, b_ck, o_t, m_t, o_n, m_n, OUT, p_hq.dtype.element_ty)
            ge = scaled(p_ge, b_ak, b_ck, o_t, m_t, o_n, m_n, OUT, p_hq.dtype.element_ty)
            for i in tl.range(0, end_in, BR, num_stages=1, disable_licm=True):
                o_r = i + tl.arange(0, BR)
                m_r = None if IN % BR == 0 else o_r < IN
                b_hq = load_t(p_hq, o_t, m_q, o_r, m_r, STRIDE)
                b_hk = load_t(p_hk, o_t, m_t, o_r, m_r, STRIDE)
                b_he = load_t(p_he, o_t, m_t, o_r, m_r, STRIDE)
                read = ((b_hq, gq), (b_hk, gk), (b_he, ge))
                b_da, b_dc, b_dp = hand_back_tile(
                    read, (b_da, b_dc, b_dp), readers, layer, coefficient, grad, block,
                    o_r, m_r, o_n, m_n, i_l, sizes
                )
    return tl.sum(b_da), tl.sum(b_dc), tl.sum(b_dp)


@triton.jit
def scaled(p_g, b_a, b_c, o_t, m_t, o_n, m_n, OUT: tl.constexpr, OP: tl.constexpr):
    """`a g` and `c g` of readers, [BT, BN]."""
    b_g = load(p_g, o_t, m_t, o_n, m_n, OUT)
    return (b_a[:, None] * b_g).to(OP), (b_c[:, None] * b_g).to(OP)


@triton.jit
def hand_back_tile(read, sums, readers, layer, coefficient, grad, block, o_r, m_r, o_n, m_n,
                   i_l: tl.constexpr, sizes):
    IN: tl.constexpr = sizes.WIDTHS[i_l]
    OUT: tl.constexpr = sizes.WIDTHS[i_l + 1]
    BT: tl.constexpr = sizes.BT
    ACC: tl.constexpr = grad.W.dtype.element_ty
    MOMENTUM: tl.constexpr = sizes.EARLIER
    o_s, o_b = block.state * IN * OUT, block.slot * IN * OUT
    p_end = coefficient.end + (block.slot * sizes.L + sizes.GATES[i_l]) * (4 + 2 * BT)
    a, c, p = tl.load(p_end), tl.load(p_end + 1), tl.load(p_end + 2)
    b_da, b_dc, b_dp = sums
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
        b_dw, b_ds = add_reader(read[0], b_dw, b_ds, True, sizes)
    b_wk, b_sk = b_dw, b_ds
    if sizes.SPAN > 1:
        b_wk = load(grad.W_anchor + o_s, o_r, m_r, o_n, m_n, OUT)
        b_sk = load(grad.S_anchor + o_s, o_r, m_r, o_n, m_n, OUT)
    b_wk, b_sk = add_reader(read[1], b_wk, b_sk, MOMENTUM, sizes)
    if sizes.READ == "chunk":
        b_wk, b_sk = add_reader(read[0], b_wk, b_sk, MOMENTUM, sizes)
    if i_l > 0:
        b_wk, b_sk = add_reader(read[2], b_wk, b_sk, MOMENTUM, sizes)
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
    return b_da, b_dc, b_dp


@triton.jit
def add_reader(reader, b_dw, b_ds, MOMENTUM: tl.constexpr, sizes):
    """What readers give a tile of the state's gradient."""
    b_h, (b_ag, b_cg) = reader
    b_dw = dot(b_h, b_ag, b_dw, sizes.PRECISION)
    if MOMENTUM:
        b_ds = dot(b_h, b_cg, b_ds, sizes.PRECISION)
    return b_dw, b_ds

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
    FIRST: tl.constexpr = i_l == 0  # errors go with the inner loop, and give G's unrounded
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
        if FIRST:
            b_exact_W = tl.zeros([BT, BN], ACC)
            b_exact_S = tl.zeros([BT, BN], ACC)
        for j in tl.range(0, ends.hidden, BN, num_stages=1, disable_licm=True):
            m_h = None if SIDE % BN == 0 else j + o_h < SIDE
            b_dw = of_state(p_dW, i + o_d, m_d, j + o_h, m_h, OUT, i_l == 0).to(OP)  # [BR, BN]
            b_dside_W = dot(b_full, b_dw, None, PRECISION)
            b_dw = of_state(p_dS, i + o_d, m_d, j + o_h, m_h, OUT, i_l == 0).to(OP)
            b_dside_S = dot(b_full, b_dw, None, PRECISION)
            b_dside = b_G[:, None] * b_dside_W + b_P[:, None] * b_dside_S
            b_dside += load(p_dside, o_t, m_t, j + o_h, m_h, SIDE)
            store(p_dside, b_dside, o_t, m_t, j + o_h, m_h, SIDE)

            b_side = load(p_side, o_t, m_t, j + o_h, m_h, SIDE)  # [BT, BN]
            if FIRST:
                b_exact_W += b_side * b_dside_W
                b_exact_S += b_side * b_dside_S
            b_side = b_side.to(OP)
            b_dw = of_state(p_dW, j + o_h, m_h, i + o_d, m_d, OUT, i_l > 0).to(OP)  # [BN, BR]
            b_dfull_W = dot(b_side, b_dw, b_dfull_W, PRECISION)
            b_dw = of_state(p_dS, j + o_h, m_h, i + o_d, m_d, OUT, i_l > 0).to(OP)
            b_dfull_S = dot(b_side, b_dw, b_dfull_S, PRECISION)
        if FIRST:
            b_dG -= tl.sum(b_exact_W, 1)
            b_dP -= tl.sum(b_exact_S, 1)
        else:
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

    Queries read the state, and keys; of any layer but the first, errors too. What they read with is
    held by the outer loop: inputs of the first layer, gradients of the products of any other.
    """
    IN: tl.constexpr = sizes.WIDTHS[i_l]
    OUT: tl.constexpr = sizes.WIDTHS[i_l + 1]
    BT: tl.constexpr = sizes.BT
    BR: tl.constexpr = sizes.BR
    BN: tl.constexpr = sizes.BN
    ACC: tl.constexpr = grad.W.dtype.element_ty
    o_t, o_row, i_g = tl.arange(0, BT), readers.row, block.slot * sizes.L + sizes.GATES[i_l]
    p_a, p_c = coefficient.a + i_g * BT, coefficient.c + i_g * BT
    b_ak = tl.load(p_a + o_row, mask=o_row >= 0, other=1.0)
    b_ck = tl.load(p_c + o_row, mask=o_row >= 0, other=0.0)
    b_aq, b_cq = b_ak, b_ck
    if sizes.READ == "token":
        b_aq = tl.load(p_a + o_t, mask=o_t < block.count, other=0.0)
        b_cq = tl.load(p_c + o_t, mask=o_t < block.count, other=0.0)
    weights = (b_aq, b_cq, b_ak, b_ck)
    p_end = coefficient.end + i_g * (4 + 2 * BT)
    end = (tl.load(p_end), tl.load(p_end + 1), tl.load(p_end + 2))  # a, c, p

    b_da = tl.zeros([BR, BN], ACC)
    b_dc = tl.zeros([BR, BN], ACC)
    b_dp = tl.zeros([BR, BN], ACC)
    end_in = ends.width if IN == sizes.D else ends.hidden
    end_out = ends.width if OUT == sizes.D else ends.hidden
    if i_l == 0:
        for i in tl.range(0, end_in, BR, num_stages=1, disable_licm=True):
            o_r = i + tl.arange(0, BR)
            h = inputs_of(readers, layer, query_layer, grad, block, o_r, i_l, sizes)
            for j in tl.range(0, end_out, BN, num_stages=1, disable_licm=True):
                o_n = j + tl.arange(0, BN)
                g = gradients_of(readers, weights, layer, query_layer, grad, block, o_n, i_l, sizes)
                w, s, b_dw, b_ds = hand_back_tile(
                    h, g, end, readers, layer, grad, block, o_r, o_n, i_l, sizes
                )
                b_da, b_dc, b_dp = b_da + w * b_dw, b_dc + s * b_dw, b_dp + s * b_ds
    else:
        for j in tl.range(0, end_out, BN, num_stages=1, disable_licm=True):
            o_n = j + tl.arange(0, BN)
            g = gradients_of(readers, weights, layer, query_layer, grad, block, o_n, i_l, sizes)
            for i in tl.range(0, end_in, BR, num_stages=1, disable_licm=True):
                o_r = i + tl.arange(0, BR)
                h = inputs_of(readers, layer, query_layer, grad, block, o_r, i_l, sizes)
                w, s, b_dw, b_ds = hand_back_tile(
                    h, g, end, readers, layer, grad, block, o_r, o_n, i_l, sizes
                )
                b_da, b_dc, b_dp = b_da + w * b_dw, b_dc + s * b_dw, b_dp + s * b_ds
    return tl.sum(b_da), tl.sum(b_dc), tl.sum(b_dp)


@triton.jit
def inputs_of(readers, layer, query_layer, grad, block, o_r, i_l: tl.constexpr, sizes):
    """What queries, keys and errors read a layer with, [BR, BT] each; errors not the first one."""
    IN: tl.constexpr = sizes.WIDTHS[i_l]
    BR: tl.constexpr = o_r.shape[0]
    o_t, o = tl.arange(0, sizes.BT), block.slot * sizes.BT * IN
    m_t, m_r = o_t < block.count, None if IN % BR == 0 else o_r < IN
    if i_l == 0:
        b_q = load_t(readers.q, o_t, readers.mask, o_r, m_r, sizes.H * IN)
        b_k = load_t(readers.k, o_t, m_t, o_r, m_r, sizes.H * IN)
        return b_q, b_k, b_k
    else:
        b_q = load_t(query_layer.h + o, o_t, m_t, o_r, m_r, IN)
        b_k = load_t(layer.x + o, o_t, m_t, o_r, m_r, IN)
        return b_q, b_k, load_t(grad.e + o, o_t, m_t, o_r, m_r, IN)


@triton.jit
def gradients_of(readers, weights, layer, query_layer, grad, block, o_n, i_l: tl.constexpr, sizes):
    """The gradients g of their products, `a g` and `c g`, [BT, BN] each."""
    b_aq, b_cq, b_ak, b_ck = weights
    OUT: tl.constexpr = sizes.WIDTHS[i_l + 1]
    BN: tl.constexpr = o_n.shape[0]
    OP: tl.constexpr = readers.k.dtype.element_ty
    o_t, o = tl.arange(0, sizes.BT), block.slot * sizes.BT * OUT
    m_t, m_n = o_t < block.count, None if OUT % BN == 0 else o_n < OUT
    b_g = load(query_layer.z + o, o_t, readers.mask if i_l == 0 else m_t, o_n, m_n, OUT)
    q = ((b_aq[:, None] * b_g).to(OP), (b_cq[:, None] * b_g).to(OP))
    b_g = load(grad.d + o, o_t, m_t, o_n, m_n, OUT)
    k = ((b_ak[:, None] * b_g).to(OP), (b_ck[:, None] * b_g).to(OP))
    if i_l == 0:
        return q, k, k
    else:
        b_g = load(layer.d + o, o_t, m_t, o_n, m_n, OUT)
        return q, k, ((b_ak[:, None] * b_g).to(OP), (b_ck[:, None] * b_g).to(OP))


@triton.jit
def hand_back_tile(
    h,  # of `inputs_of`
    g,  # of `gradients_of`
    end,
    readers,
    layer,
    grad,
    block,
    o_r,
    o_n,
    i_l: tl.constexpr,
    sizes,
):
    """A tile of the gradient; returns those of the state, and what the block's end had given it."""
    a, c, p = end
    IN: tl.constexpr = sizes.WIDTHS[i_l]
    OUT: tl.constexpr = sizes.WIDTHS[i_l + 1]
    BR: tl.constexpr = o_r.shape[0]
    BN: tl.constexpr = o_n.shape[0]
    ACC: tl.constexpr = grad.W.dtype.element_ty
    m_r, m_n = None if IN % BR == 0 else o_r < IN, None if OUT % BN == 0 else o_n < OUT
    o_s, o_b = block.state * IN * OUT, block.slot * IN * OUT
    b_dw_end = load(grad.W + o_s, o_r, m_r, o_n, m_n, OUT)
    b_ds_end = load(grad.S + o_s, o_r, m_r, o_n, m_n, OUT)
    # Four to a thread, as of W: eight, as fit in an access, would be moved to W's layout.
    b_s = load(layer.S + o_b, o_r, m_r, o_n, m_n, OUT, 4).to(ACC)
    b_w = load(layer.W_exact + o_b, o_r, m_r, o_n, m_n, OUT)
    b_dw, b_ds = a * b_dw_end, c * b_dw_end + p * b_ds_end
    if sizes.READ == "token":
        b_dw, b_ds = add_readers(h[0], g[0], b_dw, b_ds, True, sizes)
    b_wk, b_sk = b_dw, b_ds
    if sizes.SPAN > 1:
        b_wk = load(grad.W_anchor + o_s, o_r, m_r, o_n, m_n, OUT)
        b_sk = load(grad.S_anchor + o_s, o_r, m_r, o_n, m_n, OUT)
    b_wk, b_sk = add_readers(h[1], g[1], b_wk, b_sk, sizes.EARLIER, sizes)
    if sizes.READ == "chunk":
        b_wk, b_sk = add_readers(h[0], g[0], b_wk, b_sk, sizes.EARLIER, sizes)
    if i_l > 0:
        b_wk, b_sk = add_readers(h[2], g[2], b_wk, b_sk, sizes.EARLIER, sizes)
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
    return b_w, b_s, b_dw_end, b_ds_end


@triton.jit
def add_readers(b_h, b_g, b_dw, b_ds, MOMENTUM: tl.constexpr, sizes):
    """What readers give a tile; without MOMENTUM they do not read S."""
    b_ag, b_cg = b_g
    b_dw = dot(b_h, b_ag, b_dw, sizes.PRECISION)
    if MOMENTUM:
        b_ds = dot(b_h, b_cg, b_ds, sizes.PRECISION)
    return b_dw, b_ds

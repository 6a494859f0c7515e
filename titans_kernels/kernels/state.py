"""A layer's state over a block: what its keys' inputs X and errors D make of it, in float32.

    W' = a W + c S - X^T (G D)          S' = p S - X^T (P D)

The backward pass is in `state_backward`.
"""

import triton
import triton.language as tl

from .operands import dot, load, load_t, store


@triton.jit
def advance(
    p_k,
    layer,
    block,
    update,
    hidden,
    width,
    i_l: tl.constexpr,
    sizes,
    KEEP: tl.constexpr,
):
    """A layer's state to the block's end, by tiles of which W and S fit in registers."""
    IN: tl.constexpr = sizes.WIDTHS[i_l]
    OUT: tl.constexpr = sizes.WIDTHS[i_l + 1]
    BT: tl.constexpr = sizes.BT
    BH: tl.constexpr = sizes.BH
    OP: tl.constexpr = p_k.dtype.element_ty
    BU: tl.constexpr = sizes.BD if sizes.BD < 128 else 128
    SIDE: tl.constexpr = IN if i_l == 0 else OUT  # the one that BU divides
    o_i, o_u, o_h = tl.arange(0, BT), tl.arange(0, BU), tl.arange(0, BH)
    m_i = o_i < block.count
    p_x, p_d = layer.x + block.slot * BT * IN, layer.d + block.slot * BT * OUT
    b_G = tl.load(update.end + 4 + o_i)
    b_P = tl.load(update.end + 4 + BT + o_i)
    until = (width if SIDE == sizes.D else hidden) if update.moves else 0
    for i in tl.range(0, until, BU, num_stages=1, disable_licm=True):
        m_u = None if SIDE % BU == 0 else i + o_u < SIDE
        if i_l == 0:
            b_x = load_t(p_k, o_i, m_i, i + o_u, m_u, sizes.H * sizes.D)  # [BU, BT]
        else:
            b_d = load(p_d, o_i, m_i, i + o_u, m_u, OUT)  # [BT, BU]
            b_Gd, b_Pd = (-b_G[:, None] * b_d).to(OP), (-b_P[:, None] * b_d).to(OP)
        for j in tl.range(0, hidden, BH, num_stages=1, disable_licm=True):
            m_h = None if sizes.HIDDEN % BH == 0 else j + o_h < sizes.HIDDEN
            if i_l == 0:
                b_d = load(p_d, o_i, m_i, j + o_h, m_h, OUT)  # [BT, BH]
                b_Gd, b_Pd = (-b_G[:, None] * b_d).to(OP), (-b_P[:, None] * b_d).to(OP)
                o_r, o_c = i + o_u, j + o_h
                advance_tile(
                    b_x, b_Gd, b_Pd, layer, block, update, o_r, m_u, o_c, m_h, i_l, sizes, KEEP
                )
            else:
                b_h = load_t(p_x, o_i, m_i, j + o_h, m_h, IN)  # [BH, BT]
                o_r, o_c = j + o_h, i + o_u
                advance_tile(
                    b_h, b_Gd, b_Pd, layer, block, update, o_r, m_h, o_c, m_u, i_l, sizes, KEEP
                )


@triton.jit
def advance_tile(
    b_x,  # [rows, BT], inputs, transposed
    b_Gd,  # [BT, columns], errors by what they give W, and S
    b_Pd,
    layer,
    block,
    update,
    o_r,  # rows of the matrix
    m_r,
    o_c,
    m_c,
    i_l: tl.constexpr,
    sizes,
    KEEP: tl.constexpr,
):
    OUT: tl.constexpr = sizes.WIDTHS[i_l + 1]
    W: tl.constexpr = sizes.WIDTHS[i_l] * OUT
    OP: tl.constexpr = b_x.dtype
    i_s, i_b, p_end = block.state, block.slot, update.end
    i_x = i_b + sizes.H if update.more else i_b  # where the next block's readers find it
    o_old, o_new = (i_b * W, i_x * W) if KEEP else (i_s * W, i_s * W)
    a, c, p = tl.load(p_end), tl.load(p_end + 1), tl.load(p_end + 2)
    b_W = load(layer.W_exact + o_old, o_r, m_r, o_c, m_c, OUT)
    b_S = load(layer.S_exact + i_s * W, o_r, m_r, o_c, m_c, OUT)
    b_W = a * b_W + c * b_S
    b_W = dot(b_x, b_Gd, b_W, sizes.PRECISION)
    b_S = dot(b_x, b_Pd, p * b_S, sizes.PRECISION)
    store(layer.W_exact + o_new, b_W, o_r, m_r, o_c, m_c, OUT)
    store(layer.S_exact + i_s * W, b_S, o_r, m_r, o_c, m_c, OUT)
    if update.more:
        store(layer.W + i_x * W, b_W.to(OP), o_r, m_r, o_c, m_c, OUT)
        store(layer.S + i_x * W, b_S.to(OP), o_r, m_r, o_c, m_c, OUT)
    if update.whole:
        store(layer.W_anchor + i_s * W, b_W, o_r, m_r, o_c, m_c, OUT)
        store(layer.S_anchor + i_s * W, b_S, o_r, m_r, o_c, m_c, OUT)

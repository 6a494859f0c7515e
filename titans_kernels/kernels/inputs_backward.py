"""Gradients of queries, or of keys: what both have from reading the first layer.

A token that read with `(a, c, G)` and whose first product has the gradient g (`dz` there) gives

    dh = a (g W^T) + c (g S^T) - (G * (g D^T)) X          da = <h, g W^T>     dc = <h, g S^T>
    dX_i -= G_i (g . D_i) h         dD_i -= G_i (h . X_i) g         dG_i = -(h . X_i) (g . D_i)

where X are the keys themselves. Queries read with the row right after their token, keys with that
of the chunk before. Queries come before `scan_backward`, which goes on from what they give X and D
and finds what D has from keys; keys come after it, and what X has is theirs.

Grid: (sequences, blocks, heads), everything parallel.
"""

import triton
import triton.language as tl

from .blocks import block_at, block_of, query_of, query_row, start_row, start_state
from .operands import dot, load, load_t, store, store_t
from .retrieve_backward import add_rows, errors_backward


@triton.jit(do_not_specialize=["group"])
def inputs_backward_kernel(
    token,  # Tokens
    query,  # Queries: o is the gradient of the outputs
    coefficient,  # Coefficients
    layers,  # Layers: the anchor is that of a chunk begun in an earlier group, rounded
    query_layers,  # QueryLayers: z is its gradient
    grad,  # Grad: token.q and of the first layer x and d; with KEYS, x is added to token.k.
    # Of coefficients a, c, G are written or, with KEYS and where queries read as keys do, a_key,
    # c_key, G_key: added to what others have in them
    group,
    hidden,
    width,  # D
    sizes,  # Sizes
    KEYS: tl.constexpr,
):
    H: tl.constexpr = sizes.H
    D: tl.constexpr = sizes.D
    HIDDEN: tl.constexpr = sizes.HIDDEN
    BT: tl.constexpr = sizes.BT
    BR: tl.constexpr = sizes.BR
    BH: tl.constexpr = sizes.BH
    W: tl.constexpr = D * HIDDEN
    PRECISION: tl.constexpr = sizes.PRECISION
    STARTS: tl.constexpr = KEYS or sizes.READ == "chunk"  # they read what their chunk starts with
    SHARED: tl.constexpr = sizes.READ == "chunk" if KEYS else (sizes.L == 1 and sizes.DEPTH > 1)
    KNOWN: tl.constexpr = (not KEYS) and sizes.DEPTH == 1  # a and c: from unrounded products
    OP: tl.constexpr = token.k.dtype.element_ty
    ACC: tl.constexpr = coefficient.G.dtype.element_ty
    i_n, i_block, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    first, count, _ = block_of(token, i_n, group + i_block, sizes)
    if count == 0:
        return
    i_s, blocks = i_n * sizes.H + i_h, tl.num_programs(1)
    block = block_at(i_n, i_h, i_s, i_block, blocks, group, first, count, sizes)
    o_t, o_h = tl.arange(0, BT), tl.arange(0, BH)
    i_b, m_t = block.slot, o_t < count
    i_a = i_b * sizes.L * BT
    if STARTS:
        p_w, p_s = start_state(layers[0], block, 0, sizes)
        i_da = i_a if sizes.READ == "chunk" else i_b * BT
        p_da, p_dc = grad.coefficient.a_key + i_da, grad.coefficient.c_key + i_da
        p_dG = grad.coefficient.G_key + i_da * BT
    else:
        p_w, p_s = layers[0].W + i_b * W, layers[0].S + i_b * W
        p_da, p_dc = grad.coefficient.a + i_a, grad.coefficient.c + i_a
        p_dG = grad.coefficient.G + i_a * BT
    p_k = token.k + (first * H + i_h) * D
    p_d = layers[0].d + i_b * BT * HIDDEN
    p_dx = grad.layers[0].x + i_b * BT * D
    p_dd = grad.layers[0].d + i_b * BT * HIDDEN
    if KEYS:
        m_h, o_row = m_t, start_row(o_t, sizes)
        p_h, p_dh = p_k, grad.token.k + (first * H + i_h) * D
        p_g = p_dd
    else:
        i_q, tail = query_of(token, i_n, first)
        m_h, o_row = m_t & (o_t >= tail), query_row(o_t, sizes)
        o_q = (i_q * H + i_h) * D
        p_h, p_do, p_dh = query.q + o_q, query.o + o_q, grad.token.q + o_q
        p_g = query_layers[0].z + i_b * BT * HIDDEN
    m_G = m_t[None, :] & (o_t[:, None] <= o_row[None, :])

    # [BT, BT] tiles are keys by tokens.
    b_gD = tl.zeros([BT, BT], ACC)
    for j in tl.range(0, hidden, BH, num_stages=1, disable_licm=True):
        m_s = None if HIDDEN % BH == 0 else j + o_h < HIDDEN
        b_g = load_t(p_g + j, o_t, m_t, o_h, m_s, HIDDEN).to(OP)  # [BH, BT]
        b_d = load(p_d + j, o_t, m_t, o_h, m_s, HIDDEN).to(OP)  # [BT, BH]
        b_gD = dot(b_d, b_g, b_gD, PRECISION)
    b_hX = tl.zeros([BT, BT], ACC)
    for i in tl.range(0, width, BR, num_stages=1, disable_licm=True):
        o_r = tl.arange(0, BR)
        m_r = None if D % sizes.BR == 0 else i + o_r < D
        b_k = load(p_k + i, o_t, m_t, o_r, m_r, H * D)  # [BT, BR]
        b_h = load_t(p_h + i, o_t, m_h, o_r, m_r, H * D)  # [BR, BT]
        b_hX = dot(b_k, b_h, b_hX, PRECISION)
    b_dG = -b_hX * b_gD
    o_G = o_t[None, :] * BT + o_t[:, None]
    if SHARED:
        b_dG += tl.load(p_dG + o_G, mask=m_G, other=0.0)
        tl.debug_barrier()
    tl.store(p_dG + o_G, b_dG, mask=m_G)
    p_G = coefficient.G + i_a * BT
    b_G = -tl.load(p_G + o_row[None, :] * BT + o_t[:, None], mask=m_G, other=0.0)
    if not KEYS:
        errors_backward((b_G * b_hX).to(OP), p_g, p_dd, m_t, hidden, HIDDEN, BH, sizes)
    b_w = (b_G * b_gD).to(OP)
    if KEYS:  # of the keys that are read and of those that read, which never are one pair
        b_w += tl.trans(b_w)
    b_a = tl.load(coefficient.a + i_a + o_row, mask=o_row >= 0, other=1.0)
    b_c = tl.load(coefficient.c + i_a + o_row, mask=o_row >= 0, other=0.0)

    b_da = tl.zeros([BT], ACC)
    b_dc = tl.zeros([BT], ACC)
    for i in tl.range(0, width, BR, num_stages=1, disable_licm=True):
        o_r = i + tl.arange(0, BR)
        m_r = None if D % BR == 0 else o_r < D
        b_gW = tl.zeros([BR, BT], ACC)
        b_gS = tl.zeros([BR, BT], ACC)
        for j in tl.range(0, hidden, BH, num_stages=1, disable_licm=True):
            m_s = None if HIDDEN % BH == 0 else j + o_h < HIDDEN
            b_g = load_t(p_g + j, o_t, m_t, o_h, m_s, HIDDEN).to(OP)  # [BH, BT]
            b_m = load(p_w + j, o_r, m_r, o_h, m_s, HIDDEN)  # [BR, BH]
            b_gW = dot(b_m, b_g, b_gW, PRECISION)
            b_m = load(p_s + j, o_r, m_r, o_h, m_s, HIDDEN)
            b_gS = dot(b_m, b_g, b_gS, PRECISION)

        b_h = load_t(p_h, o_t, m_h, o_r, m_r, H * D)  # [BR, BT]
        b_da += tl.sum(b_h.to(ACC) * b_gW, 0)
        b_dc += tl.sum(b_h.to(ACC) * b_gS, 0)

        b_dh = b_a[None, :] * b_gW + b_c[None, :] * b_gS
        if KEYS:
            b_dh = dot(b_h, b_w, b_dh, PRECISION)
            b_dh += load_t(p_dx, o_t, m_t, o_r, m_r, D)
        else:
            b_k = load_t(p_k, o_t, m_t, o_r, m_r, H * D)  # [BR, BT]
            b_dh = dot(b_k, b_w, b_dh, PRECISION)
            if sizes.RESIDUAL:
                b_dh += load_t(p_do, o_t, m_h, o_r, m_r, H * D).to(ACC)
            b_h = load(p_h, o_t, m_h, o_r, m_r, H * D)  # [BT, BR]
            store(p_dx, dot(b_w, b_h, None, PRECISION), o_t, m_t, o_r, m_r, D)
        store_t(p_dh, b_dh, o_t, m_h, o_r, m_r, H * D)

    if not KNOWN:
        add_rows(p_da, b_da, o_t, m_t, SHARED)
        add_rows(p_dc, b_dc, o_t, m_t, SHARED)

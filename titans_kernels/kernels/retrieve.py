"""Outputs of queries: every token reads with the weights right after itself.

    z_l = a_t (h_l W_l) + c_t (h_l S_l) - sum_{i <= t} G[t, i] (h_l . X_l,i) D_l,i

where `h_1` is the query and `h_{i_l+1} = act(z_l)`.

Grid: (sequences, blocks, heads x BT // BQ), everything parallel, BQ queries to a program. Reads the
states, inputs and errors that `scan` left.
"""

import triton
import triton.language as tl

from .blocks import block_at, block_of, query_of, query_row, start_state
from .network import activate, head
from .operands import dot, load, load_t, store_t
from .records import Read


@triton.jit(do_not_specialize=["group"])
def retrieve_kernel(
    token,  # Tokens
    query,  # Queries: o is written or, with KEEP, parts
    coefficient,  # Coefficients
    layers,  # Layers
    query_layers,  # QueryLayers, out: the inputs of layers between two others, with KEEP all
    p_norm,  # [H, 2, D]
    group,
    hidden,
    sizes,  # Sizes
    KEEP: tl.constexpr,  # for the backward pass
):
    PARTS: tl.constexpr = sizes.BT // sizes.BQ
    i_n, i_block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_h = tl.program_id(2) // PARTS
    skipped = tl.program_id(2) % PARTS * sizes.BQ  # queries of the block, to others
    first, count, _ = block_of(token, i_n, group + i_block, sizes)
    if count <= skipped:
        return
    i_s, blocks = i_n * sizes.H + i_h, tl.num_programs(1)
    block = block_at(i_n, i_h, i_s, i_block, blocks, group, first, count, sizes)
    read_block(
        token, query, coefficient, layers, query_layers, p_norm, block, skipped, hidden, sizes, KEEP
    )


@triton.jit
def read_block(
    token,
    query,
    coefficient,
    layers,
    query_layers,
    p_norm,  # [H, 2, D]
    block,
    skipped,
    hidden,
    sizes,
    KEEP: tl.constexpr,
):
    """Outputs of a block's queries, BQ of them."""
    H: tl.constexpr = sizes.H
    D: tl.constexpr = sizes.D
    BT: tl.constexpr = sizes.BT
    BQ: tl.constexpr = sizes.BQ
    LAST: tl.constexpr = sizes.DEPTH - 1
    i_h, i_b, count = block.h, block.slot, block.count
    i_q, tail = query_of(token, block.n, block.first)
    o_q, o_t, o_d = skipped + tl.arange(0, BQ), tl.arange(0, BT), tl.arange(0, sizes.BD)
    m_t, m_d = o_t < count, o_d < D
    m_r, m_q = o_q < count, (o_q < count) & (o_q >= tail)

    OP: tl.constexpr = token.k.dtype.element_ty
    ACC: tl.constexpr = coefficient.G.dtype.element_ty
    o_k = (i_q * H + i_h) * D
    p_q, p_o = query.q + o_k, query.o + o_k
    p_k = token.k + (block.first * H + i_h) * D
    p_d = layers[LAST].d + i_b * BT * D
    b_q = load_t(p_q, o_q, m_q, o_d, m_d, H * D)  # [BD, BQ]
    b_k = load(p_k, o_t, m_t, o_d, m_d, H * D)  # [BT, BD]
    o_row = query_row(o_q, sizes)
    b_a, b_c, b_G = rows_of(coefficient, i_b * sizes.L, o_row, sizes, "")
    b_s = (-b_G * dot(b_k, b_q, None, sizes.PRECISION)).to(OP)  # [BT, BQ]

    b_W = tl.zeros([sizes.BD, BQ], ACC)
    b_S = tl.zeros([sizes.BD, BQ], ACC)
    if LAST == 0:
        b_W, b_S = only_layer(p_q, layers[0], b_W, b_S, block, o_q, m_q, hidden, sizes)
    else:
        for i_l in tl.static_range(LAST):
            read = Read(b_q, b_a, b_c, b_s, b_W, b_S)
            b_xx, b_W, b_S = hidden_layer(
                read, layers, query_layers, block, o_q, hidden, i_l, sizes, KEEP
            )
            # What G, a and c were loaded for first would fill registers all along. The modifier
            # only keeps the compiler from merging these loads with the first.
            i_a = i_b * sizes.L + sizes.GATES[i_l + 1]
            b_a, b_c, b_G = rows_of(coefficient, i_a, o_row, sizes, ".ca")
            b_s = (-b_G * b_xx).to(OP)
    b_d = load_t(p_d, o_t, m_t, o_d, m_d, D).to(OP)  # [BD, BT]
    b_y = b_a[None, :] * b_W + b_c[None, :] * b_S
    if sizes.HISTORY:
        b_y = dot(b_d, b_s, b_y, sizes.PRECISION)

    if KEEP:
        p_part = query.parts + 2 * i_b * BT * D
        store_t(query_layers[LAST].z + i_b * BT * D, b_y, o_q, m_r, o_d, m_d, D)
        store_t(p_part, b_W, o_q, m_r, o_d, m_d, D)
        store_t(p_part + BT * D, b_S, o_q, m_r, o_d, m_d, D)
    else:
        o, m = o_q[None, :] * (H * D) + o_d[:, None], m_q[None, :] & m_d[:, None]
        b_q = tl.load(p_q + o, mask=m, other=0.0, cache_modifier=".ca")
        b_o = head(b_y, b_q.to(ACC), p_norm + i_h * 2 * D, o_d, m_d, sizes)
        tl.store(p_o + o, b_o.to(p_o.dtype.element_ty), mask=m)


@triton.jit
def rows_of(coefficient, i_a, o_row, sizes, MODIFIER: tl.constexpr):
    """a, c [BQ] and G [BT, BQ] of the rows that queries read with."""
    BT: tl.constexpr = sizes.BT
    p_a, p_c = coefficient.a + i_a * BT + o_row, coefficient.c + i_a * BT + o_row
    p_G = coefficient.G + i_a * BT * BT + o_row[None, :] * BT + tl.arange(0, BT)[:, None]
    if sizes.READ == "token":
        b_a, b_c = tl.load(p_a, cache_modifier=MODIFIER), tl.load(p_c, cache_modifier=MODIFIER)
        return b_a, b_c, tl.load(p_G, cache_modifier=MODIFIER)
    else:
        m = o_row >= 0
        b_a = tl.load(p_a, mask=m, other=1.0, cache_modifier=MODIFIER)
        b_c = tl.load(p_c, mask=m, other=0.0, cache_modifier=MODIFIER)
        return b_a, b_c, tl.load(p_G, mask=m[None, :], other=0.0, cache_modifier=MODIFIER)


@triton.jit
def state_of(layer, block, i_l: tl.constexpr, sizes):
    """The state that queries read, with a share of history: the block's, or their chunk's."""
    o = block.slot * sizes.WIDTHS[i_l] * sizes.WIDTHS[i_l + 1]
    p_W, p_S = layer.W + o, layer.S + o
    if sizes.READ == "chunk":
        p_W, p_S = start_state(layer, block, i_l, sizes)
    return p_W, p_S


@triton.jit
def only_layer(p_q, layer, b_W, b_S, block, o_q, m_q, hidden, sizes):
    """Queries through W and S where there is one layer: its inputs come in slices too."""
    D: tl.constexpr = sizes.D
    OP: tl.constexpr = p_q.dtype.element_ty
    o_d, o_h = tl.arange(0, sizes.BD), tl.arange(0, sizes.BH)
    m_d = o_d < D
    p_W, p_S = state_of(layer, block, 0, sizes)
    for j in tl.range(0, hidden, sizes.BH, disable_licm=True):
        m_h = None if D % sizes.BH == 0 else j + o_h < D
        b_x = load_t(p_q + j, o_q, m_q, o_h, m_h, sizes.H * D)  # [BH, BQ]
        b_w = load_t(p_W, j + o_h, m_h, o_d, m_d, D).to(OP)  # [BD, BH]
        b_W = dot(b_w, b_x, b_W, sizes.PRECISION)
        if sizes.HISTORY:
            b_w = load_t(p_S, j + o_h, m_h, o_d, m_d, D).to(OP)
            b_S = dot(b_w, b_x, b_S, sizes.PRECISION)
    return b_W, b_S


@triton.jit
def hidden_layer(
    read,
    layers,
    query_layers,
    block,
    o_q,  # [BQ], the queries' rows of the block
    hidden,
    i_l: tl.constexpr,
    sizes,
    KEEP: tl.constexpr,
):
    """Products of a layer that is not the last, and what the next one makes of them.

    That is keys' inputs by queries', [BT, BQ], and where it is the last W and S.
    """
    layer, above = layers[i_l], layers[i_l + 1]
    b_q, b_a, b_c, b_s, b_W, b_S = read
    D: tl.constexpr = sizes.D
    HIDDEN: tl.constexpr = sizes.HIDDEN
    BT: tl.constexpr = sizes.BT
    OP: tl.constexpr = b_q.dtype
    o_t, o_d, o_h = tl.arange(0, BT), tl.arange(0, sizes.BD), tl.arange(0, sizes.BH)
    m_t, m_d, m_r = o_t < block.count, o_d < D, o_q < block.count
    o_b = block.slot * BT * HIDDEN
    p_W, p_S = state_of(layer, block, i_l, sizes)
    p_W_above, p_S_above = state_of(above, block, i_l + 1, sizes)
    b_xx = tl.zeros([BT, sizes.BQ], b_W.dtype)
    if i_l > 0:  # reads what the layer below stored
        tl.debug_barrier()
    for j in tl.range(0, hidden, sizes.BH, disable_licm=True):
        m_h = None if HIDDEN % sizes.BH == 0 else j + o_h < HIDDEN
        if i_l == 0:
            b_w = load_t(p_W, o_d, m_d, j + o_h, m_h, HIDDEN).to(OP)  # [BH, BD]
            b_z = b_a[None, :] * dot(b_w, b_q, None, sizes.PRECISION)  # [BH, BQ]
            if sizes.HISTORY:
                b_w = load_t(p_S, o_d, m_d, j + o_h, m_h, HIDDEN).to(OP)
                b_z += b_c[None, :] * dot(b_w, b_q, None, sizes.PRECISION)
        else:
            b_zW = tl.zeros([sizes.BH, sizes.BQ], b_W.dtype)
            b_zS = tl.zeros([sizes.BH, sizes.BQ], b_W.dtype)
            for i in tl.range(0, hidden, sizes.BH, num_stages=1, disable_licm=True):
                m_i = None if HIDDEN % sizes.BH == 0 else i + o_h < HIDDEN
                b_x = load_t(query_layers[i_l].h + o_b, o_q, m_r, i + o_h, m_i, HIDDEN)  # [BH, BQ]
                b_w = load_t(p_W, i + o_h, m_i, j + o_h, m_h, HIDDEN).to(OP)  # [BH, BH]
                b_zW = dot(b_w, b_x, b_zW, sizes.PRECISION)
                if sizes.HISTORY:
                    b_w = load_t(p_S, i + o_h, m_i, j + o_h, m_h, HIDDEN).to(OP)
                    b_zS = dot(b_w, b_x, b_zS, sizes.PRECISION)
            b_z = b_a[None, :] * b_zW + b_c[None, :] * b_zS
        if sizes.HISTORY:
            b_d = load_t(layer.d + o_b, o_t, m_t, j + o_h, m_h, HIDDEN).to(OP)  # [BH, BT]
            b_z = dot(b_d, b_s, b_z, sizes.PRECISION)
        b_h = activate(b_z, sizes.ACTIVATION).to(OP)
        if KEEP:
            store_t(query_layers[i_l].z + o_b, b_z, o_q, m_r, j + o_h, m_h, HIDDEN)
        if KEEP or i_l + 2 < sizes.DEPTH:
            store_t(query_layers[i_l + 1].h + o_b, b_h, o_q, m_r, j + o_h, m_h, HIDDEN)

        if sizes.HISTORY:
            b_x = load(above.x + o_b, o_t, m_t, j + o_h, m_h, HIDDEN)  # [BT, BH]
            b_xx = dot(b_x, b_h, b_xx, sizes.PRECISION)
        if i_l + 2 == sizes.DEPTH:
            b_w = load_t(p_W_above, j + o_h, m_h, o_d, m_d, D).to(OP)  # [BD, BH]
            b_W = dot(b_w, b_h, b_W, sizes.PRECISION)
            if sizes.HISTORY:
                b_w = load_t(p_S_above, j + o_h, m_h, o_d, m_d, D).to(OP)
                b_S = dot(b_w, b_h, b_S, sizes.PRECISION)
    return b_xx, b_W, b_S

"""Learning: errors of every key and the state from block to block, the only sequential pass.

Inside a block, chunk after chunk, with the coefficients of the weights the chunk starts with:

    z_l = a (x_l W_l) + c (x_l S_l) - (G * (x_l X_l^T)) D_l        over strictly earlier chunks
    e_l = a (d_l W_l^T) + c (d_l S_l^T) - (G * (d_l D_l^T)) X_l

where `x_1` is the key, `x_{i_l+1} = act(z_l)`, the last `d_l` the gradient of ||f(k) - v||^2, and
`d_l = e_{i_l+1} act'(z_l)`.

At the block's end `advance` moves the state (`state.py`).

Grid: (sequences, heads). A program walks its blocks of one group. All products of a chunk are
transposed, the hidden dimension in slices on the rows. What one thread stores others load, so a
barrier stands between; loops that store what they load are not pipelined.
"""

import triton
import triton.language as tl

from .blocks import block_at, block_of, chunk_at, history, start_row, weights_of
from .network import activate, error, slope
from .operands import dot, load, load_t, store_t
from .records import Update
from .state import advance


@triton.jit(do_not_specialize=["group", "blocks", "chunks"])
def scan_kernel(
    token,  # Tokens
    coefficient,  # Coefficients
    layers,  # Layers: all but e are written, with KEEP that too
    p_norm,  # [H, 2, D]
    group,  # the first block of the group
    blocks,
    chunks,  # to a block
    hidden,  # the hidden width, and
    width,  # D: where loops over them end, known at run time only
    sizes,  # Sizes
    KEEP: tl.constexpr,  # for the backward pass
):
    H: tl.constexpr = sizes.H
    i_n, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_s = i_n * H + i_h
    p_norm += i_h * 2 * sizes.D

    for i_block in tl.range(0, blocks, num_stages=1, disable_licm=True):
        first, count, learned = block_of(token, i_n, group + i_block, sizes)
        if count > 0:
            block = block_at(i_n, i_h, i_s, i_block, blocks, group, first, count, sizes)
            o_k = (first * H + i_h) * sizes.D
            p_k, p_v = token.k + o_k, token.v + o_k
            block_of_keys(p_k, p_v, layers, coefficient, p_norm, block, chunks, hidden, sizes, KEEP)

            # A block that is all open chunk, as in decoding, hands on the state it was given.
            moves = learned > 0
            more = (i_block + 1 < blocks) & moves
            if KEEP:  # a state for every block of the group: that of the next group is not its own
                moves = more
            whole = (sizes.SPAN > 1) & ((group + i_block + 1) % sizes.SPAN == 0)
            if sizes.SPAN > 1:  # the last block of a chunk that lacks tokens does not make it whole
                whole = whole & (count == sizes.CHUNK - (sizes.SPAN - 1) * sizes.TOKENS)
            for i_l in tl.static_range(sizes.DEPTH):
                o_end = (block.slot * sizes.L + sizes.GATES[i_l]) * (4 + 2 * sizes.BT)
                update = Update(coefficient.end + o_end, moves, more, whole)
                advance(p_k, layers[i_l], block, update, hidden, width, i_l, sizes, KEEP)
            tl.debug_barrier()


@triton.jit
def block_of_keys(
    p_k,  # [BT, D], the block's tokens
    p_v,
    layers,
    coefficient,
    p_norm,  # [2, D]
    block,
    chunks,
    hidden,
    sizes,
    KEEP: tl.constexpr,
):
    """Inputs and errors of all the block's keys, chunk after chunk."""
    first_products(p_k, layers[0], coefficient, block, hidden, sizes, KEEP)
    tl.debug_barrier()
    first = tl.full([], 0, tl.int32)
    chunk_of_keys(p_k, p_v, layers, coefficient, p_norm, block, first, hidden, sizes, KEEP, False)
    tl.debug_barrier()
    if sizes.EARLIER:
        for r in tl.range(1, chunks, num_stages=1, disable_licm=True):
            chunk_of_keys(
                p_k, p_v, layers, coefficient, p_norm, block, r, hidden, sizes, KEEP, True
            )
            tl.debug_barrier()


@triton.jit
def first_products(p_k, layer, coefficient, block, hidden, sizes, KEEP: tl.constexpr):
    """`a (k W) + c (k S)` does not depend on the order of chunks: one product for the block."""
    D: tl.constexpr = sizes.D
    BT: tl.constexpr = sizes.BT
    BH: tl.constexpr = sizes.BH
    OUT: tl.constexpr = sizes.HIDDEN
    OP: tl.constexpr = p_k.dtype.element_ty
    o_i, o_d, o_h = tl.arange(0, BT), tl.arange(0, sizes.BD), tl.arange(0, BH)
    m_i, m_d = o_i < block.count, o_d < D
    p_W, p_S = state_of(layer, block, 0, sizes)
    p_z = layer.z + z_of(block, KEEP) * BT * OUT
    o_row = start_row(o_i, sizes)
    o_a = block.slot * sizes.L * BT
    b_a = tl.load(coefficient.a + o_a + o_row, mask=o_row >= 0, other=1.0)  # [BT]
    b_c = tl.load(coefficient.c + o_a + o_row, mask=o_row >= 0, other=0.0)
    b_k = load_t(p_k, o_i, m_i, o_d, m_d, sizes.H * D)  # [BD, BT]
    for j in tl.range(0, hidden, BH, num_stages=1, disable_licm=True):
        m_h = None if OUT % BH == 0 else j + o_h < OUT
        b_w = load_t(p_W, o_d, m_d, j + o_h, m_h, OUT).to(OP)  # [BH, BD]
        b_z = dot(b_w, b_k, None, sizes.PRECISION)
        if sizes.EARLIER:
            b_w = load_t(p_S, o_d, m_d, j + o_h, m_h, OUT).to(OP)
            b_z = b_a[None, :] * b_z + b_c[None, :] * dot(b_w, b_k, None, sizes.PRECISION)
        store_t(p_z, b_z, o_i, m_i, j + o_h, m_h, OUT)


@triton.jit
def chunk_of_keys(
    p_k,
    p_v,
    layers,
    coefficient,
    p_norm,
    block,
    r,  # which chunk of it
    hidden,
    sizes,
    KEEP: tl.constexpr,
    EARLIER: tl.constexpr,  # the block has chunks before it; else it reads no history, and W alone
):
    """The memory's products on a chunk, then its errors, back through the layers."""
    D: tl.constexpr = sizes.D
    BT: tl.constexpr = sizes.BT
    LAST: tl.constexpr = sizes.DEPTH - 1
    ACC: tl.constexpr = coefficient.a.dtype.element_ty
    OP: tl.constexpr = p_k.dtype.element_ty
    chunk = chunk_at(block, r, sizes)
    o_c, m_c, m_p = chunk.tokens, chunk.mask, chunk.earlier
    o_i, o_d = tl.arange(0, BT), tl.arange(0, sizes.BD)
    m_d = o_d < D
    b_k = load_t(p_k, o_c, m_c, o_d, m_d, sizes.H * D)  # [BD, BC]
    b_v = load_t(p_v, o_c, m_c, o_d, m_d, sizes.H * D)
    b_s = tl.zeros([BT, sizes.BC], OP)
    if EARLIER:
        b_p = load(p_k, o_i, m_p, o_d, m_d, sizes.H * D)  # [BT, BD]
        b_g = history(coefficient, block, chunk, 0, sizes)
        b_s = (b_g[:, None] * dot(b_p, b_k, None, sizes.PRECISION)).to(OP)

    p_d = layers[LAST].d + block.slot * BT * D
    p_y = layers[LAST].z + z_of(block, KEEP) * BT * D
    if LAST == 0:
        b_y = load_t(p_y, o_c, m_c, o_d, m_d, D)  # [BD, BC]
        if KEEP:  # stored below
            tl.debug_barrier()
    else:
        for i_l in tl.static_range(LAST):
            layer, above = layers[i_l], layers[i_l + 1]
            b_s, b_y = hidden_layer(
                layer, above, coefficient, b_s, block, chunk, hidden, i_l, sizes, KEEP, EARLIER
            )
    if EARLIER:
        b_d = load_t(p_d, o_i, m_p, o_d, m_d, D).to(OP)  # [BD, BT]
        b_y = dot(b_d, b_s, b_y, sizes.PRECISION)
    if KEEP:
        store_t(p_y, b_y, o_c, m_c, o_d, m_d, D)

    b_e = error(b_y, b_k.to(ACC), b_v.to(ACC), p_norm, o_d, m_d, sizes)  # [BD, BC]
    store_t(p_d, b_e, o_c, m_c, o_d, m_d, D)
    if LAST > 0:
        b_s = tl.zeros([BT, sizes.BC], ACC)
        if EARLIER:
            b_d = load(p_d, o_i, m_p, o_d, m_d, D).to(OP)  # [BT, BD]
            b_s = dot(b_d, b_e.to(OP), None, sizes.PRECISION)
        for back in tl.static_range(LAST):
            below, layer = layers[LAST - back - 1], layers[LAST - back]
            b_s = hidden_errors(
                below,
                layer,
                coefficient,
                b_s,
                b_e,
                block,
                chunk,
                hidden,
                LAST - back,
                sizes,
                KEEP,
                EARLIER,
            )


@triton.jit
def hidden_layer(
    layer,
    above,  # the next layer
    coefficient,
    b_s,  # [BT, BC], earlier inputs by the chunk's, weighted
    block,
    chunk,
    hidden,
    i_l: tl.constexpr,
    sizes,
    KEEP: tl.constexpr,
    EARLIER: tl.constexpr,
):
    """Products of a layer that is not the last, and what the next one makes of them.

    That is b_s of the next layer and, where it is the last, `a (x W) + c (x S)`, [BD, BC].
    """
    o_c, m_c, m_p = chunk.tokens, chunk.mask, chunk.earlier
    D: tl.constexpr = sizes.D
    HIDDEN: tl.constexpr = sizes.HIDDEN
    BT: tl.constexpr = sizes.BT
    BH: tl.constexpr = sizes.BH
    ACC: tl.constexpr = coefficient.a.dtype.element_ty
    OP: tl.constexpr = above.x.dtype.element_ty
    o_i, o_d, o_h = tl.arange(0, BT), tl.arange(0, sizes.BD), tl.arange(0, BH)
    m_d = o_d < D
    p_z = layer.z + z_of(block, KEEP) * BT * HIDDEN
    p_d, p_x = layer.d + block.slot * BT * HIDDEN, above.x + block.slot * BT * HIDDEN
    if i_l > 0:  # x of the layer below
        tl.debug_barrier()
    p_W, p_S = state_of(above, block, i_l + 1, sizes)
    a, c = weights_of(coefficient, block, chunk, i_l + 1, sizes)
    b_g = history(coefficient, block, chunk, i_l + 1, sizes)
    b_xx = tl.zeros([BT, sizes.BC], ACC)
    b_W = tl.zeros([sizes.BD, sizes.BC], ACC)
    b_S = tl.zeros([sizes.BD, sizes.BC], ACC)
    for j in tl.range(0, hidden, BH, num_stages=1, disable_licm=True):
        m_h = None if HIDDEN % BH == 0 else j + o_h < HIDDEN
        if EARLIER:
            b_d = load_t(p_d, o_i, m_p, j + o_h, m_h, HIDDEN).to(OP)  # [BH, BT]
        if i_l == 0:
            b_z = load_t(p_z, o_c, m_c, j + o_h, m_h, HIDDEN)  # [BH, BC]
        else:
            b_z = products(layer, coefficient, block, chunk, j, hidden, i_l, sizes, EARLIER)
        if EARLIER:
            b_z = dot(b_d, b_s, b_z, sizes.PRECISION)
        # The slope waits where the error will stand that it is a factor of.
        store_t(p_d, slope(b_z, sizes.ACTIVATION), o_c, m_c, j + o_h, m_h, HIDDEN)
        b_h = activate(b_z, sizes.ACTIVATION).to(OP)
        store_t(p_x, b_h, o_c, m_c, j + o_h, m_h, HIDDEN)
        if KEEP:
            store_t(p_z, b_z, o_c, m_c, j + o_h, m_h, HIDDEN)

        if EARLIER:
            b_x = load(p_x, o_i, m_p, j + o_h, m_h, HIDDEN)  # [BT, BH]
            b_xx = dot(b_x, b_h, b_xx, sizes.PRECISION)
        if i_l + 2 == sizes.DEPTH:
            b_w = load_t(p_W, j + o_h, m_h, o_d, m_d, D).to(OP)  # [BD, BH]
            b_W = dot(b_w, b_h, b_W, sizes.PRECISION)
            if EARLIER:
                b_w = load_t(p_S, j + o_h, m_h, o_d, m_d, D).to(OP)
                b_S = dot(b_w, b_h, b_S, sizes.PRECISION)
    return (b_g[:, None] * b_xx).to(OP), a * b_W + c * b_S


@triton.jit
def products(
    layer, coefficient, block, chunk, j, hidden, i_l: tl.constexpr, sizes, EARLIER: tl.constexpr
):
    """A slice of `a (x W) + c (x S)` between two hidden layers, [BH, BC]."""
    o_c, m_c = chunk.tokens, chunk.mask
    HIDDEN: tl.constexpr = sizes.HIDDEN
    BH: tl.constexpr = sizes.BH
    OP: tl.constexpr = layer.x.dtype.element_ty
    ACC: tl.constexpr = coefficient.a.dtype.element_ty
    o_h = tl.arange(0, BH)
    m_h = None if HIDDEN % BH == 0 else j + o_h < HIDDEN
    p_W, p_S = state_of(layer, block, i_l, sizes)
    p_x = layer.x + block.slot * sizes.BT * HIDDEN
    a, c = weights_of(coefficient, block, chunk, i_l, sizes)
    b_zW = tl.zeros([BH, sizes.BC], ACC)
    b_zS = tl.zeros([BH, sizes.BC], ACC)
    for i in tl.range(0, hidden, BH, num_stages=1, disable_licm=True):
        m_i = None if HIDDEN % BH == 0 else i + o_h < HIDDEN
        b_x = load_t(p_x, o_c, m_c, i + o_h, m_i, HIDDEN)  # [BH, BC]
        b_w = load_t(p_W, i + o_h, m_i, j + o_h, m_h, HIDDEN).to(OP)  # [BH, BH]
        b_zW = dot(b_w, b_x, b_zW, sizes.PRECISION)
        if EARLIER:
            b_w = load_t(p_S, i + o_h, m_i, j + o_h, m_h, HIDDEN).to(OP)
            b_zS = dot(b_w, b_x, b_zS, sizes.PRECISION)
    return a * b_zW + c * b_zS


@triton.jit
def z_of(block, KEEP: tl.constexpr):
    """Where a block's products stand: for the backward pass every block has its own."""
    return block.slot if KEEP else block.state


@triton.jit
def state_of(layer, block, i_l: tl.constexpr, sizes):
    """The state that keys read: the block's, or that of the chunk it is a part of."""
    o = (block.slot if sizes.SPAN == 1 else block.state) * sizes.WIDTHS[i_l] * sizes.WIDTHS[i_l + 1]
    if sizes.SPAN == 1:
        return layer.W + o, layer.S + o
    else:
        return layer.W_anchor + o, layer.S_anchor + o


@triton.jit
def hidden_errors(
    below,  # the layer before
    layer,
    coefficient,
    b_s,  # [BT, BC], earlier errors of the layer by the chunk's
    b_e,  # [BD, BC], the last layer's errors
    block,
    chunk,
    hidden,
    i_l: tl.constexpr,
    sizes,
    KEEP: tl.constexpr,
    EARLIER: tl.constexpr,
):
    """Errors of a layer's inputs, then of the products below it; returns b_s of those."""
    o_c, m_c, m_p = chunk.tokens, chunk.mask, chunk.earlier
    D: tl.constexpr = sizes.D
    HIDDEN: tl.constexpr = sizes.HIDDEN
    BT: tl.constexpr = sizes.BT
    BH: tl.constexpr = sizes.BH
    OP: tl.constexpr = layer.x.dtype.element_ty
    ACC: tl.constexpr = b_s.dtype
    o_i, o_d, o_h = tl.arange(0, BT), tl.arange(0, sizes.BD), tl.arange(0, BH)
    m_d = o_d < D
    p_x, p_e = layer.x + block.slot * BT * HIDDEN, layer.e + block.slot * BT * HIDDEN
    p_d = below.d + block.slot * BT * HIDDEN
    p_W, p_S = state_of(layer, block, i_l, sizes)
    a, c = weights_of(coefficient, block, chunk, i_l, sizes)
    b_g = history(coefficient, block, chunk, i_l, sizes)
    b_s = (b_g[:, None] * b_s).to(OP)
    if i_l + 1 == sizes.DEPTH:
        b_ae, b_ce = (a * b_e).to(OP), (c * b_e).to(OP)
    b_dd = tl.zeros([BT, sizes.BC], ACC)
    tl.debug_barrier()
    for j in tl.range(0, hidden, BH, num_stages=1, disable_licm=True):
        m_h = None if HIDDEN % BH == 0 else j + o_h < HIDDEN
        if i_l + 1 == sizes.DEPTH:
            b_w = load(p_W, j + o_h, m_h, o_d, m_d, D).to(OP)  # [BH, BD]
            b_h = dot(b_w, b_ae, None, sizes.PRECISION)
            if EARLIER:
                b_w = load(p_S, j + o_h, m_h, o_d, m_d, D).to(OP)
                b_h = dot(b_w, b_ce, b_h, sizes.PRECISION)
        else:
            b_hW = tl.zeros([BH, sizes.BC], ACC)
            b_hS = tl.zeros([BH, sizes.BC], ACC)
            for i in tl.range(0, hidden, BH, num_stages=1, disable_licm=True):
                m_i = None if HIDDEN % BH == 0 else i + o_h < HIDDEN
                p_o = layer.d + block.slot * BT * HIDDEN
                b_d = load_t(p_o, o_c, m_c, i + o_h, m_i, HIDDEN).to(OP)  # [BH, BC]
                b_w = load(p_W, j + o_h, m_h, i + o_h, m_i, HIDDEN).to(OP)  # [BH, BH]
                b_hW = dot(b_w, b_d, b_hW, sizes.PRECISION)
                if EARLIER:
                    b_w = load(p_S, j + o_h, m_h, i + o_h, m_i, HIDDEN).to(OP)
                    b_hS = dot(b_w, b_d, b_hS, sizes.PRECISION)
            b_h = a * b_hW + c * b_hS
        if EARLIER:
            b_x = load_t(p_x, o_i, m_p, j + o_h, m_h, HIDDEN)  # [BH, BT]
            b_h = dot(b_x, b_s, b_h, sizes.PRECISION)
        if KEEP:
            store_t(p_e, b_h, o_c, m_c, j + o_h, m_h, HIDDEN)
        b_h *= load_t(p_d, o_c, m_c, j + o_h, m_h, HIDDEN)  # the slope
        if i_l > 1:  # warps that hold the same rows load them all before one stores
            tl.debug_barrier()
        store_t(p_d, b_h, o_c, m_c, j + o_h, m_h, HIDDEN)
        if EARLIER and i_l > 1:
            b_d = load(p_d, o_i, m_p, j + o_h, m_h, HIDDEN).to(OP)  # [BT, BH]
            b_dd = dot(b_d, b_h.to(OP), b_dd, sizes.PRECISION)
    return b_dd

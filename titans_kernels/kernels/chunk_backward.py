"""A chunk of `scan` backwards: gradients of its keys' products, inputs and errors.

With the coefficients (a, c, G) of the weights the chunk starts with,
`pull(x) = a (x W) + c (x S) - (G * (x X^T)) D` and `push(d)` its transpose, what a chunk computes,

    z_l = pull_l(x_l)     x_{i_l+1} = act(z_l)     d = error(y)     e_l = push_l(d_l)
    d_{l-1} = e_l act'(z_{l-1})

has these gradients, layer by layer up to the last one and then down again:

    de_l = dd_{l-1} act'(z_{l-1})     dd_l += pull_l(de_l)     dy = error'(dd)
    dx_l += push_l(dz_l)       dz_{l-1} = dd_{l-1} e_l act''(z_{l-1}) + dx_l act'(z_{l-1})

where dd_l and dx_l have what every later chunk gave them: (de_l, d_l) and (x_l, dz_l) read layer l,
and a reader (h, g) gives the rows of its history

    dX_i -= G_i (g . D_i) h          dD_i -= G_i (h . X_i) g
"""

import triton
import triton.language as tl

from .blocks import chunk_at, history, start_state, weights_of
from .network import curvature, error_backward, slope
from .operands import dot, load, load_t, store_t
from .records import ErrorsBackward


@triton.jit
def chunk_backward(
    tokens,  # BlockTokens
    layers,
    coefficient,
    grad,
    p_norm,  # [2, D]
    block,
    r,  # which chunk of it
    ends,
    sizes,
):
    D: tl.constexpr = sizes.D
    BT: tl.constexpr = sizes.BT
    OP: tl.constexpr = tokens.k.dtype.element_ty
    ACC: tl.constexpr = coefficient.G.dtype.element_ty
    chunk = chunk_at(block, r, sizes)
    o_c, m_c, m_l = chunk.tokens, chunk.mask, chunk.later
    o_i, o_r = tl.arange(0, BT), tl.arange(0, sizes.BR)

    # keys by keys: later ones by the chunk's, [BT, BC]
    b_s = tl.zeros([BT, sizes.BC], ACC)
    if sizes.EARLIER:
        for i in tl.range(0, ends.width, sizes.BR, num_stages=1, disable_licm=True):
            m_r = None if D % sizes.BR == 0 else i + o_r < D
            b_l = load(tokens.k, o_i, m_l, i + o_r, m_r, sizes.H * D)  # [BT, BR]
            b_k = load_t(tokens.k, o_c, m_c, i + o_r, m_r, sizes.H * D)  # [BR, BC]
            b_s = dot(b_l, b_k, b_s, sizes.PRECISION)
        # what later keys read the first layer with of the chunk's errors
        b_s = later(coefficient, block, chunk, 0, sizes) * b_s
    b_s = b_s.to(OP)

    if sizes.DEPTH == 1:
        p_dd = grad.layers[0].d + block.slot * BT * D
        for i in tl.range(0, ends.width, sizes.BR, num_stages=1, disable_licm=True):
            m_r = None if D % sizes.BR == 0 else i + o_r < D
            b_dd = load_t(p_dd, o_c, m_c, i + o_r, m_r, D)  # [BR, BC]
            if sizes.EARLIER:
                b_l = load_t(p_dd, o_i, m_l, i + o_r, m_r, D).to(OP)  # [BR, BT]
                b_dd = dot(b_l, b_s, b_dd, sizes.PRECISION)
            store_t(p_dd, b_dd, o_c, m_c, i + o_r, m_r, D)
        tl.debug_barrier()
        output_backward(tokens, layers, grad, p_norm, block, chunk, sizes)
    else:
        layers_backward(
            b_s, tokens, layers, coefficient, grad, p_norm, block, chunk, ends, 1, sizes
        )


@triton.jit
def later(coefficient, block, chunk, i_l: tl.constexpr, sizes):
    """-G by which later tokens of the block read the chunk's, [BT, BC]."""
    BT: tl.constexpr = sizes.BT
    o_row = tl.arange(0, BT) // sizes.CHUNK * sizes.CHUNK - 1
    p_G = coefficient.G + (block.slot * sizes.L + sizes.GATES[i_l]) * BT * BT
    m = chunk.later[:, None] & chunk.mask[None, :]
    return -tl.load(p_G + o_row[:, None] * BT + chunk.tokens[None, :], mask=m, other=0.0)


@triton.jit
def layers_backward(
    b_s,
    tokens,
    layers,
    coefficient,
    grad,
    p_norm,
    block,
    chunk,
    ends,
    i_l: tl.constexpr,
    sizes,
):
    """From a layer up to the last one, and down again."""
    kept = errors_backward(b_s, layers, coefficient, grad, block, chunk, ends, i_l, sizes)
    tl.debug_barrier()
    if i_l + 1 < sizes.DEPTH:
        layers_backward(
            b_s, tokens, layers, coefficient, grad, p_norm, block, chunk, ends, i_l + 1, sizes
        )
        tl.debug_barrier()
    else:
        output_backward(tokens, layers, grad, p_norm, block, chunk, sizes)
    row, m_p = chunk.row, chunk.earlier
    i_row = (block.slot * sizes.L + sizes.GATES[i_l]) * sizes.BT + row
    known = row_of(grad.coefficient, i_row, row, m_p, sizes)
    # Warps that hold the same rows load them all, and one stores them: not before all have.
    tl.debug_barrier()
    b_da, b_dc, b_dG = products_backward(
        kept, layers, coefficient, grad, block, chunk, ends, i_l, sizes
    )
    if sizes.EARLIER:
        if row >= 0:
            tl.store(grad.coefficient.a + i_row, known[0] + b_da)
            tl.store(grad.coefficient.c + i_row, known[1] + b_dc)
        p_dG = grad.coefficient.G + i_row * sizes.BT + tl.arange(0, sizes.BT)
        tl.store(p_dG, known[2] - b_dG, mask=m_p)


@triton.jit
def row_of(grad, i_row, row, m_p, sizes):
    """What a row of coefficients has of queries and of other layers: a, c, G."""
    a = tl.load(grad.a + i_row, mask=row >= 0, other=0.0)
    c = tl.load(grad.c + i_row, mask=row >= 0, other=0.0)
    p_G = grad.G + i_row * sizes.BT + tl.arange(0, sizes.BT)
    return a, c, tl.load(p_G, mask=m_p, other=0.0)


@triton.jit
def errors_backward(b_s, layers, coefficient, grad, block, chunk, ends, i_l: tl.constexpr, sizes):
    """`d_{l-1} = push_l(d_l) act'(z_{l-1})`: the whole gradient of d_l.

    Returns what `products_backward` goes on from.
    """
    HIDDEN: tl.constexpr = sizes.HIDDEN
    OUT: tl.constexpr = sizes.WIDTHS[i_l + 1]
    LAST: tl.constexpr = i_l + 1 == sizes.DEPTH
    BT: tl.constexpr = sizes.BT
    BC: tl.constexpr = sizes.BC
    BH: tl.constexpr = sizes.BH
    BO: tl.constexpr = sizes.BR if LAST else BH  # of the layer's width out at a time
    OP: tl.constexpr = layers[i_l].x.dtype.element_ty
    ACC: tl.constexpr = coefficient.G.dtype.element_ty
    PRECISION: tl.constexpr = sizes.PRECISION
    i_b, hidden = block.slot, ends.hidden
    o_c, m_c, m_p, m_l = chunk.tokens, chunk.mask, chunk.earlier, chunk.later
    m_o = m_p | m_l
    o_i, o_h, o_o = tl.arange(0, BT), tl.arange(0, BH), tl.arange(0, BO)
    out = ends.width if LAST else hidden
    o_in, o_out = i_b * BT * HIDDEN, i_b * BT * OUT
    p_x, p_e, p_d = layers[i_l].x + o_in, layers[i_l].e + o_in, layers[i_l].d + o_out
    p_z, p_de, p_dd = (
        layers[i_l - 1].z + o_in,
        grad.layers[i_l].e + o_in,
        grad.layers[i_l].d + o_out,
    )
    p_below = grad.layers[i_l - 1].d + o_in
    a, c = weights_of(coefficient, block, chunk, i_l, sizes)

    b_ex = tl.zeros([BT, BC], ACC)  # de by x: ours by all,
    b_lx = tl.zeros([BT, BC], ACC)  # the later's by ours
    b_xx = tl.zeros([BT, BC], ACC)  # x by x
    for j in tl.range(0, hidden, BH, num_stages=1, disable_licm=True):
        m_h = None if HIDDEN % BH == 0 else j + o_h < HIDDEN
        if i_l == 1 and sizes.EARLIER:
            b_l = load_t(p_below, o_i, m_l, j + o_h, m_h, HIDDEN).to(OP)  # [BH, BT]
            b_dd = load_t(p_below, o_c, m_c, j + o_h, m_h, HIDDEN)  # [BH, BC]
            b_dd = dot(b_l, b_s, b_dd, PRECISION)
        else:
            b_dd = load_t(p_below, o_c, m_c, j + o_h, m_h, HIDDEN)
        b_z = load_t(p_z, o_c, m_c, j + o_h, m_h, HIDDEN)
        b_e = load_t(p_e, o_c, m_c, j + o_h, m_h, HIDDEN)
        b_dz = b_dd * b_e * curvature(b_z, sizes.ACTIVATION)
        store_t(p_below, b_dz, o_c, m_c, j + o_h, m_h, HIDDEN)
        b_de = (b_dd * slope(b_z, sizes.ACTIVATION)).to(OP)
        store_t(p_de, b_de, o_c, m_c, j + o_h, m_h, HIDDEN)

        b_x = load_t(p_x, o_c, m_c, j + o_h, m_h, HIDDEN)  # [BH, BC]
        if sizes.EARLIER:
            b_l = load(p_de, o_i, m_l, j + o_h, m_h, HIDDEN)  # [BT, BH]
            b_lx = dot(b_l, b_x, b_lx, PRECISION)
            b_o = load(p_x, o_i, m_o, j + o_h, m_h, HIDDEN)  # [BT, BH]
            b_xx = dot(b_o, b_x, b_xx, PRECISION)
            b_ex = dot(b_o, b_de, b_ex, PRECISION)
    b_ex = tl.where(m_p[:, None], b_ex, b_lx)
    # what later keys read the layer with of ours, and ours of earlier ones'
    b_g = later(coefficient, block, chunk, i_l, sizes)
    b_gx = tl.where(m_p[:, None], history(coefficient, block, chunk, i_l, sizes)[:, None], b_g)
    b_gex, b_gxx = (b_gx * b_ex).to(OP), (b_g * b_xx).to(OP)
    b_da = tl.zeros([BC], ACC)
    b_dc = tl.zeros([BC], ACC)
    b_dd2 = tl.zeros([BT, BC], ACC)  # d by d
    tl.debug_barrier()

    p_w, p_s = start_state(layers[i_l], block, i_l, sizes)
    for i in tl.range(0, out, BO, num_stages=1, disable_licm=True):
        m_r = None if OUT % BO == 0 else i + o_o < OUT
        b_dd = load_t(p_dd, o_c, m_c, i + o_o, m_r, OUT)  # [BO, BC]
        if sizes.EARLIER:
            b_l = load_t(p_dd, o_i, m_l, i + o_o, m_r, OUT).to(OP)  # [BO, BT]
            b_dd = dot(b_l, b_gxx, b_dd, PRECISION)
            b_o = load_t(p_d, o_i, m_o, i + o_o, m_r, OUT).to(OP)  # [BO, BT]
            b_dd = dot(b_o, b_gex, b_dd, PRECISION)
        b_w = tl.zeros([BO, BC], ACC)
        b_ws = tl.zeros([BO, BC], ACC)
        for j in tl.range(0, hidden, BH, num_stages=1, disable_licm=True):
            m_h = None if HIDDEN % BH == 0 else j + o_h < HIDDEN
            b_de = load_t(p_de, o_c, m_c, j + o_h, m_h, HIDDEN)  # [BH, BC]
            b_m = load_t(p_w, j + o_h, m_h, i + o_o, m_r, OUT)  # [BO, BH]
            b_w = dot(b_m, b_de, b_w, PRECISION)
            if sizes.EARLIER:
                b_m = load_t(p_s, j + o_h, m_h, i + o_o, m_r, OUT)
                b_ws = dot(b_m, b_de, b_ws, PRECISION)
        if sizes.EARLIER:
            b_d = load_t(p_d, o_c, m_c, i + o_o, m_r, OUT)  # [BO, BC]
            b_da += tl.sum(b_d * b_w, 0)
            b_dc += tl.sum(b_d * b_ws, 0)
            b_dd += a * b_w + c * b_ws
            b_o = load(p_d, o_i, m_o, i + o_o, m_r, OUT).to(OP)  # [BT, BO]
            b_dd2 = dot(b_o, b_d.to(OP), b_dd2, PRECISION)
        else:
            b_dd += b_w
        store_t(p_dd, b_dd, o_c, m_c, i + o_o, m_r, OUT)
    b_dG = b_ex * b_dd2
    return ErrorsBackward(G=b_gx, xx=b_xx, dd=(b_g * b_dd2).to(OP), dG=b_dG, da=b_da, dc=b_dc)


@triton.jit
def output_backward(tokens, layers, grad, p_norm, block, chunk, sizes):
    """`d = error(y)`: of the last products, values, keys where there is a residual, the norm."""
    D: tl.constexpr = sizes.D
    LAST: tl.constexpr = sizes.DEPTH - 1
    o_c, m_c, o_d = chunk.tokens, chunk.mask, tl.arange(0, sizes.BD)
    m_d, o_b = o_d < D, block.slot * sizes.BT * D
    p_dy, p_dx = grad.layers[LAST].d + o_b, grad.layers[0].x + o_b
    b_y = load_t(layers[LAST].z + o_b, o_c, m_c, o_d, m_d, D)  # [BD, BC]
    b_dd = load_t(p_dy, o_c, m_c, o_d, m_d, D)
    b_k = load_t(tokens.k, o_c, m_c, o_d, m_d, sizes.H * D).to(b_y.dtype)
    b_v = load_t(tokens.v, o_c, m_c, o_d, m_d, sizes.H * D).to(b_y.dtype)
    b_dy, b_df, b_dw, b_db = error_backward(b_dd, b_y, b_k, b_v, p_norm, o_d, m_d, sizes)
    if sizes.HAS_NORM:
        p_dnorm = grad.norm_keys + block.state * 2 * D
        b_dw += tl.load(p_dnorm + o_d, mask=m_d, other=0.0)
        b_db += tl.load(p_dnorm + D + o_d, mask=m_d, other=0.0)
        tl.debug_barrier()
        tl.store(p_dnorm + o_d, b_dw, mask=m_d)
        tl.store(p_dnorm + D + o_d, b_db, mask=m_d)
    store_t(p_dy, b_dy, o_c, m_c, o_d, m_d, D)
    store_t(tokens.dv, -b_df, o_c, m_c, o_d, m_d, sizes.H * D)
    if sizes.RESIDUAL:
        b_df += load_t(p_dx, o_c, m_c, o_d, m_d, D)
        store_t(p_dx, b_df, o_c, m_c, o_d, m_d, D)


@triton.jit
def products_backward(
    kept, layers, coefficient, grad, block, chunk, ends, i_l: tl.constexpr, sizes
):
    """`z_l = pull_l(act(z_{l-1}))`: the whole gradient of z_{l-1}.

    Returns that of a, of c and, negative, of G: of the row that the chunk read the layer with. It
    belongs to the query before the chunk, which read with it too.
    """
    HIDDEN: tl.constexpr = sizes.HIDDEN
    OUT: tl.constexpr = sizes.WIDTHS[i_l + 1]
    LAST: tl.constexpr = i_l + 1 == sizes.DEPTH
    BT: tl.constexpr = sizes.BT
    BC: tl.constexpr = sizes.BC
    BH: tl.constexpr = sizes.BH
    BO: tl.constexpr = sizes.BR if LAST else BH
    OP: tl.constexpr = layers[i_l].x.dtype.element_ty
    ACC: tl.constexpr = coefficient.G.dtype.element_ty
    PRECISION: tl.constexpr = sizes.PRECISION
    b_gx, b_xx, b_gdd, b_dG, b_da, b_dc = kept
    i_b, hidden = block.slot, ends.hidden
    o_c, m_c, m_p, m_l = chunk.tokens, chunk.mask, chunk.earlier, chunk.later
    m_o = m_p | m_l
    o_i, o_h, o_o = tl.arange(0, BT), tl.arange(0, BH), tl.arange(0, BO)
    out = ends.width if LAST else hidden
    o_in, o_out = i_b * BT * HIDDEN, i_b * BT * OUT
    p_x, p_d, p_z = layers[i_l].x + o_in, layers[i_l].d + o_out, layers[i_l - 1].z + o_in
    p_de, p_dx = grad.layers[i_l].e + o_in, grad.layers[i_l].x + o_in
    p_dz, p_below = grad.layers[i_l].d + o_out, grad.layers[i_l - 1].d + o_in
    a, c = weights_of(coefficient, block, chunk, i_l, sizes)

    b_gd = tl.zeros([BT, BC], ACC)  # dz by d: ours by earlier ones', the later's by ours
    if sizes.EARLIER:
        for i in tl.range(0, out, BO, num_stages=1, disable_licm=True):
            m_r = None if OUT % BO == 0 else i + o_o < OUT
            b_g = load_t(p_dz, o_c, m_c, i + o_o, m_r, OUT).to(OP)  # [BO, BC]
            b_o = load(p_d, o_i, m_p, i + o_o, m_r, OUT).to(OP)  # [BT, BO]
            b_gd = dot(b_o, b_g, b_gd, PRECISION)
            b_d = load_t(p_d, o_c, m_c, i + o_o, m_r, OUT).to(OP)
            b_l = load(p_dz, o_i, m_l, i + o_o, m_r, OUT).to(OP)
            b_gd = dot(b_l, b_d, b_gd, PRECISION)
    b_dG = tl.sum(b_dG + b_xx * b_gd, 1)
    b_ggd = (b_gx * b_gd).to(OP)
    b_pa = tl.zeros([BH, BC], ACC)
    b_pc = tl.zeros([BH, BC], ACC)
    p_w, p_s = start_state(layers[i_l], block, i_l, sizes)
    for j in tl.range(0, hidden, BH, num_stages=1, disable_licm=True):
        m_h = None if HIDDEN % BH == 0 else j + o_h < HIDDEN
        b_w = tl.zeros([BH, BC], ACC)
        b_ws = tl.zeros([BH, BC], ACC)
        for i in tl.range(0, out, BO, num_stages=1, disable_licm=True):
            m_r = None if OUT % BO == 0 else i + o_o < OUT
            b_g = load_t(p_dz, o_c, m_c, i + o_o, m_r, OUT).to(OP)  # [BO, BC]
            b_m = load(p_w, j + o_h, m_h, i + o_o, m_r, OUT)  # [BH, BO]
            b_w = dot(b_m, b_g, b_w, PRECISION)
            if sizes.EARLIER:
                b_m = load(p_s, j + o_h, m_h, i + o_o, m_r, OUT)
                b_ws = dot(b_m, b_g, b_ws, PRECISION)
        b_dx = b_w
        if sizes.EARLIER:
            b_x = load_t(p_x, o_c, m_c, j + o_h, m_h, HIDDEN).to(ACC)  # [BH, BC]
            b_pa += b_x * b_w
            b_pc += b_x * b_ws
            b_dx = a * b_w + c * b_ws
            b_l = load_t(p_de, o_i, m_l, j + o_h, m_h, HIDDEN)  # [BH, BT]
            b_dx = dot(b_l, b_gdd, b_dx, PRECISION)
            b_o = load_t(p_x, o_i, m_o, j + o_h, m_h, HIDDEN)
            b_dx = dot(b_o, b_ggd, b_dx, PRECISION)
        b_dx += load_t(p_dx, o_c, m_c, j + o_h, m_h, HIDDEN)
        b_z = load_t(p_z, o_c, m_c, j + o_h, m_h, HIDDEN)
        b_dz = load_t(p_below, o_c, m_c, j + o_h, m_h, HIDDEN)
        b_dz += b_dx * slope(b_z, sizes.ACTIVATION)
        store_t(p_below, b_dz, o_c, m_c, j + o_h, m_h, HIDDEN)
    return tl.sum(b_da + tl.sum(b_pa, 0), 0), tl.sum(b_dc + tl.sum(b_pc, 0), 0), b_dG

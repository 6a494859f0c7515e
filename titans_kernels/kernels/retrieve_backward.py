"""Gradients of queries' outputs, back to the first layer's products.

From the gradient do of the outputs comes dz of the last layer. Every layer but the first, the last
one first, gives with token t's dz_t and what it read the layer with, h_t,

    dX_i = -sum_{t >= i} G[t, i] (dz_t . D_i) h_t
    dD_i = -sum_{t >= i} G[t, i] (h_t . X_i) dz_t
    dh_t = a (dz_t W^T) + c (dz_t S^T) - sum_{i <= t} G[t, i] (dz_t . D_i) X_i

and `dz = dh act'(z)` of the layer before. The first layer waits for `inputs_backward`, which takes
queries and keys alike; so does all but the last product's gradient where there is no other layer.

Grid: (sequences, blocks, heads), everything parallel. Reads what `scan` and `retrieve` left; writes
every tensor of the scratch once.
"""

import triton
import triton.language as tl

from .blocks import block_at, block_of, query_of, query_row, start_state
from .network import head_backward, slope
from .operands import dot, load, load_t, store, store_t


@triton.jit(do_not_specialize=["group"])
def retrieve_backward_kernel(
    token,  # Tokens
    query,  # Queries: o is the gradient of the outputs
    coefficient,  # Coefficients
    layers,  # Layers
    query_layers,  # QueryLayers: z becomes its gradient
    grad,  # Grad: x and d of layers, a, c and G of their coefficients and norm are written
    p_norm,  # [H, 2, D]
    group,
    hidden,
    width,  # D
    sizes,  # Sizes
):
    H: tl.constexpr = sizes.H
    D: tl.constexpr = sizes.D
    BT: tl.constexpr = sizes.BT
    LAST: tl.constexpr = sizes.DEPTH - 1
    ACC: tl.constexpr = coefficient.G.dtype.element_ty
    i_n, i_block, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    first, count, _ = block_of(token, i_n, group + i_block, sizes)
    i_s, blocks = i_n * sizes.H + i_h, tl.num_programs(1)
    block = block_at(i_n, i_h, i_s, i_block, blocks, group, first, count, sizes)
    i_b = block.slot
    o_t, o_d = tl.arange(0, BT), tl.arange(0, sizes.BD)
    m_t, m_d = o_t < count, o_d < D
    p_dnorm = grad.norm + i_b * 2 * D
    if count == 0:
        if sizes.HAS_NORM:
            tl.store(p_dnorm + o_d, tl.zeros([sizes.BD], ACC), mask=m_d)
            tl.store(p_dnorm + D + o_d, tl.zeros([sizes.BD], ACC), mask=m_d)
        return
    i_q, tail = query_of(token, i_n, first)
    m_q = m_t & (o_t >= tail)

    p_y, p_part = query_layers[LAST].z + i_b * BT * D, query.parts + i_b * 2 * BT * D
    b_do = load_t(query.o + (i_q * H + i_h) * D, o_t, m_q, o_d, m_d, H * D)  # [BD, BT]
    b_y = load_t(p_y, o_t, m_t, o_d, m_d, D)
    b_dy, b_dw, b_db = head_backward(b_do.to(ACC), b_y, p_norm + i_h * 2 * D, o_d, m_d, sizes)
    if sizes.HAS_NORM:
        tl.store(p_dnorm + o_d, b_dw, mask=m_d)
        tl.store(p_dnorm + D + o_d, b_db, mask=m_d)
    store_t(p_y, b_dy, o_t, m_t, o_d, m_d, D)
    # Behind a LayerNorm dy is all but orthogonal to y: taken from rounded factors, as the gradient
    # of x is, this would be rounding and little else.
    o_a = (i_b * sizes.L + sizes.GATES[LAST]) * BT
    b_part = load_t(p_part, o_t, m_t, o_d, m_d, D)
    p_da, p_dc, _ = rows_of(grad.coefficient, o_a, sizes)
    tl.store(p_da + o_t, tl.sum(b_dy * b_part, 0), mask=m_t)
    b_part = load_t(p_part + BT * D, o_t, m_t, o_d, m_d, D)
    tl.store(p_dc + o_t, tl.sum(b_dy * b_part, 0), mask=m_t)

    for back in tl.static_range(LAST):
        tl.debug_barrier()
        layer_backward(
            layers[LAST - back],
            query_layers[LAST - back],
            query_layers[LAST - back - 1],
            coefficient,
            grad,
            block,
            hidden,
            width,
            LAST - back,
            sizes,
        )


@triton.jit
def layer_backward(
    layer,
    query_layer,
    below,  # QueryLayer of the layer before
    coefficient,
    grad,
    block,
    hidden,
    width,
    i_l: tl.constexpr,
    sizes,
):
    """A layer that is not the first: of its keys' inputs and errors, of the products below it."""
    HIDDEN: tl.constexpr = sizes.HIDDEN
    OUT: tl.constexpr = sizes.WIDTHS[i_l + 1]
    LAST: tl.constexpr = i_l + 1 == sizes.DEPTH
    BT: tl.constexpr = sizes.BT
    BH: tl.constexpr = sizes.BH
    BO: tl.constexpr = sizes.BR if LAST else BH  # of the layer's width out at a time
    OP: tl.constexpr = layer.x.dtype.element_ty
    ACC: tl.constexpr = coefficient.G.dtype.element_ty
    PRECISION: tl.constexpr = sizes.PRECISION
    o_t, o_h, o_o = tl.arange(0, BT), tl.arange(0, BH), tl.arange(0, BO)
    i_b, m_t = block.slot, o_t < block.count
    out = width if LAST else hidden
    p_x, p_h = layer.x + i_b * BT * HIDDEN, query_layer.h + i_b * BT * HIDDEN
    p_d, p_dz = layer.d + i_b * BT * OUT, query_layer.z + i_b * BT * OUT
    p_z = below.z + i_b * BT * HIDDEN
    o_a = (i_b * sizes.L + sizes.GATES[i_l]) * BT
    p_da, p_dc, p_dG = rows_of(grad.coefficient, o_a, sizes)
    p_a, p_c, o_row = coefficient.a + o_a, coefficient.c + o_a, query_row(o_t, sizes)
    p_W, p_S = layer.W + i_b * HIDDEN * OUT, layer.S + i_b * HIDDEN * OUT
    if sizes.READ == "chunk":
        p_W, p_S = start_state(layer, block, i_l, sizes)

    # [BT, BT] tiles are keys i by queries t.
    b_hx = tl.zeros([BT, BT], ACC)
    for j in tl.range(0, hidden, BH, num_stages=1, disable_licm=True):
        m_h = None if HIDDEN % BH == 0 else j + o_h < HIDDEN
        b_x = load(p_x, o_t, m_t, j + o_h, m_h, HIDDEN)  # [BT, BH]
        b_h = load_t(p_h, o_t, m_t, j + o_h, m_h, HIDDEN)  # [BH, BT]
        b_hx = dot(b_x, b_h, b_hx, PRECISION)
    b_gd = tl.zeros([BT, BT], ACC)
    for i in tl.range(0, out, BO, num_stages=1, disable_licm=True):
        m_o = None if OUT % BO == 0 else i + o_o < OUT
        b_d = load(p_d + i, o_t, m_t, o_o, m_o, OUT).to(OP)  # [BT, BO]
        b_g = load_t(p_dz + i, o_t, m_t, o_o, m_o, OUT).to(OP)  # [BO, BT]
        b_gd = dot(b_d, b_g, b_gd, PRECISION)
    o_G, m_G = o_t[None, :] * BT + o_t[:, None], m_t[None, :] & m_t[:, None]
    b_dG = -b_hx * b_gd
    if sizes.L == 1 and not LAST:
        b_dG += tl.load(p_dG + o_G, mask=m_G, other=0.0)
        tl.debug_barrier()
    tl.store(p_dG + o_G, b_dG, mask=m_G)
    m_G = m_t[None, :] & (o_row >= 0)[None, :]
    p_G = coefficient.G + o_a * BT + o_row[None, :] * BT
    b_G = -tl.load(p_G + o_t[:, None], mask=m_G, other=0.0)
    b_hx, b_gd = (b_G * b_hx).to(OP), (b_G * b_gd).to(OP)
    p_dd = grad.layers[i_l].d + i_b * BT * OUT
    errors_backward(b_hx, p_dz, p_dd, m_t, out, OUT, BO, sizes)

    b_a = tl.load(p_a + o_row, mask=m_t & (o_row >= 0), other=1.0)
    b_c = tl.load(p_c + o_row, mask=m_t & (o_row >= 0), other=0.0)
    b_da = tl.zeros([BT], ACC)
    b_dc = tl.zeros([BT], ACC)
    for j in tl.range(0, hidden, BH, num_stages=1, disable_licm=True):
        m_h = None if HIDDEN % BH == 0 else j + o_h < HIDDEN
        b_gW = tl.zeros([BH, BT], ACC)
        b_gS = tl.zeros([BH, BT], ACC)
        for i in tl.range(0, out, BO, num_stages=1, disable_licm=True):
            m_o = None if OUT % BO == 0 else i + o_o < OUT
            b_g = load_t(p_dz + i, o_t, m_t, o_o, m_o, OUT).to(OP)  # [BO, BT]
            b_w = load(p_W, j + o_h, m_h, i + o_o, m_o, OUT)  # [BH, BO]
            b_gW = dot(b_w, b_g, b_gW, PRECISION)
            b_w = load(p_S, j + o_h, m_h, i + o_o, m_o, OUT)
            b_gS = dot(b_w, b_g, b_gS, PRECISION)
        if not LAST:
            b_h = load_t(p_h, o_t, m_t, j + o_h, m_h, HIDDEN).to(ACC)  # [BH, BT]
            b_da += tl.sum(b_h * b_gW, 0)
            b_dc += tl.sum(b_h * b_gS, 0)
        b_dh = b_a[None, :] * b_gW + b_c[None, :] * b_gS
        b_x = load_t(p_x, o_t, m_t, j + o_h, m_h, HIDDEN)  # [BH, BT]
        b_dh = dot(b_x, b_gd, b_dh, PRECISION)
        b_z = load_t(p_z, o_t, m_t, j + o_h, m_h, HIDDEN)
        store_t(p_z, b_dh * slope(b_z, sizes.ACTIVATION), o_t, m_t, j + o_h, m_h, HIDDEN)
        b_h = load(p_h, o_t, m_t, j + o_h, m_h, HIDDEN)  # [BT, BH]
        b_dx = dot(b_gd, b_h, None, PRECISION)
        store(grad.layers[i_l].x + i_b * BT * HIDDEN, b_dx, o_t, m_t, j + o_h, m_h, HIDDEN)
    if not LAST:
        add_rows(p_da, b_da, o_t, m_t, sizes.L == 1)
        add_rows(p_dc, b_dc, o_t, m_t, sizes.L == 1)


@triton.jit
def rows_of(grad, o_a, sizes):
    """Where gradients of what queries read with go: a, c [BT] and G [BT, BT]."""
    if sizes.READ == "token":
        return grad.a + o_a, grad.c + o_a, grad.G + o_a * sizes.BT
    else:
        return grad.a_key + o_a, grad.c_key + o_a, grad.G_key + o_a * sizes.BT


@triton.jit
def errors_backward(
    b_hX,  # [BT, BT], keys by queries, times -G
    p_g,  # [BT, WIDTH], of queries
    p_dd,  # out [BT, WIDTH]
    m_t,
    width,
    WIDTH: tl.constexpr,
    BN: tl.constexpr,
    sizes,
):
    """What queries give a layer's errors."""
    o_t = tl.arange(0, sizes.BT)
    for j in tl.range(0, width, BN, num_stages=1, disable_licm=True):
        o_n = tl.arange(0, BN)
        m_n = None if WIDTH % BN == 0 else j + o_n < WIDTH
        b_g = load(p_g + j, o_t, m_t, o_n, m_n, WIDTH).to(b_hX.dtype)  # [BT, BN]
        b_dd = dot(b_hX, b_g, None, sizes.PRECISION)
        store(p_dd + j, b_dd, o_t, m_t, o_n, m_n, WIDTH)


@triton.jit
def add_rows(p, b, o_t, m_t, ADD: tl.constexpr):
    """Store a row's gradients or, where layers share gates, add them to what stands there."""
    if ADD:
        b += tl.load(p + o_t, mask=m_t, other=0.0)
        tl.debug_barrier()
    tl.store(p + o_t, b, mask=m_t)

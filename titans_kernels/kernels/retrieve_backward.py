"""Gradients of what answers were read from in the last layer: of the block's inputs and errors.

With do at the last products, token t's gradient dy, then dz of its first products, and

    dX_i = -sum_{t >= i} G[t, i] (dy_t . D_i) h_t
    dD_i = -sum_{t >= i} G[t, i] (h_t . X_i) dy_t

The first layer waits for `inputs_backward`, which takes queries and keys alike; so does all but the
last product's gradient where that layer is the only one.

Grid: (slots, heads), everything parallel. Reads what `scan` and `retrieve` left; writes every
tensor of the scratch once.
"""

import triton
import triton.language as tl

from .blocks import block_of
from .network import head_backward, slope


@triton.jit
def errors_backward(
    b_hX,  # [BT, BT], keys by queries, times -G
    p_g,  # [BT, WIDTH], of queries
    p_dd,  # out [BT, WIDTH]
    m_t,
    width,
    WIDTH: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What queries give a layer's errors."""
    ACC: tl.constexpr = p_dd.dtype.element_ty
    o_t = tl.arange(0, BT)
    for j in tl.range(0, width, BN, num_stages=1, disable_licm=True):
        o_n = j + tl.arange(0, BN)
        o, m = o_t[:, None] * WIDTH + o_n[None, :], m_t[:, None] & (o_n < WIDTH)[None, :]
        b_g = tl.load(p_g + o, mask=m, other=0.0).to(b_hX.dtype)  # [BT, BN]
        b_dd = tl.dot(b_hX, b_g, input_precision=PRECISION, out_dtype=ACC)
        tl.store(p_dd + o, b_dd, mask=m)


@triton.jit(do_not_specialize=["group"])
def retrieve_backward_kernel(
    p_h,  # [slots, H, BT, HIDDEN], queries' inputs of the last layer
    p_x,  # [slots, H, BT, HIDDEN], keys' inputs of the last layer
    p_d2,  # [slots, H, BT, D]
    p_W2,  # [slots, H, HIDDEN, D]
    p_S2,
    p_a,  # [slots, H, L, BT]
    p_c,
    p_G,  # [slots, H, L, BT, BT]
    p_parts,  # [slots, H, 2, BT, D], what of the last products is W's and S's
    p_norm,  # [H, 2, D]
    p_do,  # [Mq, H, D]
    p_gz,  # in and out [slots, H, BT, HIDDEN], queries' first products, then their gradient
    p_gy,  # in and out [slots, H, BT, D], last products, then their gradient
    p_dx2,  # out [slots, H, BT, HIDDEN]
    p_dd2,  # out [slots, H, BT, D]
    p_da,  # out [slots, H, L, BT], of the last layer
    p_dc,
    p_dG,  # out [slots, H, L, BT, BT], likewise, at depth 2
    p_dnorm,  # out [slots, H, 2, D]
    p_bounds,  # [N, 2]
    p_tail,  # [N]
    p_ask,  # [N]
    group,
    hidden,
    width,  # D
    BLOCKS: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    HIDDEN: tl.constexpr,
    L: tl.constexpr,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
    SPAN: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    BH: tl.constexpr,
    DEPTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_slot, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, count, _ = block_of(p_bounds, i_slot, group, BLOCKS, CHUNK, TOKENS, SPAN)
    o_t, o_d, o_h = tl.arange(0, BT), tl.arange(0, BD), tl.arange(0, BH)
    o_r = tl.arange(0, BR)
    m_t, m_d = o_t < count, o_d < D
    i_b = i_slot * H + i_h
    OP: tl.constexpr = p_W2.dtype.element_ty
    ACC: tl.constexpr = p_G.dtype.element_ty
    p_norm += i_h * 2 * D
    p_dnorm += i_b * 2 * D
    if count == 0:
        if HAS_NORM:
            tl.store(p_dnorm + o_d, tl.zeros([BD], ACC), mask=m_d)
            tl.store(p_dnorm + D + o_d, tl.zeros([BD], ACC), mask=m_d)
        return
    n = i_slot // BLOCKS
    before = first - tl.load(p_bounds + 2 * n) - tl.load(p_tail + n)
    ask = tl.load(p_ask + n) + before
    m_q = m_t & (before + o_t >= 0)
    p_do += (ask * H + i_h) * D
    i_l = 1 if (L > 1 and DEPTH == 2) else 0
    p_a += (i_b * L + i_l) * BT
    p_c += (i_b * L + i_l) * BT
    p_da += (i_b * L + i_l) * BT
    p_dc += (i_b * L + i_l) * BT
    p_G += (i_b * L + i_l) * BT * BT
    p_dG += (i_b * L + i_l) * BT * BT
    p_h += i_b * BT * HIDDEN
    p_x += i_b * BT * HIDDEN
    p_gz += i_b * BT * HIDDEN
    p_dx2 += i_b * BT * HIDDEN
    p_d2 += i_b * BT * D
    p_gy += i_b * BT * D
    p_parts += i_b * 2 * BT * D
    p_dd2 += i_b * BT * D

    o_y, m_y = o_t[None, :] * D + o_d[:, None], m_t[None, :] & m_d[:, None]  # [BD, BT]
    b_do = tl.load(
        p_do + o_t[None, :] * (H * D) + o_d[:, None], mask=m_q[None, :] & m_d[:, None], other=0.0
    )
    b_y = tl.load(p_gy + o_y, mask=m_y, other=0.0)
    b_dy, b_dw, b_db = head_backward(b_do.to(ACC), b_y, p_norm, o_d, m_d, D, HAS_NORM)
    if HAS_NORM:
        tl.store(p_dnorm + o_d, b_dw, mask=m_d)
        tl.store(p_dnorm + D + o_d, b_db, mask=m_d)
    tl.store(p_gy + o_y, b_dy, mask=m_y)
    # Behind a LayerNorm dy is all but orthogonal to y: taken from rounded factors, as the gradient
    # of x is, this would be rounding and little else.
    b_part = tl.load(p_parts + o_y, mask=m_y, other=0.0)
    tl.store(p_da + o_t, tl.sum(b_dy * b_part, 0), mask=m_t)
    b_part = tl.load(p_parts + BT * D + o_y, mask=m_y, other=0.0)
    tl.store(p_dc + o_t, tl.sum(b_dy * b_part, 0), mask=m_t)

    if DEPTH == 2:
        tl.debug_barrier()
        # [BT, BT] tiles are keys i by queries t.
        o_G, m_G = o_t[None, :] * BT + o_t[:, None], m_t[None, :] & m_t[:, None]
        b_hx = tl.zeros([BT, BT], ACC)
        for j in tl.range(0, hidden, BH, num_stages=1, disable_licm=True):
            m_h = j + o_h < HIDDEN
            b_x = tl.load(  # [BT, BH]
                p_x + o_t[:, None] * HIDDEN + (j + o_h)[None, :],
                mask=m_t[:, None] & m_h[None, :],
                other=0.0,
            )
            b_h = tl.load(  # [BH, BT]
                p_h + o_t[None, :] * HIDDEN + (j + o_h)[:, None],
                mask=m_t[None, :] & m_h[:, None],
                other=0.0,
            )
            b_hx = tl.dot(b_x, b_h, b_hx, input_precision=PRECISION, out_dtype=ACC)
        b_gd = tl.zeros([BT, BT], ACC)
        for i in tl.range(0, width, BR, num_stages=1, disable_licm=True):
            m_r = i + o_r < D
            b_d = tl.load(  # [BT, BR]
                p_d2 + o_t[:, None] * D + (i + o_r)[None, :],
                mask=m_t[:, None] & m_r[None, :],
                other=0.0,
            ).to(OP)
            b_g = tl.load(  # [BR, BT]
                p_gy + o_t[None, :] * D + (i + o_r)[:, None],
                mask=m_t[None, :] & m_r[:, None],
                other=0.0,
            ).to(OP)
            b_gd = tl.dot(b_d, b_g, b_gd, input_precision=PRECISION, out_dtype=ACC)
        tl.store(p_dG + o_G, -b_hx * b_gd, mask=m_G)
        b_G = -tl.load(p_G + o_G, mask=m_t[None, :], other=0.0)
        b_hx, b_gd = (b_G * b_hx).to(OP), (b_G * b_gd).to(OP)
        errors_backward(b_hx, p_gy, p_dd2, m_t, width, D, BT, BR, PRECISION)

        b_a = tl.load(p_a + o_t, mask=m_t, other=0.0)
        b_c = tl.load(p_c + o_t, mask=m_t, other=0.0)
        for j in tl.range(0, hidden, BH, num_stages=1, disable_licm=True):
            m_h = j + o_h < HIDDEN
            o_z, m_z = o_t[None, :] * HIDDEN + (j + o_h)[:, None], m_t[None, :] & m_h[:, None]
            b_gW = tl.zeros([BH, BT], ACC)
            b_gS = tl.zeros([BH, BT], ACC)
            for i in tl.range(0, width, BR, num_stages=1, disable_licm=True):
                m_r = i + o_r < D
                b_g = tl.load(  # [BR, BT]
                    p_gy + o_t[None, :] * D + (i + o_r)[:, None],
                    mask=m_t[None, :] & m_r[:, None],
                    other=0.0,
                ).to(OP)
                o_w = i_b * HIDDEN * D + (j + o_h)[:, None] * D + (i + o_r)[None, :]
                m_w = m_h[:, None] & m_r[None, :]
                b_w = tl.load(p_W2 + o_w, mask=m_w, other=0.0)  # [BH, BR]
                b_gW = tl.dot(b_w, b_g, b_gW, input_precision=PRECISION, out_dtype=ACC)
                b_w = tl.load(p_S2 + o_w, mask=m_w, other=0.0)
                b_gS = tl.dot(b_w, b_g, b_gS, input_precision=PRECISION, out_dtype=ACC)
            b_dh = b_a[None, :] * b_gW + b_c[None, :] * b_gS
            b_x = tl.load(p_x + o_z, mask=m_z, other=0.0)  # [BH, BT]
            b_dh = tl.dot(b_x, b_gd, b_dh, input_precision=PRECISION, out_dtype=ACC)
            b_z = tl.load(p_gz + o_z, mask=m_z, other=0.0)
            tl.store(p_gz + o_z, b_dh * slope(b_z, ACTIVATION), mask=m_z)
            o_z, m_z = o_t[:, None] * HIDDEN + (j + o_h)[None, :], m_t[:, None] & m_h[None, :]
            b_h = tl.load(p_h + o_z, mask=m_z, other=0.0)  # [BT, BH]
            b_dx = tl.dot(b_gd, b_h, input_precision=PRECISION, out_dtype=ACC)
            tl.store(p_dx2 + o_z, b_dx, mask=m_z)

"""Gradients of queries, or of keys: what both have from reading the first layer.

A token that read with `(a, c, G)` and whose first product has the gradient g (`dz` there) gives

    dh = a (g W^T) + c (g S^T) - (G * (g D^T)) X          da = <h, g W^T>     dc = <h, g S^T>
    dX_i -= G_i (g . D_i) h         dD_i -= G_i (h . X_i) g         dG_i = -(h . X_i) (g . D_i)

where X are the keys themselves. Queries read with the row right after their token, keys with that
of the chunk before. Queries come before `scan_backward`, which goes on from what they give X and D
and finds what D has from keys; keys come after it, and what X has is theirs.

Grid: (slots, heads), everything parallel.
"""

import triton
import triton.language as tl

from .blocks import block_of
from .retrieve_backward import errors_backward


@triton.jit(do_not_specialize=["group"])
def inputs_backward_kernel(
    p_h,  # queries [Mq, H, D] or, with KEYS, keys [M, H, D]
    p_k,  # [M, H, D]
    p_d1,  # [slots, H, BT, HIDDEN]
    p_W1,  # [slots, H, D, HIDDEN]
    p_S1,
    p_W1_anchor,  # [N, H, D, HIDDEN], that of a chunk begun in an earlier group
    p_a,  # [slots, H, L, BT]
    p_c,
    p_G,  # [slots, H, L, BT, BT]
    p_g,  # [slots, H, BT, HIDDEN]
    p_do,  # [Mq, H, D]
    p_dh,  # out, as p_h
    p_dd1,  # or, with queries, out [slots, H, BT, HIDDEN], and
    p_dx1,  # out [slots, H, BT, D]; with KEYS in and out, dk but for what they read
    p_da,  # out [slots, H, L, BT], with SHARED added to; with KEYS [slots, H, BT]
    p_dc,
    p_dG,  # out [slots, H, L, BT, BT], likewise; with KEYS [slots, H, BT, BT]
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
    KEYS: tl.constexpr,
    LAST: tl.constexpr,  # da and dc are known already
    SHARED: tl.constexpr,  # they and dG are known of a layer with the same gates
    RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_slot, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, count, _ = block_of(p_bounds, i_slot, group, BLOCKS, CHUNK, TOKENS, SPAN)
    if count == 0:
        return
    W: tl.constexpr = D * HIDDEN
    OP: tl.constexpr = p_k.dtype.element_ty
    ACC: tl.constexpr = p_g.dtype.element_ty
    o_t, o_h = tl.arange(0, BT), tl.arange(0, BH)
    m_t = o_t < count
    n, i_b = i_slot // BLOCKS, i_slot * H + i_h
    i_a = i_b * L * BT
    p_w1, p_s1 = p_W1 + i_b * W, p_S1 + i_b * W
    if KEYS:
        m_h, at = m_t, first
        o_row = o_t // CHUNK * CHUNK - 1 if SPAN == 1 else o_t * 0 - 1  # -1: the block's start
        if SPAN > 1:
            begun = i_slot % BLOCKS - (group + i_slot % BLOCKS) % SPAN
            p_w1 = p_W1_anchor + (n * H + i_h) * W
            if begun >= 0:
                p_w1 = p_W1 + ((n * BLOCKS + begun) * H + i_h) * W
            p_s1 = p_w1  # there is no share of its momentum
        i_da = i_b * BT
    else:
        before = first - tl.load(p_bounds + 2 * n) - tl.load(p_tail + n)
        m_h, at = m_t & (before + o_t >= 0), tl.load(p_ask + n) + before
        o_row = o_t
        i_da = i_a
    p_h += (at * H + i_h) * D
    p_dh += (at * H + i_h) * D
    p_do += (at * H + i_h) * D
    p_k += (first * H + i_h) * D
    p_d1 += i_b * BT * HIDDEN
    p_dd1 += i_b * BT * HIDDEN
    p_g += i_b * BT * HIDDEN
    p_dx1 += i_b * BT * D
    p_da += i_da
    p_dc += i_da
    p_dG += i_da * BT
    m_G = m_t[None, :] & (o_t[:, None] <= o_row[None, :])

    b_gD = tl.zeros([BT, BT], ACC)
    for j in tl.range(0, hidden, BH, num_stages=1, disable_licm=True):
        m_s = j + o_h < HIDDEN
        b_g = tl.load(  # [BH, BT]
            p_g + o_t[None, :] * HIDDEN + (j + o_h)[:, None],
            mask=m_t[None, :] & m_s[:, None],
            other=0.0,
        ).to(OP)
        b_d = tl.load(  # [BT, BH]
            p_d1 + o_t[:, None] * HIDDEN + (j + o_h)[None, :],
            mask=m_t[:, None] & m_s[None, :],
            other=0.0,
        ).to(OP)
        b_gD = tl.dot(b_d, b_g, b_gD, input_precision=PRECISION, out_dtype=ACC)
    # keys by tokens, [BT, BT]
    b_hX = tl.zeros([BT, BT], ACC)
    for i in tl.range(0, width, BR, num_stages=1, disable_licm=True):
        o_r = i + tl.arange(0, BR)
        m_r = o_r < D
        b_k = tl.load(  # [BT, BR]
            p_k + o_t[:, None] * (H * D) + o_r[None, :],
            mask=m_t[:, None] & m_r[None, :],
            other=0.0,
        )
        b_h = tl.load(  # [BR, BT]
            p_h + o_t[None, :] * (H * D) + o_r[:, None],
            mask=m_h[None, :] & m_r[:, None],
            other=0.0,
        )
        b_hX = tl.dot(b_k, b_h, b_hX, input_precision=PRECISION, out_dtype=ACC)
    b_dG = -b_hX * b_gD
    o_G = o_t[None, :] * BT + o_t[:, None]
    if SHARED:
        b_dG += tl.load(p_dG + o_G, mask=m_G, other=0.0)
        tl.debug_barrier()
    tl.store(p_dG + o_G, b_dG, mask=m_G)
    b_G = -tl.load(p_G + i_a * BT + o_row[None, :] * BT + o_t[:, None], mask=m_G, other=0.0)
    if not KEYS:
        b_wX = (b_G * b_hX).to(OP)
        errors_backward(b_wX, p_g, p_dd1, m_t, hidden, HIDDEN, BT, BH, PRECISION)
    b_w = (b_G * b_gD).to(OP)
    b_a = tl.load(p_a + i_a + o_row, mask=o_row >= 0, other=1.0)
    b_c = tl.load(p_c + i_a + o_row, mask=o_row >= 0, other=0.0)

    b_da = tl.zeros([BT], ACC)
    b_dc = tl.zeros([BT], ACC)
    for i in tl.range(0, width, BR, num_stages=1, disable_licm=True):
        o_r = i + tl.arange(0, BR)
        m_r = o_r < D
        b_gW = tl.zeros([BR, BT], ACC)
        b_gS = tl.zeros([BR, BT], ACC)
        for j in tl.range(0, hidden, BH, num_stages=1, disable_licm=True):
            m_s = j + o_h < HIDDEN
            b_g = tl.load(  # [BH, BT]
                p_g + o_t[None, :] * HIDDEN + (j + o_h)[:, None],
                mask=m_t[None, :] & m_s[:, None],
                other=0.0,
            ).to(OP)
            o_w, m_w = o_r[:, None] * HIDDEN + (j + o_h)[None, :], m_r[:, None] & m_s[None, :]
            b_m = tl.load(p_w1 + o_w, mask=m_w, other=0.0)  # [BR, BH]
            b_gW = tl.dot(b_m, b_g, b_gW, input_precision=PRECISION, out_dtype=ACC)
            b_m = tl.load(p_s1 + o_w, mask=m_w, other=0.0)
            b_gS = tl.dot(b_m, b_g, b_gS, input_precision=PRECISION, out_dtype=ACC)

        o, ot = o_t[:, None] * (H * D) + o_r[None, :], o_t[None, :] * (H * D) + o_r[:, None]
        b_h = tl.load(p_h + ot, mask=m_h[None, :] & m_r[:, None], other=0.0)  # [BR, BT]
        b_da += tl.sum(b_h.to(ACC) * b_gW, 0)
        b_dc += tl.sum(b_h.to(ACC) * b_gS, 0)

        b_h = tl.load(p_h + o, mask=m_h[:, None] & m_r[None, :], other=0.0)  # [BT, BR]
        b_dx = tl.dot(b_w, b_h, input_precision=PRECISION, out_dtype=ACC)
        o_x, m_x = o_t[:, None] * D + o_r[None, :], m_t[:, None] & m_r[None, :]
        if KEYS:
            b_dx += tl.load(p_dx1 + o_x, mask=m_x, other=0.0)
        tl.store(p_dx1 + o_x, b_dx, mask=m_x)
        tl.debug_barrier()

        m_x = m_t[None, :] & m_r[:, None]
        b_dh = b_a[None, :] * b_gW + b_c[None, :] * b_gS
        b_k = tl.load(p_k + ot, mask=m_t[None, :] & m_r[:, None], other=0.0)  # [BR, BT]
        b_dh = tl.dot(b_k, b_w, b_dh, input_precision=PRECISION, out_dtype=ACC)
        if KEYS:
            b_dh += tl.load(p_dx1 + o_t[None, :] * D + o_r[:, None], mask=m_x, other=0.0)
        elif RESIDUAL:
            b_dh += tl.load(p_do + ot, mask=m_h[None, :] & m_r[:, None], other=0.0).to(ACC)
        tl.store(p_dh + ot, b_dh.to(p_dh.dtype.element_ty), mask=m_h[None, :] & m_r[:, None])

    if SHARED:
        b_da += tl.load(p_da + o_t, mask=m_t, other=0.0)
        b_dc += tl.load(p_dc + o_t, mask=m_t, other=0.0)
        tl.debug_barrier()
    if not LAST:
        tl.store(p_da + o_t, b_da, mask=m_t)
        tl.store(p_dc + o_t, b_dc, mask=m_t)

"""Learning backwards: gradients of every key's errors and of the state, from block to block.

The scan in reverse. What enters a block is the gradient of the state it handed on (dW, dS), and
what its queries gave its inputs and errors. At the block's end `W' = a W + c S - X^T (G D)` and
`S' = p S - X^T (P D)`, so

    dX -= (G D) dW^T + (P D) dS^T          dD -= G (X dW) + P (X dS)

Then chunk after chunk, the last first. With the coefficients (a, c, G) of the weights the chunk
starts with, `pull(x) = a (x W) + c (x S) - (G * (x X^T)) D` and `push(d)` its transpose, an error
`d_1 = e act'(z_1)`, `e = push(d_2)`, `d_2 = error(y)` has

    de = dd_1 act'(z_1)          dy = error'(dd_2 + pull(de))
    dz = dd_1 e act''(z_1) + (dx_2 + push(dy)) act'(z_1)

where dd_1, dd_2 and dx_2 have what every later chunk gave them: (de, d_2) and (x_2, dy) read the
last layer, (k, dz) the first, and a reader (h, g) gives the rows of its history

    dX_i -= G_i (g . D_i) h          dD_i -= G_i (h . X_i) g

At last the gradient of the state that the block began with: products of all readers over the block.

Grid: (sequences, heads). Tiles as in `scan`: chunks transposed, hidden dimension in slices.
Loops over D go to `width`, which is D: one whose only turn is known when it is compiled is no loop,
and what it holds then fills registers all along.
"""

import triton
import triton.language as tl

from .blocks import block_of
from .network import curvature, error_backward, slope
from .state_backward import advance_backward, hand_back


@triton.jit(do_not_specialize=["group", "blocks"])
def scan_backward_kernel(
    p_q,  # [Mq, H, D]
    p_k,  # [M, H, D]
    p_v,
    p_a,  # [slots, H, L, BT]
    p_c,
    p_G,  # [slots, H, L, BT, BT]
    p_end,  # [slots, H, L, 4 + 2 BT]
    p_norm,  # [H, 2, D]
    p_W1_exact,  # [slots, H, D, HIDDEN], state at every block's start, not rounded
    p_S1_exact,
    p_W2_exact,  # [slots, H, HIDDEN, D]
    p_S2_exact,
    p_W2,  # rounded
    p_S2,
    p_W2_anchor,  # [N, H, HIDDEN, D], that of a chunk begun in an earlier group
    p_z,  # [slots, H, BT, HIDDEN]
    p_x,
    p_e,
    p_y,  # [slots, H, BT, D]
    p_d1,  # [slots, H, BT, HIDDEN]
    p_d2,  # [slots, H, BT, D]
    p_h,  # [slots, H, BT, HIDDEN], queries' inputs of the last layer
    p_gz,  # [slots, H, BT, HIDDEN], gradients of queries' first products,
    p_gy,  # [slots, H, BT, D], and of their last
    p_dW1,  # in and out [N, H, D, HIDDEN]
    p_dS1,
    p_dW2,  # in and out [N, H, HIDDEN, D]
    p_dS2,
    p_dW1_anchor,
    p_dS1_anchor,
    p_dW2_anchor,
    p_dS2_anchor,
    p_de,  # out [slots, H, BT, HIDDEN]
    p_dx1,  # in and out [slots, H, BT, D], dk but for what goes through the first product
    p_dx2,  # in and out [slots, H, BT, HIDDEN]
    p_dd1,  # in and out [slots, H, BT, HIDDEN], the first errors' gradient, then first products'
    p_dd2,  # in and out [slots, H, BT, D], the last errors', then last products'
    p_dv,  # out [M, H, D]
    p_da,  # in and out [slots, H, L, BT], at depth 2: of what reads the last layer
    p_dc,
    p_dG,  # in and out [slots, H, L, BT, BT], likewise
    p_dend,  # out [slots, H, L, 4 + 2 BT]
    p_dnorm,  # in and out [N, H, 2, D]
    p_bounds,  # [N, 2]
    p_tail,  # [N]
    p_ask,  # [N]
    group,
    blocks,
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
    BC: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    BH: tl.constexpr,
    DEPTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_n, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_i, o_t, o_d, o_h = tl.arange(0, BT), tl.arange(0, BC), tl.arange(0, BD), tl.arange(0, BH)
    m_d = o_d < D
    BN: tl.constexpr = BH if BH < 32 else 32
    o_r = tl.arange(0, BR)
    i_s = i_n * H + i_h
    W: tl.constexpr = D * HIDDEN
    OP: tl.constexpr = p_k.dtype.element_ty
    ACC: tl.constexpr = p_dW1.dtype.element_ty
    i_l = 1 if (L > 1 and DEPTH == 2) else 0  # coefficients of the last layer
    o_s = i_s * W

    for back in tl.range(0, blocks, num_stages=1, disable_licm=True):
        i_block = blocks - 1 - back
        i_slot = i_n * BLOCKS + i_block
        first, count, _ = block_of(p_bounds, i_slot, group, BLOCKS, CHUNK, TOKENS, SPAN)
        if count > 0:
            i_b = i_slot * H + i_h
            m_i = o_i < count
            # Where the block's rows are. Added to pointers where they are used: every pointer that
            # is kept instead costs two registers all along.
            o_bh, o_bd, o_w0 = i_b * BT * HIDDEN, i_b * BT * D, i_b * W
            o_a1, o_end1 = i_b * L * BT, i_b * L * (4 + 2 * BT)
            o_end2 = o_end1 + i_l * (4 + 2 * BT)

            # What the state handed on gives the block's inputs and errors.
            b_dG, b_dP = advance_backward(
                p_k + (first * H + i_h) * D,
                p_d1 + o_bh,
                p_dx1 + o_bd,
                p_dd1 + o_bh,
                p_dW1 + o_s,
                p_dS1 + o_s,
                p_end + o_end1,
                m_i,
                width,
                hidden,
                H * D,
                HIDDEN,
                1,
                D,
                HIDDEN,
                BT,
                BR,
                BN,
                OP,
                PRECISION,
            )
            if DEPTH == 2:
                b_dG2, b_dP2 = advance_backward(
                    p_d2 + o_bd,
                    p_x + o_bh,
                    p_dd2 + o_bd,
                    p_dx2 + o_bh,
                    p_dW2 + o_s,
                    p_dS2 + o_s,
                    p_end + o_end2,
                    m_i,
                    width,
                    hidden,
                    D,
                    1,
                    D,
                    D,
                    HIDDEN,
                    BT,
                    BR,
                    BN,
                    OP,
                    PRECISION,
                )
                if L == 1:  # layers that share gates
                    b_dG += b_dG2
                    b_dP += b_dP2
                else:
                    tl.store(p_dend + o_end2 + 4 + o_i, b_dG2)
                    tl.store(p_dend + o_end2 + 4 + BT + o_i, b_dP2)
            tl.store(p_dend + o_end1 + 4 + o_i, b_dG)
            tl.store(p_dend + o_end1 + 4 + BT + o_i, b_dP)
            tl.debug_barrier()

            chunks = tl.cdiv(count, CHUNK)  # with a token
            for rear in tl.range(0, chunks, num_stages=1, disable_licm=True):
                r = chunks - 1 - rear
                o_c = r * CHUNK + o_t  # [BC], the chunk's rows of the block
                m_c = (o_t < CHUNK) & (o_c < count)
                m_p = (o_i < r * CHUNK) & m_i  # [BT], earlier chunks
                m_l = (o_i >= (r + 1) * CHUNK) & m_i  # later chunks
                m_o = m_p | m_l
                row = r * CHUNK - 1  # of what the chunk reads with; -1 is the block's start
                o_row = o_i // CHUNK * CHUNK - 1
                m_g = m_l[:, None] & m_c[None, :]
                o_k0, o_kc = (first * H + i_h) * D, o_c * (H * D)
                if SPAN == 1:
                    p_w2, p_s2 = p_W2 + o_w0, p_S2 + o_w0
                else:  # the state that the chunk began with; there is no share of its momentum
                    begun = i_block - (group + i_block) % SPAN
                    p_w2 = p_W2_anchor + i_s * W
                    if begun >= 0:
                        p_w2 = p_W2 + ((i_n * BLOCKS + begun) * H + i_h) * W
                    p_s2 = p_w2
                # k by k: later keys by the chunk's, [BT, BC]
                b_s = tl.zeros([BT, BC], ACC)
                for i in tl.range(0, width, BR, num_stages=1, disable_licm=True):
                    m_r = i + o_r < D
                    b_l = tl.load(  # [BT, BR]
                        p_k + o_k0 + o_i[:, None] * (H * D) + (i + o_r)[None, :],
                        mask=m_l[:, None] & m_r[None, :],
                        other=0.0,
                    )
                    b_k = tl.load(  # [BR, BC]
                        p_k + o_k0 + o_kc[None, :] + (i + o_r)[:, None],
                        mask=m_c[None, :] & m_r[:, None],
                        other=0.0,
                    )
                    b_s = tl.dot(b_l, b_k, b_s, input_precision=PRECISION, out_dtype=ACC)
                # what later keys read the first layer with of the chunk's errors
                b_g = -tl.load(
                    p_G + o_a1 * BT + o_row[:, None] * BT + o_c[None, :], mask=m_g, other=0.0
                )
                b_s = (b_g * b_s).to(OP)

                if DEPTH == 2:
                    a2 = tl.load(p_a + o_a1 + i_l * BT + row, mask=row >= 0, other=1.0)
                    c2 = tl.load(p_c + o_a1 + i_l * BT + row, mask=row >= 0, other=0.0)
                    b_ex = tl.zeros([BT, BC], ACC)  # de by x: the later's by ours, ours by earlier
                    b_xx = tl.zeros([BT, BC], ACC)  # x by x
                    for j in tl.range(0, hidden, BH, num_stages=1, disable_licm=True):
                        m_h = j + o_h < HIDDEN
                        o_x = o_c[None, :] * HIDDEN + (j + o_h)[:, None]
                        m_x = m_c[None, :] & m_h[:, None]
                        b_l = tl.load(  # [BH, BT]
                            p_dd1 + o_bh + o_i[None, :] * HIDDEN + (j + o_h)[:, None],
                            mask=m_l[None, :] & m_h[:, None],
                            other=0.0,
                        ).to(OP)
                        b_dd = tl.load(p_dd1 + o_bh + o_x, mask=m_x, other=0.0)  # [BH, BC]
                        b_dd = tl.dot(b_l, b_s, b_dd, input_precision=PRECISION, out_dtype=ACC)
                        b_z = tl.load(p_z + o_bh + o_x, mask=m_x, other=0.0)
                        b_e = tl.load(p_e + o_bh + o_x, mask=m_x, other=0.0)
                        tl.store(
                            p_dd1 + o_bh + o_x, b_dd * b_e * curvature(b_z, ACTIVATION), mask=m_x
                        )
                        b_de = (b_dd * slope(b_z, ACTIVATION)).to(OP)
                        tl.store(p_de + o_bh + o_x, b_de, mask=m_x)

                        b_x = tl.load(p_x + o_bh + o_x, mask=m_x, other=0.0)
                        o_x = o_i[:, None] * HIDDEN + (j + o_h)[None, :]
                        m_x = m_l[:, None] & m_h[None, :]
                        b_l = tl.load(p_de + o_bh + o_x, mask=m_x, other=0.0)  # [BT, BH]
                        b_ex = tl.dot(b_l, b_x, b_ex, input_precision=PRECISION, out_dtype=ACC)
                        m_x = m_o[:, None] & m_h[None, :]
                        b_o = tl.load(p_x + o_bh + o_x, mask=m_x, other=0.0)
                        b_xx = tl.dot(b_o, b_x, b_xx, input_precision=PRECISION, out_dtype=ACC)
                        b_o = tl.where(m_p[:, None], b_o, 0.0).to(OP)
                        b_ex = tl.dot(b_o, b_de, b_ex, input_precision=PRECISION, out_dtype=ACC)
                    # what later keys read the last layer with of ours, and ours of earlier ones'
                    b_g = -tl.load(
                        p_G + (o_a1 + i_l * BT) * BT + o_row[:, None] * BT + o_c[None, :],
                        mask=m_g,
                        other=0.0,
                    )
                    b_gp = -tl.load(
                        p_G + (o_a1 + i_l * BT) * BT + row * BT + o_i, mask=m_p, other=0.0
                    )
                    b_gx = tl.where(m_p[:, None], b_gp[:, None], b_g)
                    b_gex, b_gxx = (b_gx * b_ex).to(OP), (b_g * b_xx).to(OP)
                    b_da = tl.zeros([BC], ACC)
                    b_dc = tl.zeros([BC], ACC)
                    b_dd2 = tl.zeros([BT, BC], ACC)  # d by d
                    tl.debug_barrier()

                # The whole gradient of the chunk's last errors.
                for i in tl.range(0, width, BR, num_stages=1, disable_licm=True):
                    m_r = i + o_r < D
                    o_f, m_f = o_c[None, :] * D + (i + o_r)[:, None], m_c[None, :] & m_r[:, None]
                    o_ft = o_i[None, :] * D + (i + o_r)[:, None]
                    b_dd = tl.load(p_dd2 + o_bd + o_f, mask=m_f, other=0.0)  # [BR, BC]
                    b_l = tl.load(  # [BR, BT]
                        p_dd2 + o_bd + o_ft, mask=m_l[None, :] & m_r[:, None], other=0.0
                    ).to(OP)
                    if DEPTH == 1:
                        b_dd = tl.dot(b_l, b_s, b_dd, input_precision=PRECISION, out_dtype=ACC)
                    else:
                        b_dd = tl.dot(b_l, b_gxx, b_dd, input_precision=PRECISION, out_dtype=ACC)
                        b_o = tl.load(  # [BR, BT]
                            p_d2 + o_bd + o_ft, mask=m_o[None, :] & m_r[:, None], other=0.0
                        ).to(OP)
                        b_dd = tl.dot(b_o, b_gex, b_dd, input_precision=PRECISION, out_dtype=ACC)
                        b_w = tl.zeros([BR, BC], ACC)
                        b_ws = tl.zeros([BR, BC], ACC)
                        for j in tl.range(0, hidden, BH, num_stages=1, disable_licm=True):
                            m_h = j + o_h < HIDDEN
                            b_de = tl.load(  # [BH, BC]
                                p_de + o_bh + o_c[None, :] * HIDDEN + (j + o_h)[:, None],
                                mask=m_c[None, :] & m_h[:, None],
                                other=0.0,
                            )
                            o_w = (j + o_h)[None, :] * D + (i + o_r)[:, None]
                            m_w = m_h[None, :] & m_r[:, None]
                            b_m = tl.load(p_w2 + o_w, mask=m_w, other=0.0)  # [BR, BH]
                            b_w = tl.dot(b_m, b_de, b_w, input_precision=PRECISION, out_dtype=ACC)
                            b_m = tl.load(p_s2 + o_w, mask=m_w, other=0.0)
                            b_ws = tl.dot(b_m, b_de, b_ws, input_precision=PRECISION, out_dtype=ACC)
                        b_d = tl.load(p_d2 + o_bd + o_f, mask=m_f, other=0.0)  # [BR, BC]
                        b_da += tl.sum(b_d * b_w, 0)
                        b_dc += tl.sum(b_d * b_ws, 0)
                        b_dd += a2 * b_w + c2 * b_ws
                        b_o = tl.load(  # [BT, BR]
                            p_d2 + o_bd + o_i[:, None] * D + (i + o_r)[None, :],
                            mask=m_o[:, None] & m_r[None, :],
                            other=0.0,
                        ).to(OP)
                        b_dd2 = tl.dot(
                            b_o, b_d.to(OP), b_dd2, input_precision=PRECISION, out_dtype=ACC
                        )
                    tl.store(p_dd2 + o_bd + o_f, b_dd, mask=m_f)
                if DEPTH == 2:
                    b_dG = tl.sum(b_ex * b_dd2, 1)  # [BT]
                    b_gdd = (b_g * b_dd2).to(OP)
                tl.debug_barrier()

                o_yc, m_yc = (
                    o_c[None, :] * D + o_d[:, None],
                    m_c[None, :] & m_d[:, None],
                )  # [BD, BC]
                o_k, b_y = (
                    o_kc[None, :] + o_d[:, None],
                    tl.load(p_y + o_bd + o_yc, mask=m_yc, other=0.0),
                )
                b_dy, b_df, b_dw, b_db = error_backward(
                    tl.load(p_dd2 + o_bd + o_yc, mask=m_yc, other=0.0),
                    b_y,
                    tl.load(p_k + o_k0 + o_k, mask=m_yc, other=0.0).to(ACC),
                    tl.load(p_v + o_k0 + o_k, mask=m_yc, other=0.0).to(ACC),
                    p_norm + i_h * 2 * D,
                    o_d,
                    m_d,
                    D,
                    HAS_NORM,
                    RESIDUAL,
                )
                if HAS_NORM:
                    p_dn = p_dnorm + i_s * 2 * D
                    b_dw += tl.load(p_dn + o_d, mask=m_d, other=0.0)
                    b_db += tl.load(p_dn + D + o_d, mask=m_d, other=0.0)
                    tl.store(p_dn + o_d, b_dw, mask=m_d)
                    tl.store(p_dn + D + o_d, b_db, mask=m_d)
                tl.store(p_dd2 + o_bd + o_yc, b_dy, mask=m_yc)
                tl.store(p_dv + o_k0 + o_k, -b_df.to(p_dv.dtype.element_ty), mask=m_yc)
                if RESIDUAL:
                    b_df += tl.load(p_dx1 + o_bd + o_yc, mask=m_yc, other=0.0)
                    tl.store(p_dx1 + o_bd + o_yc, b_df, mask=m_yc)
                tl.debug_barrier()

                if DEPTH == 2:
                    b_gd = tl.zeros([BT, BC], ACC)  # g by d: ours by earlier, the later's by ours
                    for i in tl.range(0, width, BR, num_stages=1, disable_licm=True):
                        m_r = i + o_r < D
                        o_f = o_c[None, :] * D + (i + o_r)[:, None]
                        m_f = m_c[None, :] & m_r[:, None]
                        o_ft = o_i[:, None] * D + (i + o_r)[None, :]
                        b_gy = tl.load(p_dd2 + o_bd + o_f, mask=m_f, other=0.0).to(OP)  # [BR, BC]
                        b_o = tl.load(  # [BT, BR]
                            p_d2 + o_bd + o_ft, mask=m_p[:, None] & m_r[None, :], other=0.0
                        ).to(OP)
                        b_gd = tl.dot(b_o, b_gy, b_gd, input_precision=PRECISION, out_dtype=ACC)
                        b_d = tl.load(p_d2 + o_bd + o_f, mask=m_f, other=0.0).to(OP)
                        b_l = tl.load(
                            p_dd2 + o_bd + o_ft, mask=m_l[:, None] & m_r[None, :], other=0.0
                        ).to(OP)
                        b_gd = tl.dot(b_l, b_d, b_gd, input_precision=PRECISION, out_dtype=ACC)
                    # The row belongs to the query before the chunk, which read with it too.
                    b_dG += tl.sum(b_xx * b_gd, 1)
                    p_row = p_dG + ((i_b * L + i_l) * BT + row) * BT + o_i
                    tl.store(p_row, tl.load(p_row, mask=m_p, other=0.0) - b_dG, mask=m_p)
                    b_ggd = (b_gx * b_gd).to(OP)
                    b_pa = tl.zeros([BH, BC], ACC)
                    b_pc = tl.zeros([BH, BC], ACC)
                    for j in tl.range(0, hidden, BH, num_stages=1, disable_licm=True):
                        m_h = j + o_h < HIDDEN
                        b_w = tl.zeros([BH, BC], ACC)
                        b_ws = tl.zeros([BH, BC], ACC)
                        for i in tl.range(0, width, BR, num_stages=1, disable_licm=True):
                            m_r = i + o_r < D
                            b_gy = tl.load(  # [BR, BC]
                                p_dd2 + o_bd + o_c[None, :] * D + (i + o_r)[:, None],
                                mask=m_c[None, :] & m_r[:, None],
                                other=0.0,
                            ).to(OP)
                            o_w = (j + o_h)[:, None] * D + (i + o_r)[None, :]
                            m_w = m_h[:, None] & m_r[None, :]
                            b_m = tl.load(p_w2 + o_w, mask=m_w, other=0.0)  # [BH, BR]
                            b_w = tl.dot(b_m, b_gy, b_w, input_precision=PRECISION, out_dtype=ACC)
                            b_m = tl.load(p_s2 + o_w, mask=m_w, other=0.0)
                            b_ws = tl.dot(b_m, b_gy, b_ws, input_precision=PRECISION, out_dtype=ACC)
                        o_x = o_c[None, :] * HIDDEN + (j + o_h)[:, None]
                        m_x = m_c[None, :] & m_h[:, None]
                        b_x = tl.load(p_x + o_bh + o_x, mask=m_x, other=0.0).to(ACC)  # [BH, BC]
                        b_pa += b_x * b_w
                        b_pc += b_x * b_ws
                        b_dx = a2 * b_w + c2 * b_ws
                        o_xt = o_i[None, :] * HIDDEN + (j + o_h)[:, None]
                        b_l = tl.load(  # [BH, BT]
                            p_de + o_bh + o_xt, mask=m_l[None, :] & m_h[:, None], other=0.0
                        )
                        b_dx = tl.dot(b_l, b_gdd, b_dx, input_precision=PRECISION, out_dtype=ACC)
                        b_o = tl.load(
                            p_x + o_bh + o_xt, mask=m_o[None, :] & m_h[:, None], other=0.0
                        )
                        b_dx = tl.dot(b_o, b_ggd, b_dx, input_precision=PRECISION, out_dtype=ACC)
                        b_dx += tl.load(p_dx2 + o_bh + o_x, mask=m_x, other=0.0)
                        b_z = tl.load(p_z + o_bh + o_x, mask=m_x, other=0.0)
                        b_dz = tl.load(p_dd1 + o_bh + o_x, mask=m_x, other=0.0)
                        b_dz += b_dx * slope(b_z, ACTIVATION)
                        tl.store(p_dd1 + o_bh + o_x, b_dz, mask=m_x)
                    if row >= 0:
                        da = tl.sum(b_da + tl.sum(b_pa, 0), 0)
                        dc = tl.sum(b_dc + tl.sum(b_pc, 0), 0)
                        i_a = (i_b * L + i_l) * BT + row
                        tl.store(p_da + i_a, tl.load(p_da + i_a) + da)
                        tl.store(p_dc + i_a, tl.load(p_dc + i_a) + dc)
                tl.debug_barrier()

            # What all that read the state in this block give it.
            o_row = o_i // CHUNK * CHUNK - 1 if SPAN == 1 else o_i * 0 - 1  # that keys read with
            before = first - tl.load(p_bounds + 2 * i_n) - tl.load(p_tail + i_n)
            begins = (group + i_block) % SPAN == 0
            da, dc, dp = hand_back(
                p_q + ((tl.load(p_ask + i_n) + before) * H + i_h) * D,
                p_gz + o_bh,
                p_k + (first * H + i_h) * D,
                p_dd1 + o_bh,
                p_k,
                p_dd1 + o_bh,
                p_a + o_a1,
                p_c + o_a1,
                o_row,
                p_W1_exact + o_w0,
                p_S1_exact + o_w0,
                p_dW1 + o_s,
                p_dS1 + o_s,
                p_dW1_anchor + o_s,
                p_dS1_anchor + o_s,
                p_end + o_end1,
                m_i & (before + o_i >= 0),
                m_i,
                begins,
                width,
                hidden,
                H * D,
                D,
                HIDDEN,
                BT,
                BR,
                BN,
                False,
                SPAN,
                PRECISION,
            )
            if DEPTH == 2:
                da2, dc2, dp2 = hand_back(
                    p_h + o_bh,
                    p_gy + o_bd,
                    p_x + o_bh,
                    p_dd2 + o_bd,
                    p_de + o_bh,
                    p_d2 + o_bd,
                    p_a + o_a1 + i_l * BT,
                    p_c + o_a1 + i_l * BT,
                    o_row,
                    p_W2_exact + o_w0,
                    p_S2_exact + o_w0,
                    p_dW2 + o_s,
                    p_dS2 + o_s,
                    p_dW2_anchor + o_s,
                    p_dS2_anchor + o_s,
                    p_end + o_end2,
                    m_i,
                    m_i,
                    begins,
                    hidden,
                    width,
                    HIDDEN,
                    HIDDEN,
                    D,
                    BT,
                    BR,
                    BN,
                    True,
                    SPAN,
                    PRECISION,
                )
                if L == 1:
                    da, dc, dp = da + da2, dc + dc2, dp + dp2
                else:
                    tl.store(p_dend + o_end2, da2)
                    tl.store(p_dend + o_end2 + 1, dc2)
                    tl.store(p_dend + o_end2 + 2, dp2)
            tl.store(p_dend + o_end1, da)
            tl.store(p_dend + o_end1 + 1, dc)
            tl.store(p_dend + o_end1 + 2, dp)
            tl.debug_barrier()

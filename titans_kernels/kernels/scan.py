"""Learning: errors of every key and the state from block to block, the only sequential pass.

Inside a block, chunk after chunk, with the coefficients of the weights the chunk starts with:

    z_l = a (x W_l) + c (x S_l) - (G * (x X_l^T)) D_l              over strictly earlier chunks
    e   = a (d W^T) + c (d S^T) - (G * (d D^T)) X                  d_1 = e * act'(z_1)

and at its end, in float32, `W' = a W + c S - X^T (G D)`, `S' = p S - X^T (P D)`.

Grid: (sequences, heads). A program walks its blocks of one group. All products of a chunk are
transposed, the hidden dimension in slices on the rows. What one thread stores others load, so a
barrier stands between; loops that store what they load are not pipelined.
"""

import triton
import triton.language as tl

from .blocks import block_of
from .network import activate, error, slope


@triton.jit
def advance(
    b_x,  # [BR, BT], inputs of the layer, transposed
    b_d,  # [BT, BC], errors, not yet rounded
    p_W,  # the block's state, not rounded
    p_S,
    p_W_new,  # where it goes
    p_S_new,
    p_W_next,  # where the next block's readers find it
    p_S_next,
    p_W_anchor,
    p_S_anchor,
    p_end,  # coefficients of the state that is handed on
    o,  # [BR, BC] offsets of the tile in a matrix
    m,
    o_t,
    NEXT,  # bool: there is a next block in the group
    ANCHOR,  # bool: the block makes its chunk whole
    BT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of one layer's state to the block's end."""
    OP: tl.constexpr = b_x.dtype
    ACC: tl.constexpr = p_W.dtype.element_ty
    a, c, p = tl.load(p_end), tl.load(p_end + 1), tl.load(p_end + 2)
    b_G = tl.load(p_end + 4 + o_t)
    b_P = tl.load(p_end + 4 + BT + o_t)
    b_W = tl.load(p_W + o, mask=m, other=0.0)
    b_S = tl.load(p_S + o, mask=m, other=0.0)
    b_W = a * b_W + c * b_S
    b_W = tl.dot(b_x, (-b_G[:, None] * b_d).to(OP), b_W, input_precision=PRECISION, out_dtype=ACC)
    b_S = p * b_S
    b_S = tl.dot(b_x, (-b_P[:, None] * b_d).to(OP), b_S, input_precision=PRECISION, out_dtype=ACC)
    tl.store(p_W_new + o, b_W, mask=m)
    tl.store(p_S_new + o, b_S, mask=m)
    if NEXT:
        tl.store(p_W_next + o, b_W.to(OP), mask=m)
        tl.store(p_S_next + o, b_S.to(OP), mask=m)
    if ANCHOR:
        tl.store(p_W_anchor + o, b_W, mask=m)
        tl.store(p_S_anchor + o, b_S, mask=m)


@triton.jit(do_not_specialize=["group", "blocks", "chunks"])
def scan_kernel(
    p_k,  # [M, H, D]
    p_v,
    p_a,  # [slots, H, L, BT]
    p_c,
    p_G,  # [slots, H, L, BT, BT]
    p_end,  # [slots, H, L, 4 + 2 BT]
    p_norm,  # [H, 2, D]
    p_W1,  # in and out [N, H, D, HIDDEN], running state, not rounded; with KEEP,
    p_S1,  # [slots, H, D, HIDDEN], that of every block's start
    p_W2,  # in and out [N, H, HIDDEN, D]; [slots, H, HIDDEN, D]
    p_S2,
    p_W1_anchor,  # in and out, the state that an open chunk started with, where chunks span blocks
    p_S1_anchor,
    p_W2_anchor,
    p_S2_anchor,
    p_z,  # scratch [N, H, BT, HIDDEN]; with KEEP, out [slots, H, BT, HIDDEN], first products
    p_x,  # out [slots, H, BT, HIDDEN]
    p_d1,  # out [slots, H, BT, HIDDEN]
    p_d2,  # out [slots, H, BT, D]
    p_W1_out,  # out [slots, H, D, HIDDEN], the state at every block's start, rounded
    p_S1_out,
    p_W2_out,
    p_S2_out,
    p_y,  # where the backward pass wants them, out [slots, H, BT, D], last products
    p_e,  # [slots, H, BT, HIDDEN], errors behind the activation
    p_bounds,
    group,
    blocks,
    chunks,
    hidden,
    width,  # D, as in scan_backward
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
    BH: tl.constexpr,
    DEPTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
    KEEP: tl.constexpr,
):
    i_n, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_i, o_t, o_d, o_h = tl.arange(0, BT), tl.arange(0, BC), tl.arange(0, BD), tl.arange(0, BH)
    m_d = o_d < D
    BU: tl.constexpr = BD if BD < 128 else 128
    o_u = tl.arange(0, BU)
    i_s = i_n * H + i_h
    W: tl.constexpr = D * HIDDEN
    OP: tl.constexpr = p_k.dtype.element_ty
    ACC: tl.constexpr = p_W1.dtype.element_ty
    i_l = 1 if L > 1 else 0  # coefficients of the last layer
    if DEPTH == 1:
        i_l = 0
    o_s = i_s * W

    for i_block in tl.range(0, blocks, num_stages=1, disable_licm=True):
        slot = i_n * BLOCKS + i_block
        first, count, _ = block_of(p_bounds, slot, group, BLOCKS, CHUNK, TOKENS, SPAN)
        if count > 0:
            i_b = (i_n * BLOCKS + i_block) * H + i_h
            o_token = ((first + o_i) * H + i_h) * D
            m_i = o_i < count
            o_a1, o_a2 = i_b * L * BT, (i_b * L + i_l) * BT
            o_bh, o_bd, o_z0 = i_b * BT * HIDDEN, i_b * BT * D, (i_b if KEEP else i_s) * BT * HIDDEN
            if SPAN == 1:
                p_w1, p_s1 = p_W1_out + i_b * W, p_S1_out + i_b * W
                p_w2, p_s2 = p_W2_out + i_b * W, p_S2_out + i_b * W
            else:
                p_w1, p_s1 = p_W1_anchor + o_s, p_S1_anchor + o_s
                p_w2, p_s2 = p_W2_anchor + o_s, p_S2_anchor + o_s

            # x W_1 and x S_1 do not depend on the order of chunks: one product for the block.
            o_row = o_i // CHUNK * CHUNK - 1 if SPAN == 1 else o_i * 0 - 1
            b_a = tl.load(p_a + o_a1 + o_row, mask=o_row >= 0, other=1.0)  # [BT]
            b_c = tl.load(p_c + o_a1 + o_row, mask=o_row >= 0, other=0.0)
            b_k = tl.load(  # [BD, BT]
                p_k + o_token[None, :] + o_d[:, None], mask=m_i[None, :] & m_d[:, None], other=0.0
            )
            for j in tl.range(0, hidden, BH, num_stages=1, disable_licm=True):
                m_h = j + o_h < HIDDEN
                o_w = o_d[None, :] * HIDDEN + (j + o_h)[:, None]
                m_w = m_d[None, :] & m_h[:, None]
                b_w = tl.load(p_w1 + o_w, mask=m_w, other=0.0).to(OP)  # [BH, BD]
                b_z = b_a[None, :] * tl.dot(b_w, b_k, input_precision=PRECISION, out_dtype=ACC)
                b_w = tl.load(p_s1 + o_w, mask=m_w, other=0.0).to(OP)
                b_z += b_c[None, :] * tl.dot(b_w, b_k, input_precision=PRECISION, out_dtype=ACC)
                o_z = o_i[None, :] * HIDDEN + (j + o_h)[:, None]
                tl.store(p_z + o_z0 + o_z, b_z, mask=m_i[None, :] & m_h[:, None])
            tl.debug_barrier()

            for r in tl.range(0, chunks, num_stages=1, disable_licm=True):
                o_c = r * CHUNK + o_t  # [BC], the chunk's rows of the block
                m_c = (o_t < CHUNK) & (o_c < count)
                m_p = (o_i < r * CHUNK) & m_i  # [BT], earlier chunks
                row = r * CHUNK - 1  # state that the chunk starts with; -1 is the block's start
                b_kc = tl.load(  # [BD, BC]
                    p_k + ((first + o_c) * H + i_h)[None, :] * D + o_d[:, None],
                    mask=m_c[None, :] & m_d[:, None],
                    other=0.0,
                )
                b_vc = tl.load(
                    p_v + ((first + o_c) * H + i_h)[None, :] * D + o_d[:, None],
                    mask=m_c[None, :] & m_d[:, None],
                    other=0.0,
                )
                b_kp = tl.load(  # [BT, BD]
                    p_k + o_token[:, None] + o_d[None, :],
                    mask=m_p[:, None] & m_d[None, :],
                    other=0.0,
                )
                b_g1 = -tl.load(p_G + o_a1 * BT + row * BT + o_i, mask=m_p, other=0.0)  # [BT]
                b_s = tl.dot(b_kp, b_kc, input_precision=PRECISION, out_dtype=ACC)
                b_s = (b_g1[:, None] * b_s).to(OP)  # [BT, BC]

                o_yc = o_c[None, :] * D + o_d[:, None]
                m_yc = m_c[None, :] & m_d[:, None]
                m_yp = m_p[None, :] & m_d[:, None]
                o_yp = o_i[None, :] * D + o_d[:, None]
                if DEPTH == 1:
                    b_y = tl.load(p_z + o_z0 + o_yc, mask=m_yc, other=0.0)  # [BD, BC]
                    b_d = tl.load(p_d2 + o_bd + o_yp, mask=m_yp, other=0.0).to(OP)  # [BD, BT]
                    b_y = tl.dot(b_d, b_s, b_y, input_precision=PRECISION, out_dtype=ACC)
                else:
                    a2 = tl.load(p_a + o_a2 + row, mask=row >= 0, other=1.0)
                    c2 = tl.load(p_c + o_a2 + row, mask=row >= 0, other=0.0)
                    b_g2 = -tl.load(p_G + o_a2 * BT + row * BT + o_i, mask=m_p, other=0.0)
                    b_y = tl.zeros([BD, BC], ACC)
                    b_s2 = tl.zeros([BT, BC], ACC)
                    for j in tl.range(0, hidden, BH, num_stages=1, disable_licm=True):
                        m_h = j + o_h < HIDDEN
                        o_x = o_c[None, :] * HIDDEN + (j + o_h)[:, None]
                        m_x = m_c[None, :] & m_h[:, None]
                        o_p = o_i[None, :] * HIDDEN + (j + o_h)[:, None]
                        m_hp = m_p[None, :] & m_h[:, None]
                        b_d = tl.load(p_d1 + o_bh + o_p, mask=m_hp, other=0.0).to(OP)  # [BH, BT]
                        b_z = tl.load(p_z + o_z0 + o_x, mask=m_x, other=0.0)  # [BH, BC]
                        b_z = tl.dot(b_d, b_s, b_z, input_precision=PRECISION, out_dtype=ACC)
                        tl.store(p_z + o_z0 + o_x, b_z, mask=m_x)
                        b_h = activate(b_z, ACTIVATION)
                        tl.store(p_x + o_bh + o_x, b_h.to(OP), mask=m_x)

                        b_x = tl.load(  # [BT, BH]
                            p_x + o_bh + o_i[:, None] * HIDDEN + (j + o_h)[None, :],
                            mask=m_p[:, None] & m_h[None, :],
                            other=0.0,
                        )
                        b_s2 = tl.dot(
                            b_x, b_h.to(OP), b_s2, input_precision=PRECISION, out_dtype=ACC
                        )
                        o_w = (j + o_h)[None, :] * D + o_d[:, None]
                        m_w = m_h[None, :] & m_d[:, None]
                        b_w = tl.load(p_w2 + o_w, mask=m_w, other=0.0).to(OP)  # [BD, BH]
                        b_ah = (a2 * b_h).to(OP)
                        b_y = tl.dot(b_w, b_ah, b_y, input_precision=PRECISION, out_dtype=ACC)
                        b_w = tl.load(p_s2 + o_w, mask=m_w, other=0.0).to(OP)
                        b_ch = (c2 * b_h).to(OP)
                        b_y = tl.dot(b_w, b_ch, b_y, input_precision=PRECISION, out_dtype=ACC)
                    b_d = tl.load(p_d2 + o_bd + o_yp, mask=m_yp, other=0.0).to(OP)  # [BD, BT]
                    b_s2 = (b_g2[:, None] * b_s2).to(OP)
                    b_y = tl.dot(b_d, b_s2, b_y, input_precision=PRECISION, out_dtype=ACC)

                if KEEP:
                    tl.store(p_y + o_bd + o_yc, b_y, mask=m_yc)
                b_e = error(
                    b_y,
                    b_kc.to(ACC),
                    b_vc.to(ACC),
                    p_norm + i_h * 2 * D,
                    o_d,
                    m_d,
                    D,
                    HAS_NORM,
                    RESIDUAL,
                )  # [BD, BC]
                tl.store(p_d2 + o_bd + o_yc, b_e, mask=m_yc)
                if DEPTH == 2:
                    b_d = tl.load(  # [BT, BD]
                        p_d2 + o_bd + o_i[:, None] * D + o_d[None, :],
                        mask=m_p[:, None] & m_d[None, :],
                        other=0.0,
                    ).to(OP)
                    b_s2 = tl.dot(b_d, b_e.to(OP), input_precision=PRECISION, out_dtype=ACC)
                    b_s2 = (b_g2[:, None] * b_s2).to(OP)  # [BT, BC]
                    b_ae, b_ce = (a2 * b_e).to(OP), (c2 * b_e).to(OP)
                    tl.debug_barrier()
                    for j in tl.range(0, hidden, BH, num_stages=1, disable_licm=True):
                        m_h = j + o_h < HIDDEN
                        o_w = (j + o_h)[:, None] * D + o_d[None, :]
                        m_w = m_h[:, None] & m_d[None, :]
                        b_w = tl.load(p_w2 + o_w, mask=m_w, other=0.0).to(OP)  # [BH, BD]
                        b_h = tl.dot(b_w, b_ae, input_precision=PRECISION, out_dtype=ACC)
                        b_w = tl.load(p_s2 + o_w, mask=m_w, other=0.0).to(OP)
                        b_h = tl.dot(b_w, b_ce, b_h, input_precision=PRECISION, out_dtype=ACC)
                        o_p = o_i[None, :] * HIDDEN + (j + o_h)[:, None]
                        m_hp = m_p[None, :] & m_h[:, None]
                        b_x = tl.load(p_x + o_bh + o_p, mask=m_hp, other=0.0)  # [BH, BT]
                        b_h = tl.dot(b_x, b_s2, b_h, input_precision=PRECISION, out_dtype=ACC)
                        o_x = o_c[None, :] * HIDDEN + (j + o_h)[:, None]
                        m_x = m_c[None, :] & m_h[:, None]
                        b_z = tl.load(p_z + o_z0 + o_x, mask=m_x, other=0.0)
                        if KEEP:
                            tl.store(p_e + o_bh + o_x, b_h, mask=m_x)
                        b_h = b_h * slope(b_z, ACTIVATION)
                        tl.store(p_d1 + o_bh + o_x, b_h, mask=m_x)
                tl.debug_barrier()

            more = i_block + 1 < BLOCKS
            i_x = i_b + H if more else i_b
            o_old, o_new = (i_b * W, i_x * W) if KEEP else (o_s, o_s)
            whole = (SPAN > 1) & ((group + i_block + 1) % SPAN == 0)
            if SPAN > 1:  # the last block of a chunk that lacks tokens does not make it whole
                whole = whole & (count == CHUNK - (SPAN - 1) * TOKENS)
            # Where the backward pass wants states of the group, it has that of the next.
            until = width if more | (not KEEP) else 0
            # Parts of D by slices of the hidden dimension: W and S of a tile fit in registers.
            for i in tl.range(0, until, BU, num_stages=1, disable_licm=True):
                m_u = i + o_u < D
                b_ku = tl.load(  # [BU, BT]
                    p_k + o_token[None, :] + (i + o_u)[:, None],
                    mask=m_i[None, :] & m_u[:, None],
                    other=0.0,
                )
                for j in tl.range(0, hidden, BH, num_stages=1, disable_licm=True):
                    m_h = j + o_h < HIDDEN
                    b_d1 = tl.load(  # [BT, BH]
                        p_d1 + o_bh + o_i[:, None] * HIDDEN + (j + o_h)[None, :],
                        mask=m_i[:, None] & m_h[None, :],
                        other=0.0,
                    )
                    advance(
                        b_ku,
                        b_d1,
                        p_W1 + o_old,
                        p_S1 + o_old,
                        p_W1 + o_new,
                        p_S1 + o_new,
                        p_W1_out + i_x * W,
                        p_S1_out + i_x * W,
                        p_W1_anchor + o_s,
                        p_S1_anchor + o_s,
                        p_end + i_b * L * (4 + 2 * BT),
                        (i + o_u)[:, None] * HIDDEN + (j + o_h)[None, :],
                        m_u[:, None] & m_h[None, :],
                        o_i,
                        more,
                        whole,
                        BT,
                        PRECISION,
                    )
                    if DEPTH == 2:
                        b_x = tl.load(  # [BH, BT]
                            p_x + o_bh + o_i[None, :] * HIDDEN + (j + o_h)[:, None],
                            mask=m_i[None, :] & m_h[:, None],
                            other=0.0,
                        )
                        b_d2 = tl.load(  # [BT, BU]
                            p_d2 + o_bd + o_i[:, None] * D + (i + o_u)[None, :],
                            mask=m_i[:, None] & m_u[None, :],
                            other=0.0,
                        )
                        advance(
                            b_x,
                            b_d2,
                            p_W2 + o_old,
                            p_S2 + o_old,
                            p_W2 + o_new,
                            p_S2 + o_new,
                            p_W2_out + i_x * W,
                            p_S2_out + i_x * W,
                            p_W2_anchor + o_s,
                            p_S2_anchor + o_s,
                            p_end + (i_b * L + i_l) * (4 + 2 * BT),
                            (j + o_h)[:, None] * D + (i + o_u)[None, :],
                            m_h[:, None] & m_u[None, :],
                            o_i,
                            more,
                            whole,
                            BT,
                            PRECISION,
                        )
            tl.debug_barrier()

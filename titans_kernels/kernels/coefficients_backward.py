"""Gradients of coefficients to gradients of gates, parallel over blocks and heads.

The rows of `coefficients` in reverse (see ../coefficients.py for the algebra), every row with

    dP_t += dG_t          dtheta_t = dP_t[t]      deta_t = <dP_t, P_{t-1}> + dp_t p_{t-1}
    dp_t += dc_t          dalpha_t = -<dG_t, G_{t-1}> - dc_t c_{t-1} - da_t a_{t-1}

A row's gradient comes from the query of its token, from all keys of the chunk that starts behind it
(those of the first layer's are still apart), and from the state that the block hands on.

Grid: (sequences, blocks, heads x layers with gates of their own).
"""

import triton
import triton.language as tl

from .blocks import block_at, block_of


@triton.jit(do_not_specialize=["group"])
def coefficients_backward_kernel(
    token,  # Tokens
    coefficient,  # Coefficients
    grad,  # CoefficientGrad
    token_grad,  # TokenGrad: theta, alpha and eta are written
    group,
    sizes,  # BlockSizes
    READ: tl.constexpr,  # "chunk": of any layer, queries read with rows that keys read with
):
    H: tl.constexpr = sizes.H
    L: tl.constexpr = sizes.L
    CHUNK: tl.constexpr = sizes.CHUNK
    BT: tl.constexpr = sizes.BT
    i_n, i_block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_h, i_l = tl.program_id(2) // L, tl.program_id(2) % L
    first, count, end = block_of(token, i_n, group + i_block, sizes)
    if count == 0:
        return
    i_s, blocks = i_n * sizes.H + i_h, tl.num_programs(1)
    block = block_at(i_n, i_h, i_s, i_block, blocks, group, first, count, sizes)
    o_t = tl.arange(0, BT)
    o_gate = (first * H + i_h) * L + i_l
    i_g = block.slot * L + i_l
    p_a = coefficient.a + i_g * BT
    p_c = coefficient.c + i_g * BT
    p_p = coefficient.p + i_g * BT
    p_G = coefficient.G + i_g * BT * BT
    p_P = coefficient.P + i_g * BT * BT
    p_da = grad.a + i_g * BT
    p_dc = grad.c + i_g * BT
    p_dG = grad.G + i_g * BT * BT
    p_dend = grad.end + i_g * (4 + 2 * BT)
    i_key = i_g if READ == "chunk" else block.slot
    p_da_key = grad.a_key + i_key * BT
    p_dc_key = grad.c_key + i_key * BT
    p_dG_key = grad.G_key + i_key * BT * BT

    ACC: tl.constexpr = coefficient.G.dtype.element_ty
    da = tl.full([], 0.0, ACC)
    dc = tl.full([], 0.0, ACC)
    dp = tl.full([], 0.0, ACC)
    b_dG = tl.zeros([BT], ACC)
    b_dP = tl.zeros([BT], ACC)
    da_key = tl.full([], 0.0, ACC)  # of the keys of the chunk that is walked over
    dc_key = tl.full([], 0.0, ACC)
    b_dG_key = tl.zeros([BT], ACC)
    for back in range(0, BT):
        t = BT - 1 - back
        if t < count:
            if t + 1 == end:
                da += tl.load(p_dend)
                dc += tl.load(p_dend + 1)
                dp += tl.load(p_dend + 2)
                b_dG += tl.load(p_dend + 4 + o_t, mask=o_t <= t, other=0.0)
                b_dP += tl.load(p_dend + 4 + BT + o_t, mask=o_t <= t, other=0.0)
            da += tl.load(p_da + t)
            dc += tl.load(p_dc + t)
            b_dG += tl.load(p_dG + t * BT + o_t, mask=o_t <= t, other=0.0)
            if sizes.SPAN == 1:
                if (t + 1) % CHUNK == 0:  # the next token's chunk starts at this row
                    da += da_key
                    dc += dc_key
                    b_dG += b_dG_key
                    da_key = tl.full([], 0.0, ACC)
                    dc_key = tl.full([], 0.0, ACC)
                    b_dG_key = tl.zeros([BT], ACC)
                if (t >= CHUNK) & ((i_l == 0) | (READ == "chunk")):
                    da_key += tl.load(p_da_key + t)
                    dc_key += tl.load(p_dc_key + t)
                    m = o_t < t // CHUNK * CHUNK
                    b_dG_key += tl.load(p_dG_key + t * BT + o_t, mask=m, other=0.0)

            keep = 1.0 - tl.load(token.alpha + o_gate + t * H * L).to(ACC)
            eta = tl.load(token.eta + o_gate + t * H * L).to(ACC)
            a = tl.load(p_a + t - 1, mask=t > 0, other=1.0)
            c = tl.load(p_c + t - 1, mask=t > 0, other=0.0)
            p = tl.load(p_p + t - 1, mask=t > 0, other=1.0)
            m = o_t < t
            b_G = tl.load(p_G + (t - 1) * BT + o_t, mask=m, other=0.0)
            b_P = tl.load(p_P + (t - 1) * BT + o_t, mask=m, other=0.0)
            dp += dc
            b_dP += b_dG
            dtheta = tl.sum(tl.where(o_t == t, b_dP, 0.0), 0)
            deta = tl.sum(b_dP * b_P, 0) + dp * p
            dalpha = -(tl.sum(b_dG * b_G, 0) + dc * c + da * a)
            o = o_gate + t * H * L
            tl.store(token_grad.theta + o, dtheta.to(token_grad.theta.dtype.element_ty))
            tl.store(token_grad.alpha + o, dalpha.to(token_grad.alpha.dtype.element_ty))
            tl.store(token_grad.eta + o, deta.to(token_grad.eta.dtype.element_ty))
            da = keep * da
            dc = keep * dc
            b_dG = keep * b_dG
            dp = eta * dp
            b_dP = eta * b_dP

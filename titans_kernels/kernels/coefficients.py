"""Gates to coefficients (see ../coefficients.py for the algebra), parallel over blocks and heads.

Row by row, from the recurrence itself: exact at gates of 0 and 1. A row that is not a token's
repeats the row before it.

Grid: (slots, heads, layers with gates of their own). Nothing is sequential but the rows of a block.
"""

import triton
import triton.language as tl

from .blocks import block_of


@triton.jit(do_not_specialize=["group"])
def coefficients_kernel(
    p_theta,  # [M, H, L]
    p_alpha,
    p_eta,
    p_a,  # out [slots, H, L, BT], of the state right after each token
    p_c,
    p_G,  # out [slots, H, L, BT, BT]
    p_end,  # out [slots, H, L, 4 + 2 BT]: a, c, p, unused, G, P of the state handed on
    p_p,  # out [slots, H, L, BT], where the backward pass wants them
    p_P,  # out [slots, H, L, BT, BT]
    p_bounds,  # [N, 2]
    group,  # index of the first block of the group
    BLOCKS: tl.constexpr,  # of a group, per sequence
    H: tl.constexpr,
    L: tl.constexpr,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,  # of a block
    SPAN: tl.constexpr,  # blocks to a chunk
    BT: tl.constexpr,
    KEEP: tl.constexpr,
):
    i_slot, i_h, i_l = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    first, count, end = block_of(p_bounds, i_slot, group, BLOCKS, CHUNK, TOKENS, SPAN)
    if count == 0:
        return
    o_t = tl.arange(0, BT)
    p_gate = (first * H + i_h) * L + i_l
    out = (i_slot * H + i_h) * L + i_l
    p_end += out * (4 + 2 * BT)

    ACC: tl.constexpr = p_G.dtype.element_ty
    a = tl.full([], 1.0, ACC)
    p = tl.full([], 1.0, ACC)
    c = tl.full([], 0.0, ACC)
    b_P = tl.zeros([BT], ACC)
    b_G = tl.zeros([BT], ACC)
    if end == 0:
        tl.store(p_end, a)
        tl.store(p_end + 1, c)
        tl.store(p_end + 2, p)
        tl.store(p_end + 4 + o_t, b_G)
        tl.store(p_end + 4 + BT + o_t, b_P)
    for t in range(0, BT):
        if t < count:
            theta = tl.load(p_theta + p_gate + t * H * L).to(ACC)
            keep = 1.0 - tl.load(p_alpha + p_gate + t * H * L).to(ACC)
            eta = tl.load(p_eta + p_gate + t * H * L).to(ACC)
            p = eta * p
            b_P = eta * b_P + tl.where(o_t == t, theta, 0.0)
            a = keep * a
            c = keep * c + p
            b_G = keep * b_G + b_P
        tl.store(p_a + out * BT + t, a)
        tl.store(p_c + out * BT + t, c)
        tl.store(p_G + (out * BT + t) * BT + o_t, b_G)
        if KEEP:
            tl.store(p_p + out * BT + t, p)
            tl.store(p_P + (out * BT + t) * BT + o_t, b_P)
        if t + 1 == end:
            tl.store(p_end, a)
            tl.store(p_end + 1, c)
            tl.store(p_end + 2, p)
            tl.store(p_end + 4 + o_t, b_G)
            tl.store(p_end + 4 + BT + o_t, b_P)

"""Gates to coefficients (see ../coefficients.py for the algebra), parallel over blocks and heads.

Row by row, from the recurrence itself: exact at gates of 0 and 1. A row that is not a token's
repeats the row before it.

Grid: (sequences, blocks, heads x layers with gates of their own). Nothing is sequential but the
rows of a block.
"""

import triton
import triton.language as tl

from .blocks import block_at, block_of


@triton.jit(do_not_specialize=["group"])
def coefficients_kernel(
    token,  # Tokens
    coefficient,  # Coefficients, out; p and P where the backward pass wants them
    group,  # the first block of the group
    sizes,  # BlockSizes
    KEEP: tl.constexpr,
):
    L: tl.constexpr = sizes.L
    i_n, i_block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_h, i_l = tl.program_id(2) // L, tl.program_id(2) % L
    first, count, end = block_of(token, i_n, group + i_block, sizes)
    if count == 0:
        return
    i_s, blocks = i_n * sizes.H + i_h, tl.num_programs(1)
    block = block_at(i_n, i_h, i_s, i_block, blocks, group, first, count, sizes)
    rows_of_gates(token, coefficient, block, end, sizes.BT, i_l, sizes, KEEP)


@triton.jit
def rows_of_gates(
    token,
    coefficient,
    block,
    end,  # tokens that the state handed on has learned from
    rows,  # BT
    i_l,
    sizes,
    KEEP: tl.constexpr,
):
    """The rows of a block and head, of one layer's gates."""
    H: tl.constexpr = sizes.H
    L: tl.constexpr = sizes.L
    BT: tl.constexpr = sizes.BT
    o_t = tl.arange(0, BT)
    o_gate, i_g = (block.first * H + block.h) * L + i_l, block.slot * L + i_l
    p_end = coefficient.end + i_g * (4 + 2 * BT)

    ACC: tl.constexpr = coefficient.G.dtype.element_ty
    a = tl.full([], 1.0, ACC)
    p = tl.full([], 1.0, ACC)
    c = tl.full([], 0.0, ACC)
    b_P = tl.zeros([BT], ACC)
    b_G = tl.zeros([BT], ACC)
    b_a, b_c, b_p = b_G, b_G, b_G
    if end == 0:
        tl.store(p_end, a)
        tl.store(p_end + 1, c)
        tl.store(p_end + 2, p)
        tl.store(p_end + 4 + o_t, b_G)
        tl.store(p_end + 4 + BT + o_t, b_P)
    for t in range(0, rows):
        if t < block.count:
            theta = tl.load(token.theta + o_gate + t * H * L).to(ACC)
            keep = 1.0 - tl.load(token.alpha + o_gate + t * H * L).to(ACC)
            eta = tl.load(token.eta + o_gate + t * H * L).to(ACC)
            p = eta * p
            b_P = eta * b_P + tl.where(o_t == t, theta, 0.0)
            a = keep * a
            c = keep * c + p
            b_G = keep * b_G + b_P
        b_a, b_c = tl.where(o_t == t, a, b_a), tl.where(o_t == t, c, b_c)
        tl.store(coefficient.G + (i_g * BT + t) * BT + o_t, b_G)
        if KEEP:
            b_p = tl.where(o_t == t, p, b_p)
            tl.store(coefficient.P + (i_g * BT + t) * BT + o_t, b_P)
        if t + 1 == end:
            tl.store(p_end, a)
            tl.store(p_end + 1, c)
            tl.store(p_end + 2, p)
            tl.store(p_end + 4 + o_t, b_G)
            tl.store(p_end + 4 + BT + o_t, b_P)
    tl.store(coefficient.a + i_g * BT + o_t, b_a)
    tl.store(coefficient.c + i_g * BT + o_t, b_c)
    if KEEP:
        tl.store(coefficient.p + i_g * BT + o_t, b_p)

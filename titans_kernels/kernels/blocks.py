"""Which tokens a block holds: the one place where kernels turn block numbers into positions.

Sequence n lies at `bounds[n, 0]` to `bounds[n, 1]`, an open chunk's tail ahead of its tokens. A
block holds whole chunks, or a chunk spans SPAN blocks and none crosses its end.
"""

import triton
import triton.language as tl


@triton.jit
def block_of(token, i_n, block, sizes):
    """First token, tokens, and how many of them the state that is handed on has learned from.

    Where blocks hold whole chunks, those of a chunk that is still open are left out.
    """
    block = block.to(tl.int64)
    start = tl.load(token.bounds + 2 * i_n).to(tl.int64)
    total = tl.load(token.bounds + 2 * i_n + 1).to(tl.int64) - start
    if sizes.SPAN == 1:
        position = block * sizes.TOKENS
        count = tl.minimum(total - position, sizes.TOKENS)
        end = tl.minimum(total // sizes.CHUNK * sizes.CHUNK - position, sizes.TOKENS)
    else:
        inside = block % sizes.SPAN * sizes.TOKENS
        position = block // sizes.SPAN * sizes.CHUNK + inside
        count = tl.minimum(total - position, tl.minimum(sizes.TOKENS, sizes.CHUNK - inside))
        end = count
    return start + position, tl.maximum(count, 0).to(tl.int32), tl.maximum(end, 0).to(tl.int32)


@triton.jit
def slot_of(i_n, i_block, blocks, i_h, sizes):
    """A block of the group and a head as one number, as scratch is laid out.

    The product is of 32 bits, in fewer instructions: scratch of 2^31 blocks fits no memory.
    """
    return ((i_n.to(tl.int32) * blocks + i_block) * sizes.H + i_h).to(tl.int64)


@triton.jit
def query_of(token, i_n, first):
    """Token `first + t` has query `i_q + t`, but the block's first `tail` tokens have none."""
    before = first - tl.load(token.bounds + 2 * i_n) - tl.load(token.tail + i_n)
    return tl.load(token.query + i_n) + before, tl.maximum(-before, 0).to(tl.int32)


@triton.jit
def start_row(o_t, sizes):
    """The row of coefficients that a token's chunk starts with; -1 is the block's start."""
    return o_t // sizes.CHUNK * sizes.CHUNK - 1 if sizes.SPAN == 1 else o_t * 0 - 1


@triton.jit
def query_row(o_t, sizes):
    """The row of coefficients that a query reads with."""
    return o_t if sizes.READ == "token" else start_row(o_t, sizes)


@triton.jit
def start_block(i_n, i_block, i_h, group, blocks, sizes):
    """Whose state a chunk starts with: slot and head, and the block, negative in earlier groups."""
    begun = i_block
    if sizes.SPAN > 1:
        begun = i_block - (group + i_block) % sizes.SPAN
    return slot_of(i_n, begun, blocks, i_h, sizes), begun


@triton.jit
def start_state(layer, start, i_s, i_l: tl.constexpr, sizes):
    """The state, rounded, that a chunk starts with; of one over blocks no share of momentum."""
    i_w, begun = start
    o = sizes.WIDTHS[i_l] * sizes.WIDTHS[i_l + 1]
    p_W, p_S = layer.W + i_w * o, layer.S + i_w * o
    if sizes.SPAN > 1:
        if begun < 0:
            p_W = layer.W_anchor + i_s * o
        p_S = p_W
    return p_W, p_S


@triton.jit
def history(coefficient, i_b, row, m_p, i_l: tl.constexpr, sizes):
    """-G of a row: how much of each earlier token's update a state still holds, [BT]."""
    o = ((i_b * sizes.L + sizes.GATES[i_l]) * sizes.BT + row) * sizes.BT
    return -tl.load(coefficient.G + o + tl.arange(0, sizes.BT), mask=m_p, other=0.0)


@triton.jit
def weights_of(coefficient, i_b, row, i_l: tl.constexpr, sizes):
    """a and c of a row."""
    o = (i_b * sizes.L + sizes.GATES[i_l]) * sizes.BT + row
    a = tl.load(coefficient.a + o, mask=row >= 0, other=1.0)
    return a, tl.load(coefficient.c + o, mask=row >= 0, other=0.0)

"""Which tokens a block holds: the one place where kernels turn block numbers into positions.

Sequence n lies at `bounds[n, 0]` to `bounds[n, 1]`, an open chunk's tail ahead of its tokens. A
block holds whole chunks, or a chunk spans SPAN blocks and none crosses its end.
"""

import triton
import triton.language as tl

from .records import Block, Chunk


@triton.jit
def block_at(i_n, i_h, i_s, i_block, blocks, group, first, count, sizes):
    """A block of the group that has tokens; i_s, the sequence and head, is the same in all."""
    begun = i_block
    if sizes.SPAN > 1:
        begun = i_block - (group + i_block) % sizes.SPAN
    return Block(
        n=i_n,
        h=i_h,
        state=i_s,
        slot=slot_of(i_n, i_block, blocks, i_h, sizes),
        start=slot_of(i_n, begun, blocks, i_h, sizes),
        begun=begun,
        first=first,
        count=count,
    )


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
def start_state(layer, block, i_l: tl.constexpr, sizes):
    """The state, rounded, that a chunk starts with; of one over blocks no share of momentum."""
    o = sizes.WIDTHS[i_l] * sizes.WIDTHS[i_l + 1]
    p_W, p_S = layer.W + block.start * o, layer.S + block.start * o
    if sizes.SPAN > 1:
        if block.begun < 0:
            p_W = layer.W_anchor + block.state * o
        p_S = p_W
    return p_W, p_S


@triton.jit
def chunk_at(block, r, sizes):
    """The r-th chunk of a block."""
    row = r * sizes.CHUNK - 1
    o_i, o_t = tl.arange(0, sizes.BT), tl.arange(0, sizes.BC)
    o_c = r * sizes.CHUNK + o_t
    return Chunk(
        row=row,
        tokens=o_c,
        mask=(o_t < sizes.CHUNK) & (o_c < block.count),
        earlier=(o_i < r * sizes.CHUNK) & (o_i < block.count),
        later=(o_i >= (r + 1) * sizes.CHUNK) & (o_i < block.count),
    )


@triton.jit
def history(coefficient, block, chunk, i_l: tl.constexpr, sizes):
    """-G: how much of each earlier token's update the state a chunk starts with holds, [BT]."""
    o = ((block.slot * sizes.L + sizes.GATES[i_l]) * sizes.BT + chunk.row) * sizes.BT
    return -tl.load(coefficient.G + o + tl.arange(0, sizes.BT), mask=chunk.earlier, other=0.0)


@triton.jit
def weights_of(coefficient, block, chunk, i_l: tl.constexpr, sizes):
    """a and c of the state that a chunk starts with."""
    o = (block.slot * sizes.L + sizes.GATES[i_l]) * sizes.BT + chunk.row
    a = tl.load(coefficient.a + o, mask=chunk.row >= 0, other=1.0)
    return a, tl.load(coefficient.c + o, mask=chunk.row >= 0, other=0.0)

"""Which tokens a block holds: the one place where kernels turn block numbers into positions.

Sequence n lies at `bounds[n, 0]` to `bounds[n, 1]`, an open chunk's tail ahead of its tokens. A
block holds whole chunks, or a chunk spans SPAN blocks and none crosses its end. Slots are the
blocks of one group, BLOCKS to a sequence.
"""

import triton
import triton.language as tl


@triton.jit
def block_of(
    p_bounds,
    slot,
    group,
    BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """First token, tokens, and how many of them the state that is handed on has learned from.

    Where blocks hold whole chunks, those of a chunk that is still open are left out.
    """
    n = slot // BLOCKS
    block = (group + slot % BLOCKS).to(tl.int64)
    start = tl.load(p_bounds + 2 * n).to(tl.int64)
    total = tl.load(p_bounds + 2 * n + 1).to(tl.int64) - start
    if SPAN == 1:
        position = block * TOKENS
        count = tl.minimum(total - position, TOKENS)
        end = tl.minimum(total // CHUNK * CHUNK - position, TOKENS)
    else:
        inside = block % SPAN * TOKENS
        position = block // SPAN * CHUNK + inside
        count = tl.minimum(total - position, tl.minimum(TOKENS, CHUNK - inside))
        end = count
    return start + position, tl.maximum(count, 0).to(tl.int32), tl.maximum(end, 0).to(tl.int32)

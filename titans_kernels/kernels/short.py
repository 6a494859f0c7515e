"""A call whose sequences are one block each, in one launch: a decoded token is such a block.

The phases of `coefficients`, `scan` and `retrieve` follow each other in one program, which reads
the state as it is kept, in float32, and rounds it at the products: nothing of it is copied, and it
is written only where a chunk ends. What the phases hand each other is the scratch of one block.

Grid: (sequences, heads).
"""

import triton
import triton.language as tl

from .blocks import block_at, block_of
from .coefficients import rows_of_gates
from .records import Update
from .retrieve import read_block
from .scan import block_of_keys
from .state import advance


@triton.jit(do_not_specialize=["chunks", "final"])
def short_kernel(
    token,  # Tokens
    query,  # Queries: o is written
    coefficient,  # Coefficients, out
    layers,  # Layers: W and W_exact are one, the state in float32; x, z and d are written
    query_layers,  # QueryLayers, out: the inputs of layers between two others
    p_norm,  # [H, 2, D]
    chunks,  # to a block
    rows,  # of coefficients, BT, known at run time only: few are unrolled, and then not counted
    hidden,  # the hidden width, and
    width,  # D
    final,  # whether the state is wanted, 0 or 1: then it moves, where a chunk ends
    sizes,  # Sizes
):
    H: tl.constexpr = sizes.H
    i_n, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_s = i_n * H + i_h
    first, count, learned = block_of(token, i_n, tl.full([], 0, tl.int64), sizes)
    if count > 0:
        block = block_at(i_n, i_h, i_s, 0, 1, 0, first, count, sizes)
        o_k = (first * H + i_h) * sizes.D
        p_k, p_v = token.k + o_k, token.v + o_k
        for i_l in tl.static_range(sizes.L):
            rows_of_gates(token, coefficient, block, learned, rows, i_l, sizes, False)
        tl.debug_barrier()
        p_n = p_norm + i_h * 2 * sizes.D
        block_of_keys(p_k, p_v, layers, coefficient, p_n, block, chunks, hidden, sizes, False)
        read_block(
            token, query, coefficient, layers, query_layers, p_norm, block, 0, hidden, sizes, False
        )
        tl.debug_barrier()
        moves = (learned > 0) & (final > 0)
        for i_l in tl.static_range(sizes.DEPTH):
            o_end = (block.slot * sizes.L + sizes.GATES[i_l]) * (4 + 2 * sizes.BT)
            update = Update(coefficient.end + o_end, moves, False, False)
            advance(p_k, layers[i_l], block, update, hidden, width, i_l, sizes, False)

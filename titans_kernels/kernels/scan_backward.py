"""Learning backwards: gradients of every key's errors and of the state, from block to block.

The scan in reverse. What enters a block is the gradient of the state it handed on (dW, dS), and
what its queries gave its inputs and errors. At the block's end `W' = a W + c S - X^T (G D)` and
`S' = p S - X^T (P D)`, so

    dX -= (G D) dW^T + (P D) dS^T          dD -= G (X dW) + P (X dS)

(`advance_backward`). Then chunk after chunk, the last first (`chunk_backward`), and at last the
gradient of the state that the block began with (`hand_back`).

Grid: (sequences, heads). Tiles as in `scan`: chunks transposed, hidden dimension in slices.
Loops over D go to `width`, which is D: one whose only turn is known when it is compiled is no loop,
and what it holds then fills registers all along.
"""

import triton
import triton.language as tl

from .blocks import block_at, block_of, query_of, start_row
from .chunk_backward import chunk_backward
from .records import BlockTokens, Ends, Readers
from .state_backward import advance_backward, hand_back


@triton.jit(do_not_specialize=["group", "blocks"])
def scan_backward_kernel(
    token,  # Tokens
    query,  # Queries
    coefficient,  # Coefficients
    layers,  # Layers: the anchor is that of a chunk begun in an earlier group, rounded
    query_layers,  # QueryLayers: z is its gradient
    # Grad: token.v, coefficient.end and e of layers are written; all else of layers, norm_keys and,
    # of coefficients that any layer but the first reads with, a, c and G are added to
    grad,
    p_norm,  # [H, 2, D]
    group,
    blocks,
    hidden,
    width,  # D
    sizes,  # Sizes
):
    H: tl.constexpr = sizes.H
    D: tl.constexpr = sizes.D
    L: tl.constexpr = sizes.L
    BT: tl.constexpr = sizes.BT
    ACC: tl.constexpr = coefficient.G.dtype.element_ty
    i_n, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_i = tl.arange(0, BT)
    p_norm += i_h * 2 * D
    ends = Ends(hidden, width)

    for back in tl.range(0, blocks, num_stages=1, disable_licm=True):
        i_block = blocks - 1 - back
        first, count, _ = block_of(token, i_n, group + i_block, sizes)
        if count > 0:
            i_s = i_n * H + i_h  # here: before the loop it would fill a register all along
            block = block_at(i_n, i_h, i_s, i_block, blocks, group, first, count, sizes)
            o_k = (first * H + i_h) * D
            p_k = token.k + o_k
            p_end = grad.coefficient.end + block.slot * L * (4 + 2 * BT)

            # Gates that layers share have one gradient.
            b_dG = tl.zeros([BT], ACC)
            b_dP = tl.zeros([BT], ACC)
            for i_l in tl.static_range(sizes.DEPTH):
                b_dG_l, b_dP_l = advance_backward(
                    p_k, layers[i_l], coefficient, grad.layers[i_l], block, ends, i_l, sizes
                )
                b_dG, b_dP = b_dG_l + b_dG, b_dP_l + b_dP
                if L > 1 or i_l + 1 == sizes.DEPTH:
                    o_end = sizes.GATES[i_l] * (4 + 2 * BT) + 4
                    tl.store(p_end + o_end + o_i, b_dG)
                    tl.store(p_end + o_end + BT + o_i, b_dP)
                    b_dG = tl.zeros([BT], ACC)
                    b_dP = tl.zeros([BT], ACC)
            tl.debug_barrier()

            tokens = BlockTokens(p_k, token.v + o_k, grad.token.v + o_k)
            chunks = tl.cdiv(count, sizes.CHUNK)  # with a token
            for rear in tl.range(0, chunks, num_stages=1, disable_licm=True):
                r = chunks - 1 - rear
                chunk_backward(tokens, layers, coefficient, grad, p_norm, block, r, ends, sizes)
                tl.debug_barrier()

            # What all that read the state in this block give it.
            i_q, tail = query_of(token, i_n, first)
            readers = Readers(
                q=query.q + (i_q * H + i_h) * D,
                k=p_k,
                mask=(o_i < count) & (o_i >= tail),
                row=start_row(o_i, sizes),
                begins=(group + i_block) % sizes.SPAN == 0,
            )
            da = tl.full([], 0.0, ACC)
            dc = tl.full([], 0.0, ACC)
            dp = tl.full([], 0.0, ACC)
            for i_l in tl.static_range(sizes.DEPTH):
                da_l, dc_l, dp_l = hand_back(
                    readers,
                    layers[i_l],
                    query_layers[i_l],
                    coefficient,
                    grad.layers[i_l],
                    block,
                    ends,
                    i_l,
                    sizes,
                )
                da, dc, dp = da_l + da, dc_l + dc, dp_l + dp
                if L > 1 or i_l + 1 == sizes.DEPTH:
                    o_end = sizes.GATES[i_l] * (4 + 2 * BT)
                    tl.store(p_end + o_end, da)
                    tl.store(p_end + o_end + 1, dc)
                    tl.store(p_end + o_end + 2, dp)
                    da = tl.full([], 0.0, ACC)
                    dc = tl.full([], 0.0, ACC)
                    dp = tl.full([], 0.0, ACC)
            tl.debug_barrier()

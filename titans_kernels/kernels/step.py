"""One token of a layer around its memory: what leads to `short`, and what follows it.

`prepare` makes q, k, v and gates of a token's projections and puts the token behind those of its
open chunk, in place; `finish` makes the gated output of what the memory read and, where the chunk
is whole, empties it:

    q, k, v = unit(silu(conv(x)))      theta, alpha, eta = rate sigmoid, sigmoid, sigmoid
    y = unit(o) sqrt(D) w silu(g)

Grid of both: (sequences, heads).
"""

import triton
import triton.language as tl

from .network import EPS


@triton.jit
def prepare_kernel(
    projected,  # Projected
    weight,  # StepWeights
    state,  # StepState, in and out
    token,  # Tokens: bounds, tail and query are written
    p_q,  # out [N, H, D]
    p_norm,  # out [H, 2, D]
    rate,  # of theta
    sizes,  # StepSizes
):
    H: tl.constexpr = sizes.H
    D: tl.constexpr = sizes.D
    L: tl.constexpr = sizes.L
    i_n, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(state.length + i_n)
    row = i_n * sizes.CHUNK + length
    o_d = tl.arange(0, sizes.BD)
    m_d, i_v = o_d < D, row * H + i_h
    ACC: tl.constexpr = p_norm.dtype.element_ty
    outs = (p_q + (i_n * H + i_h) * D, state.tokens[0] + i_v * D, state.tokens[1] + i_v * D)
    for i in tl.static_range(3):
        b_x = convolved(projected.streams[i], weight, state, i_n, i_h, i, ACC, sizes)
        b_x = unit(b_x / (1.0 + tl.exp(-b_x)))
        tl.store(outs[i] + o_d, b_x.to(p_q.dtype.element_ty), mask=m_d)

    for i_l in tl.static_range(L):
        o_g, o_b = (i_n * H + i_h) * L + i_l, i_h * L + i_l
        o_s = i_v * L + i_l
        for i in tl.static_range(3):
            x = tl.load(projected.gates[i] + o_g).to(ACC) + tl.load(weight.biases[i] + o_b).to(ACC)
            x = 1.0 / (1.0 + tl.exp(-x))
            if i == 0:
                x = rate * x
            p_gate = state.tokens[2 + i] + o_s
            tl.store(p_gate, x.to(p_gate.dtype.element_ty))

    if i_h == 0:
        first = i_n * sizes.CHUNK
        tl.store(token.bounds + 2 * i_n, first)
        tl.store(token.bounds + 2 * i_n + 1, first + length + 1)
        tl.store(token.tail + i_n, length.to(tl.int64))
        tl.store(token.query + i_n, i_n)
    if i_n == 0:
        for i in tl.static_range(sizes.NORMS):
            b_w = tl.load(weight.norm[i] + i_h * D + o_d, mask=m_d, other=0.0).to(ACC)
            tl.store(p_norm + (2 * i_h + i) * D + o_d, b_w, mask=m_d)


@triton.jit
def convolved(p_x, weight, state, i_n, i_h, i: tl.constexpr, ACC: tl.constexpr, sizes):
    """A head's channels [BD] of one stream, convolved with its last inputs, which move on."""
    D: tl.constexpr = sizes.D
    WIDTH: tl.constexpr = sizes.H * D
    TAPS: tl.constexpr = sizes.TAPS
    o_d = tl.arange(0, sizes.BD)
    m_d, o_c = o_d < D, i_h * D + o_d
    b_new = tl.load(p_x + i_n * WIDTH + o_c, mask=m_d, other=0.0)
    b_y = b_new.to(ACC)
    if TAPS > 0:
        p_w = weight.filters[i] + o_c * TAPS
        b_y *= tl.load(p_w + TAPS - 1, mask=m_d, other=0.0).to(ACC)
    if TAPS > 1:
        o_j = tl.arange(0, sizes.BJ)
        m_j = (o_j < TAPS - 1)[:, None] & m_d[None, :]
        p_old = state.history[i] + i_n * (TAPS - 1) * WIDTH + o_j[:, None] * WIDTH + o_c[None, :]
        b_old = tl.load(p_old, mask=m_j, other=0.0)  # [BJ, BD]
        b_w = tl.load(p_w[None, :] + o_j[:, None], mask=m_j, other=0.0)
        b_y += tl.sum(b_w.to(ACC) * b_old.to(ACC), 0)
        tl.debug_barrier()
        tl.store(p_old - WIDTH, b_old, mask=m_j & (o_j > 0)[:, None])
        p_last = state.history[i] + (i_n * (TAPS - 1) + TAPS - 2) * WIDTH + o_c
        tl.store(p_last, b_new, mask=m_d)
    return b_y


@triton.jit
def unit(b_x):
    return b_x / tl.sqrt(tl.sum(b_x * b_x, 0) + EPS)


@triton.jit
def finish_kernel(
    projected,  # Projected
    weight,  # StepWeights
    state,  # StepState
    p_tail,  # [N], tokens of the open chunk before this one
    p_o,  # [N, H, D]
    p_y,  # out [N, H D]
    scale,  # sqrt(D)
    sizes,  # StepSizes
):
    H: tl.constexpr = sizes.H
    D: tl.constexpr = sizes.D
    L: tl.constexpr = sizes.L
    CHUNK: tl.constexpr = sizes.CHUNK
    i_n, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_d = tl.arange(0, sizes.BD)
    m_d, o_x = o_d < D, (i_n * H + i_h) * D + o_d
    ACC: tl.constexpr = tl.float64 if p_o.dtype.element_ty == tl.float64 else tl.float32
    b_o = tl.load(p_o + o_x, mask=m_d, other=0.0).to(ACC)
    b_w = tl.load(weight.out_norm + i_h * D + o_d, mask=m_d, other=0.0).to(ACC)
    b_g = tl.load(projected.gate + o_x, mask=m_d, other=0.0).to(ACC)
    b_y = unit(b_o) * (scale * b_w) * (b_g / (1.0 + tl.exp(-b_g)))
    tl.store(p_y + o_x, b_y.to(p_y.dtype.element_ty), mask=m_d)

    read = tl.load(p_tail + i_n) + 1
    if read == CHUNK:
        b_zero = tl.zeros([sizes.BD], ACC).to(p_o.dtype.element_ty)
        for t in tl.range(0, CHUNK):
            i_v = (i_n * CHUNK + t) * H + i_h
            for i in tl.static_range(2):
                tl.store(state.tokens[i] + i_v * D + o_d, b_zero, mask=m_d)
            for i in tl.static_range(2, 5):
                for i_l in tl.static_range(L):
                    tl.store(state.tokens[i] + i_v * L + i_l, 0.0)
    if i_h == 0:
        tl.store(state.length + i_n, (read % CHUNK).to(tl.int32))

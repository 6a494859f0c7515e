"""What travels together: records that launchers build once and kernels take as they are.

A tensor field is a pointer inside a kernel. Shapes are those of a group of blocks: slot
`n * blocks + i` is block i of sequence n. BT is a block's tile of tokens, d_in and d_out are a
layer's widths: D, then the hidden width, then D again. Fields that a pass does not touch hold any
other tensor.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl
from torch import Tensor


class Tokens(NamedTuple):
    """N sequences in order, the tail of an open chunk ahead of its sequence's tokens."""

    k: Tensor  # [M, H, D]
    v: Tensor
    theta: Tensor  # [M, H, L]
    alpha: Tensor
    eta: Tensor
    bounds: Tensor  # [N, 2] int64, first token and end
    tail: Tensor  # [N] int64, tokens without a query
    query: Tensor  # [N] int64, the first query


class Coefficients(NamedTuple):
    """The state right after each token of a block, from that of the block's start."""

    a: Tensor  # [slots, H, L, BT]
    c: Tensor
    G: Tensor  # [slots, H, L, BT, BT]
    end: Tensor  # [slots, H, L, 4 + 2 BT]: a, c, p, unused, G, P of the state handed on
    p: Tensor  # [slots, H, L, BT], for the backward pass
    P: Tensor  # [slots, H, L, BT, BT]


class Layer(NamedTuple):
    """One layer of the memory, and what keys make of it."""

    W: Tensor  # [slots, H, d_in, d_out], the state at every block's start, rounded
    S: Tensor
    W_exact: Tensor  # [N, H, d_in, d_out], in and out; for the backward pass [slots, ...]: that of
    S_exact: Tensor  # every block's start. The running momentum, [N, H, d_in, d_out], in and out
    W_anchor: Tensor  # [N, H, d_in, d_out], in and out: what an open chunk started with, where
    S_anchor: Tensor  # chunks span blocks. The backward pass takes it rounded
    x: Tensor  # [slots, H, BT, d_in], inputs; the first layer's are the keys themselves
    z: Tensor  # [N, H, BT, d_out], the first layer's products; for the backward pass all layers'
    d: Tensor  # [slots, H, BT, d_out], errors of the products
    e: Tensor  # [slots, H, BT, d_in], errors of the inputs, for the backward pass


class Queries(NamedTuple):
    q: Tensor  # [Mq, H, D]
    o: Tensor  # [Mq, H, D]; in the backward pass its gradient
    parts: Tensor  # [slots, H, 2, BT, D], the last products' shares of W and S, before a and c


class QueryLayer(NamedTuple):
    """What queries make of a layer, where it is kept."""

    h: Tensor  # [slots, H, BT, d_in], inputs
    z: Tensor  # [slots, H, BT, d_out], products, then their gradient


class LayerGrad(NamedTuple):
    W: Tensor  # [N, H, d_in, d_out], in and out, gradient of the running state
    S: Tensor
    W_anchor: Tensor  # where chunks span blocks, of what the chunk started with
    S_anchor: Tensor
    x: Tensor  # [slots, H, BT, d_in]
    d: Tensor  # [slots, H, BT, d_out], of the errors, then of the keys' products
    e: Tensor  # [slots, H, BT, d_in], rounded


class CoefficientGrad(NamedTuple):
    a: Tensor  # [slots, H, L, BT]
    c: Tensor
    G: Tensor  # [slots, H, L, BT, BT]
    end: Tensor  # [slots, H, L, 4 + 2 BT]
    a_key: Tensor  # [slots, H, BT], of what keys read the first layer with; [slots, H, L, BT] where
    c_key: Tensor  # queries read as they do, any layer
    G_key: Tensor  # [slots, H, BT, BT] or [slots, H, L, BT, BT]


class TokenGrad(NamedTuple):
    """Gradients of queries and tokens, in their dtypes."""

    q: Tensor
    k: Tensor
    v: Tensor
    theta: Tensor
    alpha: Tensor
    eta: Tensor


class Grad(NamedTuple):
    token: TokenGrad
    coefficient: CoefficientGrad
    layers: tuple[LayerGrad, ...]
    norm: Tensor  # [slots, H, 2, D], of queries
    norm_keys: Tensor  # [N, H, 2, D], in and out, of keys


class BlockSizes(NamedTuple):
    """What the passes over gates are compiled for."""

    H: tl.constexpr
    L: tl.constexpr  # gates to a head: 1, or one for each layer
    CHUNK: tl.constexpr
    TOKENS: tl.constexpr  # of a block
    SPAN: tl.constexpr  # blocks to a chunk, 1 where a block holds whole chunks
    BT: tl.constexpr


class Sizes(NamedTuple):
    """What every other pass is compiled for. The first six are those of `BlockSizes`."""

    H: tl.constexpr
    L: tl.constexpr
    CHUNK: tl.constexpr
    TOKENS: tl.constexpr
    SPAN: tl.constexpr
    BT: tl.constexpr
    BC: tl.constexpr  # tile of a chunk's tokens
    BQ: tl.constexpr  # of queries
    D: tl.constexpr
    HIDDEN: tl.constexpr
    BD: tl.constexpr  # tile that holds D
    BR: tl.constexpr  # of D at a time, backwards
    BN: tl.constexpr  # of the columns of a state's gradient, where it is handed back
    BH: tl.constexpr  # of the hidden width at a time
    DEPTH: tl.constexpr
    ACTIVATION: tl.constexpr
    HAS_NORM: tl.constexpr
    RESIDUAL: tl.constexpr
    READ: tl.constexpr  # "token": queries read the state right after their token; "chunk": as keys
    EARLIER: tl.constexpr  # a block holds chunks before another; else its state is the chunk's
    HISTORY: tl.constexpr  # queries read tokens of their own block; else W alone
    PRECISION: tl.constexpr  # of products of float32
    WIDTHS: tuple[tl.constexpr, ...]  # of layers: into the first, out of each
    GATES: tuple[tl.constexpr, ...]  # of layers: theirs among L


class StepSizes(NamedTuple):
    """What the kernels around a decoded token are compiled for."""

    H: tl.constexpr
    L: tl.constexpr
    CHUNK: tl.constexpr
    D: tl.constexpr
    BD: tl.constexpr
    TAPS: tl.constexpr  # of the convolutions, 0 without
    BJ: tl.constexpr  # tile that holds a convolution's last inputs
    NORMS: tl.constexpr  # 2, weight and bias, or 0


# ---------------------------- what functions of a kernel hand each other: values of a program


class Block(NamedTuple):
    """One block of a sequence and head, as `block_at` finds it inside a kernel."""

    n: Any  # the sequence
    h: Any  # the head
    state: Any  # both as one number: of what a sequence has one of
    slot: Any  # the block and the head: of scratch
    start: Any  # of the block whose state its chunk starts with
    begun: Any  # that block in the group, negative in earlier groups
    first: Any  # its first token
    count: Any  # its tokens


class Chunk(NamedTuple):
    """A chunk of a block, as `chunk_at` finds it: its tokens are rows of the block."""

    row: Any  # of the coefficients that it starts with; -1 is the block's start
    tokens: Any  # [BC]
    mask: Any
    earlier: Any  # [BT], mask of the tokens of earlier chunks
    later: Any


class Read(NamedTuple):
    """What a layer is read with."""

    q: Any  # [BD, BQ], the first layer's input
    a: Any  # [BQ]
    c: Any
    x: Any  # [BT, BQ], keys' inputs by queries', weighted
    W: Any  # [BD, BQ], what the last layer makes of the queries
    S: Any


class Update(NamedTuple):
    """What `advance` makes of a layer's state at the end of a block."""

    end: Any  # coefficients of the state handed on, [4 + 2 BT]
    moves: Any  # bool: there is anything to do
    more: Any  # there is a next block in the group, which reads it
    whole: Any  # the block makes its chunk whole


class Ends(NamedTuple):
    """Where loops end, known at run time only."""

    hidden: Any
    width: Any  # D


class BlockTokens(NamedTuple):
    """A block's tokens of one head, [BT, D]."""

    k: Any
    v: Any
    dv: Any  # the gradient of v


class ErrorsBackward(NamedTuple):
    """What the gradient of a chunk's errors leaves for that of its products."""

    G: Any  # [BT, BC], by which it reads earlier tokens, and later ones read it
    xx: Any  # inputs by inputs
    dd: Any  # errors by errors, weighted
    dG: Any  # [BT, BC], not yet summed over the chunk
    da: Any  # [BC]
    dc: Any


class Readers(NamedTuple):
    """What read the block's state: its queries and keys, [BT, D], and with which row."""

    q: Any
    k: Any
    mask: Any  # of queries
    row: Any  # [BT], of coefficients that keys read with
    begins: Any  # whether the block is its chunk's first


# ---------------------------------------------------------------------------------- for launchers


def fixed(**values: object) -> dict[str, Any]:
    """Values as Triton wants those of a record that are compiled in."""
    return {name: _constant(value) for name, value in values.items()}


def _constant(value: object) -> Any:
    return tuple(map(tl.constexpr, value)) if isinstance(value, tuple) else tl.constexpr(value)

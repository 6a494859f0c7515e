"""Launchers: allocate, take a tile, launch. Tensors are contiguous and of the shapes named here."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .coefficients import coefficients_kernel
from .recall import recall_kernel
from .retrieve import retrieve_kernel
from .scan import scan_kernel
from .tiles import Blocks, Tile


class Tokens(NamedTuple):
    """N sequences in order, a tail ahead of its sequence's tokens."""

    k: Tensor  # [M, H, D]
    v: Tensor
    theta: Tensor  # [M, H, L]
    alpha: Tensor
    eta: Tensor
    bounds: Tensor  # [N, 2] int64, first token and end
    tail: Tensor  # [N] int64
    ask: Tensor  # [N] int64, first query


class Problem(NamedTuple):
    """What every pass is compiled for."""

    chunk_size: int
    blocks: Blocks
    group: int  # blocks of a sequence whose scratch is held at a time
    activation: str
    residual: bool
    norm: Tensor | None  # [H, 2, D]
    tile: Tile

    def sizes(self, tokens: Tokens, hidden: int) -> dict[str, int]:
        _, H, D = tokens.k.shape
        return dict(
            BLOCKS=self.group,
            H=H,
            D=D,
            HIDDEN=hidden,
            L=tokens.theta.shape[2],
            CHUNK=self.chunk_size,
            TOKENS=self.blocks.tokens,
            SPAN=self.blocks.span,
            BT=self.tile.block,
            BD=max(16, triton.next_power_of_2(D)),
            BH=self.tile.slice,
        )

    def options(self, depth: int) -> dict[str, object]:
        return network_options(depth, self.activation, self.residual, self.norm)


def network_options(
    depth: int, activation: str, residual: bool, norm: Tensor | None
) -> dict[str, object]:
    return dict(
        DEPTH=depth,
        ACTIVATION=activation,
        HAS_NORM=norm is not None,
        RESIDUAL=residual,
        PRECISION="tf32" if _tf32() else "ieee",
    )


def _tf32() -> bool:
    """Whether torch multiplies float32 matrices in TF32, by whichever of its settings was used.

    Reading `allow_tf32` raises once `fp32_precision` is set; `fp32_precision` follows both.
    """
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # torch >= 2.9
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32


class Scratch(NamedTuple):
    """What passes hand each other, of one group of blocks."""

    a: Tensor  # [slots, H, L, BT]
    c: Tensor
    G: Tensor  # [slots, H, L, BT, BT]
    end: Tensor  # [slots, H, L, 4 + 2 BT]
    z: Tensor  # [N, H, BT, hidden], [slots, ...] for the backward pass
    x: Tensor  # [slots, H, BT, hidden]
    d: tuple[Tensor, ...]  # per layer [slots, H, BT, d_out]
    weights: tuple[Tensor, ...]  # per layer [slots, H, d_in, d_out]
    momentum: tuple[Tensor, ...]
    trace: Trace | None


class Trace(NamedTuple):
    """What the backward pass wants of a group beside."""

    p: Tensor  # [slots, H, L, BT]
    P: Tensor  # [slots, H, L, BT, BT]
    weights: tuple[Tensor, ...]  # per layer [slots, H, d_in, d_out], not rounded
    momentum: tuple[Tensor, ...]
    y: Tensor  # [slots, H, BT, D], keys' last products
    e: Tensor  # [slots, H, BT, hidden], keys' errors behind the activation
    query_z: Tensor  # [slots, H, BT, hidden], queries' first products
    query_h: Tensor  # [slots, H, BT, hidden], inputs of the last layer
    query_y: Tensor  # [slots, H, BT, D], last products
    query_parts: Tensor  # [slots, H, 2, BT, D], what of them is W's and S's


def allocate(tokens: Tokens, state: list[Tensor], problem: Problem, keep: bool = False) -> Scratch:
    """Scratch for `problem.group` blocks of every sequence; `state` are weights, [N, H, ...]."""
    N, (H, D) = len(tokens.bounds), tokens.k.shape[1:]
    L, BT, slots = tokens.theta.shape[2], problem.tile.block, N * problem.group
    hidden, acc = state[0].shape[-1], state[0].dtype
    inner = hidden if len(state) > 1 else 0
    new = tokens.k.new_empty
    trace = None
    if keep:
        trace = Trace(
            new(slots, H, L, BT, dtype=acc),
            new(slots, H, L, BT, BT, dtype=acc),
            tuple(new(slots, *W.shape[1:], dtype=acc) for W in state),
            tuple(new(slots, *W.shape[1:], dtype=acc) for W in state),
            new(slots, H, BT, D, dtype=acc),
            new(slots, H, BT, inner, dtype=acc),
            new(slots, H, BT, inner, dtype=acc),
            new(slots, H, BT, inner),
            new(slots, H, BT, D, dtype=acc),
            new(slots, H, 2, BT, D, dtype=acc),
        )
    return Scratch(
        new(slots, H, L, BT, dtype=acc),
        new(slots, H, L, BT, dtype=acc),
        new(slots, H, L, BT, BT, dtype=acc),
        new(slots, H, L, 4 + 2 * BT, dtype=acc),
        new(slots if keep else N, H, BT, hidden, dtype=acc),
        new(slots, H, BT, inner),
        tuple(new(slots, H, BT, W.shape[-1], dtype=acc) for W in state),
        tuple(new(slots, *W.shape[1:]) for W in state),
        tuple(new(slots, *W.shape[1:]) for W in state),
        trace,
    )


def coefficients(tokens: Tokens, scratch: Scratch, first_block: int, problem: Problem) -> None:
    slots, H, L, BT = scratch.a.shape
    coefficients_kernel[(slots, H, L)](
        p_theta=tokens.theta,
        p_alpha=tokens.alpha,
        p_eta=tokens.eta,
        p_a=scratch.a,
        p_c=scratch.c,
        p_G=scratch.G,
        p_end=scratch.end,
        p_p=scratch.trace.p if scratch.trace else scratch.a,
        p_P=scratch.trace.P if scratch.trace else scratch.a,
        p_bounds=tokens.bounds,
        group=first_block,
        BLOCKS=problem.group,
        H=H,
        L=L,
        CHUNK=problem.chunk_size,
        TOKENS=problem.blocks.tokens,
        SPAN=problem.blocks.span,
        BT=BT,
        KEEP=scratch.trace is not None,
        **problem.tile.coefficients.options(),
    )


def scan(
    tokens: Tokens,
    weights: list[Tensor],
    momentum: list[Tensor],
    anchor: tuple[list[Tensor], list[Tensor]],
    scratch: Scratch,
    first_block: int,
    problem: Problem,
) -> None:
    """Walk over one group; weights, momentum and anchor go on in place, unless there is a trace."""
    depth, last = len(weights), len(weights) - 1
    N, H = weights[0].shape[:2]
    chunk = problem.chunk_size if problem.blocks.chunks > 1 else problem.tile.block
    starts = [(*scratch.weights, *scratch.momentum)]  # what the group's first blocks read
    if scratch.trace:
        starts.append((*scratch.trace.weights, *scratch.trace.momentum))
    for states in starts:
        for x, state in zip(states, (*weights, *momentum), strict=True):
            x.unflatten(0, (N, -1))[:, 0].copy_(state)
    if scratch.trace:
        weights, momentum = list(scratch.trace.weights), list(scratch.trace.momentum)
    scan_kernel[(N, H)](
        p_k=tokens.k,
        p_v=tokens.v,
        p_a=scratch.a,
        p_c=scratch.c,
        p_G=scratch.G,
        p_end=scratch.end,
        p_norm=scratch.a if problem.norm is None else problem.norm,
        p_W1=weights[0],
        p_S1=momentum[0],
        p_W2=weights[last],
        p_S2=momentum[last],
        p_W1_anchor=anchor[0][0],
        p_S1_anchor=anchor[1][0],
        p_W2_anchor=anchor[0][last],
        p_S2_anchor=anchor[1][last],
        p_z=scratch.z,
        p_x=scratch.x,
        p_d1=scratch.d[0],
        p_d2=scratch.d[last],
        p_W1_out=scratch.weights[0],
        p_S1_out=scratch.momentum[0],
        p_W2_out=scratch.weights[last],
        p_S2_out=scratch.momentum[last],
        p_y=scratch.trace.y if scratch.trace else scratch.z,
        p_e=scratch.trace.e if scratch.trace else scratch.z,
        p_bounds=tokens.bounds,
        group=first_block,
        blocks=problem.group,
        chunks=problem.blocks.chunks,
        hidden=weights[0].shape[-1],
        width=tokens.k.shape[-1],
        BC=max(16, triton.next_power_of_2(chunk)),
        KEEP=scratch.trace is not None,
        **problem.sizes(tokens, weights[0].shape[-1]),
        **problem.options(depth),
        **problem.tile.scan.options(),
    )


def retrieve(
    q: Tensor, o: Tensor, tokens: Tokens, scratch: Scratch, first_block: int, problem: Problem
) -> None:
    """Answers of one group's tokens into o, [Mq, H, D]; or what the backward pass wants of them."""
    depth, last = len(scratch.d), len(scratch.d) - 1
    slots, H = scratch.a.shape[:2]
    retrieve_kernel[(slots, H, problem.tile.block // problem.tile.queries)](
        p_q=q,
        p_k=tokens.k,
        p_x=scratch.x,
        p_d1=scratch.d[0],
        p_d2=scratch.d[last],
        p_W1=scratch.weights[0],
        p_S1=scratch.momentum[0],
        p_W2=scratch.weights[last],
        p_S2=scratch.momentum[last],
        p_a=scratch.a,
        p_c=scratch.c,
        p_G=scratch.G,
        p_norm=scratch.a if problem.norm is None else problem.norm,
        p_o=o,
        p_z=scratch.trace.query_z if scratch.trace else scratch.z,
        p_h=scratch.trace.query_h if scratch.trace else scratch.x,
        p_y=scratch.trace.query_y if scratch.trace else scratch.z,
        p_parts=scratch.trace.query_parts if scratch.trace else scratch.z,
        p_bounds=tokens.bounds,
        p_tail=tokens.tail,
        p_ask=tokens.ask,
        group=first_block,
        hidden=scratch.weights[0].shape[-1],
        BQ=problem.tile.queries,
        KEEP=scratch.trace is not None,
        **problem.sizes(tokens, scratch.weights[0].shape[-1]),
        **problem.options(depth),
        **problem.tile.retrieve.options(),
    )


def recall(
    q: Tensor,
    weights: tuple[Tensor, ...],
    norm: Tensor | None,
    cu: Tensor,
    longest: int,
    activation: str,
    residual: bool,
    tile: Tile,
) -> Tensor:
    """f(q) [M, H, D] at weights [N, H, d_in, d_out] of q's dtype, sequence n from cu[n] on."""
    (_, H, D), N = q.shape, len(cu) - 1
    o = torch.empty_like(q)
    blocks = triton.cdiv(longest, tile.block)
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    if N * blocks:
        recall_kernel[(N * blocks, H)](
            p_q=q,
            p_W1=weights[0],
            p_W2=weights[-1],
            p_norm=q.new_empty(0, dtype=acc) if norm is None else norm,
            p_o=o,
            p_cu=cu,
            blocks=blocks,
            hidden=weights[0].shape[-1],
            H=H,
            D=D,
            HIDDEN=weights[0].shape[-1],
            BT=tile.block,
            BD=max(16, triton.next_power_of_2(D)),
            BH=tile.slice,
            **network_options(len(weights), activation, residual, norm),
            **tile.recall.options(),
        )
    return o

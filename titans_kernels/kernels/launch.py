"""Launchers: allocate, take a tile, launch. Tensors are contiguous and of the shapes named here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .coefficients import coefficients_kernel
from .recall import recall_kernel
from .records import BlockSizes, Coefficients, Layer, Queries, QueryLayer, Sizes, Tokens, fixed
from .retrieve import retrieve_kernel
from .scan import scan_kernel
from .short import short_kernel
from .tiles import Blocks, Tile


class Problem(NamedTuple):
    """What every pass is compiled for."""

    chunk_size: int
    blocks: Blocks
    activation: str
    residual: bool
    read: str  # of queries: "token" or "chunk"
    norm: Tensor | None  # [H, 2, D]
    tile: Tile

    def block_sizes(self, token: Tokens) -> BlockSizes:
        return BlockSizes(**self._rows(token))

    def sizes(self, token: Tokens, hidden: int, depth: int) -> Sizes:
        chunk = self.chunk_size if self.blocks.chunks > 1 else self.tile.block
        network = network_sizes(
            token.k, hidden, depth, self.tile, self.activation, self.residual, self.norm
        )
        BC = max(16, triton.next_power_of_2(chunk))
        gates = tuple(i_l if token.theta.shape[2] > 1 else 0 for i_l in range(depth))
        rest = fixed(BC=BC, BQ=self.tile.queries, GATES=gates)
        earlier = self.blocks.chunks > 1
        rest |= fixed(READ=self.read, EARLIER=earlier, HISTORY=self.read == "token" or earlier)
        return Sizes(**self._rows(token), **rest, **network)

    def _rows(self, token: Tokens) -> dict[str, Any]:
        return fixed(
            H=token.k.shape[1],
            L=token.theta.shape[2],
            CHUNK=self.chunk_size,
            TOKENS=self.blocks.tokens,
            SPAN=self.blocks.span,
            BT=self.tile.block,
        )


def network_sizes(
    x: Tensor,
    hidden: int,
    depth: int,
    tile: Tile,
    activation: str,
    residual: bool,
    norm: Tensor | None,
) -> dict[str, Any]:
    BD = max(16, triton.next_power_of_2(x.shape[-1]))
    return fixed(
        D=x.shape[-1],
        HIDDEN=hidden,
        BD=BD,
        BR=min(BD, tile.rows),
        BN=min(tile.columns, tile.slice),
        BH=tile.slice,
        DEPTH=depth,
        ACTIVATION=activation,
        HAS_NORM=norm is not None,
        RESIDUAL=residual,
        PRECISION=precision(),
        WIDTHS=(x.shape[-1], *[hidden] * (depth - 1), x.shape[-1]),
    )


def precision() -> str:
    """Of products of float32: "tf32" where torch uses it too, by whichever of its settings.

    Reading `allow_tf32` raises once `fp32_precision` is set; `fp32_precision` follows both.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


class Scratch(NamedTuple):
    """What passes hand each other, of one group of blocks."""

    coefficient: Coefficients
    layers: tuple[Layer, ...]
    query_layers: tuple[QueryLayer, ...]
    parts: Tensor  # [slots, H, 2, BT, D], of queries
    blocks: int  # of every sequence
    keep: bool  # for the backward pass

    @property
    def hidden(self) -> int:
        return self.layers[0].d.shape[-1]

    def at(self, running: Sequence[Tensor], anchor: Sequence[Tensor]) -> Scratch:
        """The same with the states that the walk goes on from, in place: weights, then momenta.

        Where W is kept for every block, its first block's is a copy.
        """
        depth, layers = len(self.layers), []
        for i_l, layer in enumerate(self.layers):
            W, S = running[i_l], running[depth + i_l]
            tables = [(layer.W, W), (layer.S, S)]
            if self.keep:
                tables.append((layer.W_exact, W))
            else:
                layer = layer._replace(W_exact=W)
            for table, state in tables:  # what the group's first blocks read
                table.unflatten(0, (-1, self.blocks))[:, 0].copy_(state)
            anchors = dict(W_anchor=anchor[i_l], S_anchor=anchor[depth + i_l])
            layers.append(layer._replace(S_exact=S, **anchors))
        return self._replace(layers=tuple(layers))

    def on(self, running: Sequence[Tensor]) -> Scratch:
        """The same with states that all passes read and write themselves, in the dtype of sums."""
        depth, layers = len(self.layers), []
        for i_l, layer in enumerate(self.layers):
            W, S = running[i_l], running[depth + i_l]
            layers.append(layer._replace(W=W, S=S, W_exact=W, S_exact=S, W_anchor=W, S_anchor=S))
        return self._replace(layers=tuple(layers))

    def read_from(self, anchor: Sequence[Tensor]) -> Scratch:
        """For readers: what a chunk begun in an earlier group began with, rounded."""
        depth = len(self.layers)
        layers = (
            layer._replace(W_anchor=anchor[i_l], S_anchor=anchor[depth + i_l])
            for i_l, layer in enumerate(self.layers)
        )
        return self._replace(layers=tuple(layers))


def allocate(
    token: Tokens,
    weights: Sequence[Tensor],
    problem: Problem,
    blocks: int,
    keep: bool = False,
    states: bool = True,
) -> Scratch:
    """Scratch for so many blocks of every sequence; weights are [N, H, d_in, d_out].

    Without `states` there are none, and the scratch is `on` those that are given.
    """
    N, (H, D) = len(token.bounds), token.k.shape[1:]
    L, BT, slots, last = token.theta.shape[2], problem.tile.block, N * blocks, len(weights) - 1
    acc, rounded = weights[0].dtype, token.k.dtype

    def new(*shape: int, dtype: torch.dtype = acc, wanted: bool = True) -> Tensor:
        return token.k.new_empty(*(shape if wanted else (0,)), dtype=dtype)

    coefficient = Coefficients(
        a=new(slots, H, L, BT),
        c=new(slots, H, L, BT),
        G=new(slots, H, L, BT, BT),
        end=new(slots, H, L, 4 + 2 * BT),
        p=new(slots, H, L, BT, wanted=keep),
        P=new(slots, H, L, BT, BT, wanted=keep),
    )
    layers, query_layers = [], []
    for i_l, W in enumerate(weights):
        d_in, d_out = W.shape[-2:]
        between = 0 < i_l < last
        layers.append(
            Layer(
                W=new(slots, *W.shape[1:], dtype=rounded, wanted=states),
                S=new(slots, *W.shape[1:], dtype=rounded, wanted=states),
                W_exact=new(slots, *W.shape[1:], wanted=keep),
                S_exact=new(0),
                W_anchor=new(0),
                S_anchor=new(0),
                x=new(slots, H, BT, d_in, dtype=rounded, wanted=i_l > 0),
                z=new(slots if keep else N, H, BT, d_out, wanted=keep or i_l == 0),
                d=new(slots, H, BT, d_out),
                e=new(slots, H, BT, d_in, wanted=keep and i_l > 0),
            )
        )
        query_layers.append(
            QueryLayer(
                h=new(slots, H, BT, d_in, dtype=rounded, wanted=between or (keep and i_l > 0)),
                z=new(slots, H, BT, d_out, wanted=keep),
            )
        )
    parts = new(slots, H, 2, BT, D, wanted=keep)
    return Scratch(coefficient, tuple(layers), tuple(query_layers), parts, blocks, keep)


def coefficients(token: Tokens, scratch: Scratch, first_block: int, problem: Problem) -> None:
    H, L = token.theta.shape[1:]
    coefficients_kernel[(len(token.bounds), scratch.blocks, H * L)](
        token=token,
        coefficient=scratch.coefficient,
        group=first_block,
        sizes=problem.block_sizes(token),
        KEEP=scratch.keep,
        **problem.tile.coefficients.options(),
    )


def memory_of(token: Tokens, scratch: Scratch, problem: Problem) -> dict[str, Any]:
    """What every pass over layers takes."""
    return dict(
        token=token,
        coefficient=scratch.coefficient,
        layers=scratch.layers,
        hidden=scratch.hidden,
        sizes=problem.sizes(token, scratch.hidden, len(scratch.layers)),
    )


def scan(token: Tokens, scratch: Scratch, first_block: int, problem: Problem) -> None:
    """Walk over one group, from the states that `scratch.at` was given: they go on in place."""
    scan_kernel[(len(token.bounds), token.k.shape[1])](
        **memory_of(token, scratch, problem),
        p_norm=norm_or(problem.norm, scratch.coefficient.a),
        group=first_block,
        blocks=scratch.blocks,
        chunks=problem.blocks.chunks,
        width=token.k.shape[2],
        KEEP=scratch.keep,
        **problem.tile.scan.options(),
    )


def retrieve(
    query: Queries, token: Tokens, scratch: Scratch, first_block: int, problem: Problem
) -> None:
    """Outputs of one group's tokens into `query.o`; or what the backward pass wants of them."""
    parts = problem.tile.block // problem.tile.queries
    retrieve_kernel[(len(token.bounds), scratch.blocks, token.k.shape[1] * parts)](
        **memory_of(token, scratch, problem),
        query=query,
        query_layers=scratch.query_layers,
        p_norm=norm_or(problem.norm, scratch.coefficient.a),
        group=first_block,
        KEEP=scratch.keep,
        **problem.tile.retrieve.options(),
    )


def short(query: Queries, token: Tokens, scratch: Scratch, problem: Problem, final: bool) -> None:
    """Outputs of sequences of one block into `query.o`; with `final`, their states go on in place.

    The scratch is `on` these, of one block.
    """
    short_kernel[(len(token.bounds), token.k.shape[1])](
        **memory_of(token, scratch, problem),
        query=query,
        query_layers=scratch.query_layers,
        p_norm=norm_or(problem.norm, scratch.coefficient.a),
        chunks=problem.blocks.chunks,
        rows=problem.tile.block,
        width=token.k.shape[2],
        final=int(final),
        **problem.tile.scan.options(),
    )


def norm_or(norm: Tensor | None, other: Tensor) -> Tensor:
    """Where there is no LayerNorm, any tensor of the dtype that sums have."""
    return other if norm is None else norm


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
    (M, H, _), N, depth = q.shape, len(cu) - 1, len(weights)
    hidden = weights[0].shape[-1]
    o, blocks = torch.empty_like(q), triton.cdiv(longest, tile.block)
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    network = network_sizes(q, hidden, depth, tile, activation, residual, norm)
    rows = fixed(H=H, L=1, CHUNK=1, TOKENS=1, SPAN=1, BT=tile.block, BC=16, BQ=16)
    rest = fixed(GATES=(), READ="token", EARLIER=False, HISTORY=False)
    if N * blocks:
        recall_kernel[(N * blocks, H)](
            p_q=q,
            weights=weights,
            inputs=tuple(
                q.new_empty(M, H, hidden) if 0 < i_l < depth - 1 else q for i_l in range(depth)
            ),
            p_norm=norm_or(norm, q.new_empty(0, dtype=acc)),
            p_o=o,
            p_cu=cu,
            blocks=blocks,
            hidden=hidden,
            sizes=Sizes(**rows, **rest, **network),
            **tile.recall.options(),
        )
    return o

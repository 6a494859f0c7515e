"""The walk over blocks, forward and back.

Forward keeps the state at every span's start, and nothing per token. Backward goes through the
spans from the last, computes one again, and takes its blocks in reverse. Everything is computed in
float32 (float64 for float64 inputs) whatever the inputs' dtype; only what is read and returned is
rounded.

Keys of a chunk read at the state the chunk started with, the anchor; queries at the running
state. Where a block holds whole chunks the two are one at its start. Where a chunk spans several
blocks the anchor stays behind until the chunk is whole, and a chunk that is still open at the end
leaves it as the final state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..packing import Options, Packed, accumulator
from ..transforms import differentiable
from .block import (
    BlockGrad,
    Chunk,
    advance,
    advance_backward,
    chunk_grads,
    errors,
    errors_backward,
    read,
    read_backward,
    read_links,
)
from .layout import Layout, Span
from .links import Apart
from .network import Network, NormGrad
from .span import Box, Gates, Tables, norm_rows

State = list[Tensor]  # per layer, [R, 2, d_in, d_out]


class Recycler:
    """Buffers of states no longer needed: allocating costs more than the arithmetic on them."""

    def __init__(self) -> None:
        self.free: dict[torch.Size, list[Tensor]] = {}

    def take(self, like: Tensor) -> Tensor:
        free = self.free.get(like.shape)
        return free.pop() if free else torch.empty_like(like)

    def give(self, state: State) -> None:
        for x in state:
            self.free.setdefault(x.shape, []).append(x)


class Walk:
    """One span, ready to be walked over."""

    def __init__(self, span: Span, packed: Packed, layout: Layout, options: Options):
        self.span, self.size = span, layout.block
        self.has_queries = span.first_query < self.size.tokens
        self.box = Box(span, packed.k.shape[1])
        self.gates = Gates(span, self.box, packed)
        self.tables = self.gates.tables()
        self.by = self.tables.blocks(len(packed.weights))
        dtype = accumulator(packed.q)
        norm = norm_rows(packed.norm, span.sequences)
        self.network = Network(options.activation, options.residual, norm)
        self.read = options.read
        self.k = self.box.tokens.take(packed.k, dtype)
        self.v = self.box.tokens.take(packed.v, dtype)
        self.q = self.box.queries.take(packed.q, dtype)

    def learn(
        self, i: int, anchor: Sequence[Tensor | Apart], order: int
    ) -> tuple[list[Chunk], State, State]:
        """Errors of block i, and every layer's inputs and errors over the whole block."""
        depth, count = len(anchor), self.size.chunks
        chunks = errors(self.k[i], self.v[i], anchor, self.by[i], count, self.network, order)
        if count == 1:
            return chunks, chunks[0].x, chunks[0].d
        X = [torch.cat([c.x[n] for c in chunks], 1) for n in range(depth)]
        D = [torch.cat([c.d[n] for c in chunks], 1) for n in range(depth)]
        return chunks, X, D

    def outputs(
        self,
        i: int,
        running: Sequence[Tensor | Apart],
        chunks: list[Chunk],
        X: State,
        D: State,
    ) -> Tensor:
        """Outputs of block i for its queries, [R, n, D]."""
        if self.read == "token":
            links = read_links(running, X, D, self.by[i], self.span.first_query)
            return read(self.q[i], links, self.network)
        parts = [(self.q[i][:, at], chunks[c].links) for c, at in self.query_chunks()]
        return torch.cat([read(q, links, self.network) for q, links in parts], 1)

    def query_chunks(self) -> Iterator[tuple[int, slice]]:
        """Chunks of a block that have queries, and the columns of these."""
        size, before = self.size.tokens // self.size.chunks, self.span.first_query
        for c in range(self.size.chunks):
            if (c + 1) * size > before:
                yield c, slice(max(c * size - before, 0), (c + 1) * size - before)

    def outputs_backward(
        self,
        i: int,
        dout: Tensor,
        running: State,
        chunks: list[Chunk],
        X: State,
        D: State,
        grads: list[BlockGrad],
        anchor_grads: State,
        norm_grad: NormGrad | None,
    ) -> Tensor:
        """The gradient of block i's queries; those of the rest are added in place."""
        if self.read == "token":
            first_query, N = self.span.first_query, self.size.tokens
            links = read_links(running, X, D, self.by[i], first_query)
            link_grads = [grad.link(first_query + 1, N + 1, N) for grad in grads]
            return read_backward(dout, self.q[i], links, self.network, link_grads, norm_grad)
        dq, size = torch.empty_like(self.q[i]), self.size.tokens // self.size.chunks
        for c, at in self.query_chunks():
            link_grads = chunk_grads(grads, anchor_grads, c, size)
            dq[:, at] = read_backward(
                dout[:, at], self.q[i][:, at], chunks[c].links, self.network, link_grads, norm_grad
            )
        return dq

    def moves(self, i: int) -> bool:
        """Whether block i hands on another state than it started with; all but the last do."""
        return self.span.moves or self.span.start + i + 1 < self.span.stop

    def ends_chunk(self, i: int) -> bool:
        return (self.span.start + i + 1) % self.size.blocks == 0

    def whole(self, i: int) -> Tensor | None:
        """Which rows have a whole chunk behind them where block i ends one; None: all of them."""
        flags = self.span.whole[i] if self.span.whole else None
        if flags is None:
            return None
        return flags.repeat_interleave(self.k.shape[1] // len(flags))[:, None, None, None]

    def hand_on(
        self,
        i: int,
        anchor: State,
        running: State,
        X: State,
        D: State,
        memory: Recycler | None = None,
    ) -> tuple[State, State]:
        """Anchor and running state after block i."""
        if not self.moves(i):
            return anchor, running
        out = [None if memory is None else memory.take(x) for x in running]
        running = [advance(*parts) for parts in zip(running, X, D, self.by[i], out, strict=True)]
        if not self.ends_chunk(i):
            return anchor, running
        whole = self.whole(i)
        if whole is not None:
            running = [torch.where(whole, r, a) for r, a in zip(running, anchor, strict=True)]
        return running, running

    def hand_on_backward(self, i: int, danchor: State, drunning: State) -> tuple[State, State]:
        """Gradients of the anchor and of what `advance` made, from those of what was handed on."""
        if self.size.blocks == 1 or not self.moves(i) or not self.ends_chunk(i):
            return danchor, drunning
        total = [a + r for a, r in zip(danchor, drunning, strict=True)]
        whole = self.whole(i)
        if whole is None:
            return [torch.zeros_like(x) for x in total], total
        return (
            [x.masked_fill(whole, 0.0) for x in total],
            [x.masked_fill(~whole, 0.0) for x in total],
        )


class Checkpoints:
    """Running state, and anchor where it is another, at every span's start but the first.

    Tables [rows, H, 2, d_in, d_out] per layer, in the order of the walk. The first span starts with
    what the walk was given.
    """

    def __init__(self, tables: list[Tensor], depth: int):
        self.running = self.anchor = tables[:depth]
        if len(tables) > depth:
            self.anchor = tables[depth:]

    def _rows(self, span: Span, tables: list[Tensor]) -> State:
        return [x[span.checkpoint :][: span.sequences].flatten(0, 1) for x in tables]

    def keep(self, span: Span, anchor: State, running: State) -> None:
        for tables, state in ((self.running, running), (self.anchor, anchor)):
            for table, x in zip(self._rows(span, tables), state, strict=True):
                table.copy_(x)

    def start(self, span: Span) -> tuple[State, State]:
        """Anchor and running state."""
        running = self._rows(span, self.running)
        one = self.anchor is self.running
        return running if one else self._rows(span, self.anchor), running


def initial_state(packed: Packed, layout: Layout) -> State:
    """In the layout's order."""
    return [
        layout.sort(torch.stack([W, S], 2)).flatten(0, 1)
        for W, S in zip(packed.weights, packed.momentum, strict=True)
    ]


def parts(state: State, layout: Layout, heads: int) -> list[Tensor]:
    """Weights and then momenta of a state, [N, H, d_in, d_out] each, sequences as they were."""
    stacked = [layout.restore(x.unflatten(0, (-1, heads))) for x in state]
    # Copies: they are an op's outputs, none of which may share memory with another.
    return [
        x.select(2, i).clone(memory_format=torch.contiguous_format) for i in (0, 1) for x in stacked
    ]


def run(
    packed: Packed,
    layout: Layout,
    options: Options,
    kept: Checkpoints | None = None,
    final: bool = True,
) -> tuple[Tensor, list[Tensor]]:
    """Outputs, and with `final` the final state, made of differentiable operations."""
    heads = packed.k.shape[1]
    o = torch.zeros_like(packed.q, memory_format=torch.contiguous_format)
    if layout.still and not final:
        _run_still(packed, layout, options, o)
        return o, []
    anchor = running = initial_state(packed, layout)
    finished = []
    memory = None if differentiable() else Recycler()
    for span in layout.spans():
        rows = span.sequences * heads
        if rows < len(anchor[0]):  # sequences that end here
            finished.append([x[rows:] for x in anchor])
            one = anchor is running
            anchor = [x[:rows] for x in anchor]
            running = anchor if one else [x[:rows] for x in running]
        if kept is not None and span.start:
            kept.keep(span, anchor, running)
        walk = Walk(span, packed, layout, options)
        outputs = []
        for i in range(span.stop - span.start):
            chunks, X, D = walk.learn(i, anchor, 1)
            if walk.has_queries:
                outputs.append(walk.outputs(i, running, chunks, X, D))
            before = running
            anchor, running = walk.hand_on(i, anchor, running, X, D, memory)
            if memory is not None and before is not anchor and before is not running:
                memory.give(before)
        if walk.has_queries:
            walk.box.queries.put(o, torch.stack(outputs))
    if not final:
        return o, []
    finished.append(anchor)
    state = [torch.cat(rows) for rows in zip(*reversed(finished), strict=True)]
    return o, parts(state, layout, heads)


def _run_still(packed: Packed, layout: Layout, options: Options, o: Tensor) -> None:
    """The walk where it is one block that moves nothing. Fills in the outputs."""
    for span in layout.spans():
        state = [
            Apart(*(layout.sort(x)[: span.sequences].flatten(0, 1) for x in layer))
            for layer in zip(packed.weights, packed.momentum, strict=True)
        ]
        walk = Walk(span, packed, layout, options)
        if walk.has_queries:
            chunks, X, D = walk.learn(0, state, 1)
            walk.box.queries.put(o, walk.outputs(0, state, chunks, X, D)[None])


def run_backward(
    packed: Packed,
    kept: Checkpoints,
    layout: Layout,
    options: Options,
    do: Tensor,
    dfinal: list[Tensor],
) -> list[Tensor]:
    """Gradients of `run`, of all that is differentiable."""
    depth, heads = len(packed.weights), packed.k.shape[1]
    one = layout.block.blocks == 1  # anchor and running state are one wherever a block starts
    dstate = initial_state(packed._replace(weights=dfinal[:depth], momentum=dfinal[depth:]), layout)
    grads = list(map(_zeros, packed[:6]))  # of tokens
    norm_grad = None
    if packed.norm is not None:
        norm_grad = NormGrad(*packed.norm.new_zeros(2, len(dstate[0]), packed.k.shape[-1]))

    memory = Recycler()
    danchor = drunning = [x[:0] for x in dstate]
    for span in reversed(list(layout.spans())):
        # Sequences that end with this span join in.
        rows = slice(len(drunning[0]), span.sequences * heads)
        ending = [x[rows] for x in dstate]
        if one:
            danchor = drunning = [torch.cat(x) for x in zip(drunning, ending, strict=True)]
        else:
            danchor = [torch.cat(x) for x in zip(danchor, ending, strict=True)]
            drunning = [
                torch.cat([x, torch.zeros_like(e)]) for x, e in zip(drunning, ending, strict=True)
            ]
        if span.start:
            anchor, running = kept.start(span)
        else:
            anchor = running = [x[: rows.stop] for x in initial_state(packed, layout)]
        walk = Walk(span, packed, layout, options)
        danchor, drunning = _span_backward(
            walk, anchor, running, do, danchor, drunning, grads, norm_grad, memory
        )
    ending = [x[len(drunning[0]) :] for x in dstate]  # sequences without a single token
    if not one:
        drunning = [a + r for a, r in zip(danchor, drunning, strict=True)]
    state = [torch.cat(x) for x in zip(drunning, ending, strict=True)]
    norm = []
    if norm_grad is not None:
        norm = [torch.stack([x.unflatten(0, (-1, heads)).sum(0) for x in norm_grad], 1)]
    return [*grads, *parts(state, layout, heads), *norm]


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x, memory_format=torch.contiguous_format)


def _span_backward(
    walk: Walk,
    anchor: State,
    running: State,
    do: Tensor,
    danchor: State,
    drunning: State,
    grads: list[Tensor],
    norm_grad: NormGrad | None,
    memory: Recycler,
) -> tuple[State, State]:
    """One span: forward again, then block after block in reverse. Fills in tokens' gradients."""
    depth, blocks = len(anchor), walk.span.stop - walk.span.start
    records = []
    for i in range(blocks):
        chunks, X, D = walk.learn(i, anchor, 2)
        records.append((running, chunks, X, D))
        anchor, running = walk.hand_on(i, anchor, running, X, D, memory)
    if walk.moves(blocks - 1):
        memory.give(running)

    dout = walk.box.queries.take(do, walk.q.dtype)
    dq, dk, dv = torch.empty_like(walk.q), torch.empty_like(walk.k), torch.empty_like(walk.v)
    dtables = Tables(*map(_zeros, walk.tables))
    dby = dtables.blocks(depth)
    norm = None if norm_grad is None else NormGrad(*(x[: walk.k.shape[1]] for x in norm_grad))
    for i in range(blocks - 1, -1, -1):
        running, chunks, X, D = records.pop()
        by = walk.by[i]
        danchor, drunning = walk.hand_on_backward(i, danchor, drunning)
        if walk.moves(i):
            block = [
                BlockGrad(
                    torch.empty_like(x), torch.empty_like(d), memory.take(state), coefficients
                )
                for x, d, state, coefficients in zip(X, D, running, dby[i], strict=True)
            ]
            for layer in zip(drunning, running, X, D, by, block, strict=True):
                advance_backward(*layer)
            memory.give(drunning)
            drunning = [grad.state for grad in block]
        else:
            block = [
                BlockGrad(_zeros(x), _zeros(d), state, coefficients)
                for x, d, state, coefficients in zip(X, D, drunning, dby[i], strict=True)
            ]
        if walk.size.blocks == 1:
            danchor = drunning
        if walk.has_queries:
            dq[i] = walk.outputs_backward(i, dout[i], running, chunks, X, D, block, danchor, norm)
        dk[i], dv[i] = errors_backward(chunks, walk.network, block, danchor, norm)
        if i > 0:
            memory.give(running)

    walk.box.queries.put(grads[0], dq)
    for grad, x in zip(grads[1:], (dk, dv, *walk.gates.backward(dtables)), strict=True):
        walk.box.tokens.put(grad, x)
    return danchor, drunning

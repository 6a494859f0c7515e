"""The walk over blocks, forward and back.

Forward keeps the state at every span's start, about the square root of the number of blocks of
them, and nothing per token. Backward goes through the spans from the last, computes one again,
and takes its blocks in reverse. Everything is computed in float32 (float64 for float64 inputs)
whatever the inputs' dtype; only what is read and returned is rounded.

Keys of a chunk read at the state the chunk started with, the anchor; queries at the running
state. Where a block holds whole chunks the two are one at its start. Where a chunk spans several
blocks the anchor stays behind until the chunk is whole, and a chunk that is still open at the end
leaves it as the final state.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .block import (
    BlockGrad,
    Chunk,
    advance,
    advance_backward,
    errors,
    errors_backward,
    read,
    read_backward,
)
from .layout import Layout, Span
from .network import Network, NormGrad
from .span import Box, Gates, Inputs, Tables, compute_dtype, norm_rows

State = list[Tensor]  # per layer, [R, 2, d_in, d_out]


class Options(NamedTuple):
    activation: str
    residual: bool


class Recycler:
    """Memory of states that are done with. Fresh memory costs more than the arithmetic on it."""

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

    def __init__(self, span: Span, inputs: Inputs, layout: Layout, options: Options, depth: int):
        self.span, self.size = span, layout.block
        self.box = Box(span, inputs.k.shape[1], layout.table)
        self.gates = Gates(span, self.box, inputs)
        self.tables = self.gates.tables()
        self.by = self.tables.blocks(depth)
        dtype = compute_dtype(inputs.q)
        norm = norm_rows((inputs.norm_weight, inputs.norm_bias), span.sequences, dtype)
        self.network = Network(*options, norm)
        self.k = self.box.tokens.take(inputs.k, dtype)
        self.v = self.box.tokens.take(inputs.v, dtype)
        self.q = self.box.queries.take(inputs.q, dtype)

    def learn(self, i: int, anchor: State, order: int) -> tuple[list[Chunk], State, State]:
        """Errors of block i, and every layer's inputs and errors over the whole block."""
        depth, count = len(anchor), self.size.chunks
        chunks = errors(self.k[i], self.v[i], anchor, self.by[i], count, self.network, order)
        if count == 1:
            return chunks, chunks[0].x, chunks[0].d
        X = [torch.cat([c.x[n] for c in chunks], 1) for n in range(depth)]
        D = [torch.cat([c.d[n] for c in chunks], 1) for n in range(depth)]
        return chunks, X, D

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
        if self.size.blocks == 1 or not self.ends_chunk(i):
            return danchor, drunning
        total = [a + r for a, r in zip(danchor, drunning, strict=True)]
        whole = self.whole(i)
        if whole is None:
            return [torch.zeros_like(x) for x in total], total
        return (
            [x.masked_fill(whole, 0.0) for x in total],
            [x.masked_fill(~whole, 0.0) for x in total],
        )


class Result(NamedTuple):
    o: Tensor  # [Mq, H, D]
    final: State
    checkpoints: list[tuple[State, State]]  # anchor and running state at every span's start


def run(
    inputs: Inputs, state: State, layout: Layout, options: Options, keep: bool = False
) -> Result:
    """Answers and final states, made of differentiable operations; checkpoints if `keep`."""
    heads = inputs.k.shape[1]
    o = torch.zeros_like(inputs.q, memory_format=torch.contiguous_format)
    anchor = running = state
    checkpoints, finished = [], []
    memory = None if torch.is_grad_enabled() else Recycler()
    for span in layout.spans():
        rows = span.sequences * heads
        if rows < len(anchor[0]):  # sequences that end here
            finished.append([x[rows:] for x in anchor])
            one = anchor is running
            anchor = [x[:rows] for x in anchor]
            running = anchor if one else [x[:rows] for x in running]
        if keep:
            checkpoints.append((anchor, running))
        walk = Walk(span, inputs, layout, options, len(state))
        answers = []
        for i in range(span.stop - span.start):
            _, X, D = walk.learn(i, anchor, 1)
            answers.append(read(walk.q[i], running, X, D, walk.by[i], walk.network))
            before = running
            anchor, running = walk.hand_on(i, anchor, running, X, D, memory)
            if memory is not None and i > 0 and before is not anchor:
                memory.give(before)  # neither a checkpoint nor an anchor
        walk.box.queries.put(o, torch.stack(answers))
    finished.append(anchor)
    final = [torch.cat(parts) for parts in zip(*reversed(finished), strict=True)]
    return Result(o, final, checkpoints)


def run_backward(
    inputs: Inputs,
    checkpoints: list[tuple[State, State]],
    layout: Layout,
    options: Options,
    do: Tensor,
    dfinal: State,
) -> tuple[Inputs, State]:
    """Gradients of `run`: of its inputs, in their dtypes, and of the state it started with."""
    one = layout.block.blocks == 1  # anchor and running state are one wherever a block starts
    grads = Inputs(*map(_zeros, inputs[:6]))
    rows_total, width = len(dfinal[0]), inputs.k.shape[-1]
    norm_grad = None
    if inputs.norm_weight is not None:
        norm_grad = NormGrad(*do.new_zeros(2, rows_total, width, dtype=compute_dtype(inputs.q)))

    memory = Recycler()
    danchor = drunning = [x[:0] for x in dfinal]
    spans = list(layout.spans())
    for span, (anchor, running) in zip(reversed(spans), reversed(checkpoints), strict=True):
        # Sequences that end with this span join in.
        ending = [x[len(drunning[0]) : len(anchor[0])] for x in dfinal]
        if one:
            danchor = drunning = [torch.cat(x) for x in zip(drunning, ending, strict=True)]
        else:
            danchor = [torch.cat(x) for x in zip(danchor, ending, strict=True)]
            drunning = [
                torch.cat([x, torch.zeros_like(e)]) for x, e in zip(drunning, ending, strict=True)
            ]
        walk = Walk(span, inputs, layout, options, len(dfinal))
        danchor, drunning = _span_backward(
            walk, anchor, running, do, danchor, drunning, grads, norm_grad, memory
        )
    ending = [x[len(drunning[0]) :] for x in dfinal]  # sequences without a single token
    if not one:
        drunning = [a + r for a, r in zip(danchor, drunning, strict=True)]
    if norm_grad is not None:
        per_head = [x.view(-1, *inputs.k.shape[1:]).sum(0) for x in norm_grad]
        grads = grads._replace(norm_weight=per_head[0], norm_bias=per_head[1])
    return grads, [torch.cat(x) for x in zip(drunning, ending, strict=True)]


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x, memory_format=torch.contiguous_format)


def _span_backward(
    walk: Walk,
    anchor: State,
    running: State,
    do: Tensor,
    danchor: State,
    drunning: State,
    grads: Inputs,
    norm_grad: NormGrad | None,
    memory: Recycler,
) -> tuple[State, State]:
    """One span: forward again, then block after block in reverse. Adds to the inputs' gradients."""
    depth, blocks = len(anchor), walk.span.stop - walk.span.start
    records = []
    for i in range(blocks):
        chunks, X, D = walk.learn(i, anchor, 2)
        records.append((running, chunks, X, D))
        anchor, running = walk.hand_on(i, anchor, running, X, D, memory)
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
        block = [
            BlockGrad(torch.empty_like(x), torch.empty_like(d), memory.take(state), coefficients)
            for x, d, state, coefficients in zip(X, D, running, dby[i], strict=True)
        ]
        for parts in zip(drunning, running, X, D, by, block, strict=True):
            advance_backward(*parts)
        memory.give(drunning)
        drunning = [grad.state for grad in block]
        if walk.size.blocks == 1:
            danchor = drunning
        dq[i] = read_backward(dout[i], walk.q[i], running, X, D, by, walk.network, block, norm)
        dk[i], dv[i] = errors_backward(chunks, walk.network, block, danchor, norm)
        if i > 0:
            memory.give(running)

    walk.box.queries.put(grads.q, dq)
    walk.box.tokens.put(grads.k, dk)
    walk.box.tokens.put(grads.v, dv)
    for grad, gate in zip(grads[3:6], walk.gates.backward(dtables), strict=True):
        walk.box.tokens.put(grad, gate)
    return danchor, drunning

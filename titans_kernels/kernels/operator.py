"""The operators on the Triton backend: what is packed to what the kernels take, group by group."""

from __future__ import annotations

import os
from functools import lru_cache, partial
from itertools import pairwise
from math import ceil
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..chunked.operator import retrieve_backward  # plain products, of any memory
from ..packing import Options, Packed, Reading, dense
from ..stepping import Step
from . import launch, launch_backward, launch_step
from .lanes import Lanes
from .launch import Problem, Scratch
from .records import Queries, TokenGrad, Tokens
from .tiles import Blocks, Tile, architecture, rounded, tile

__all__ = ["backward", "forward", "kept_shapes", "retrieve", "retrieve_backward", "step"]

GROUP = 2048  # tokens of a sequence whose scratch is held at a time
TURNS = 2  # groups among which forward divides it: one learns while another is read


def budget() -> int:
    """Bytes that the scratch of a group may take, unless one block of every sequence takes more.

    TITANS_KERNELS_SCRATCH in the environment has them in MiB; without it, 2,048.
    """
    value = os.environ.get("TITANS_KERNELS_SCRATCH", "2048")
    if not value.isdecimal():
        raise ValueError(f"TITANS_KERNELS_SCRATCH: got {value!r}, takes a whole number of MiB")
    return int(value) * 2**20


def _bytes_of_a_block(
    tokens: Tokens, weights: list[Tensor], problem: Problem, backward: bool
) -> int:
    (H, D), L = tokens.k.shape[1:], tokens.theta.shape[2]
    widths = D, *(w.shape[-1] for w in weights)
    types = tokens.k.dtype, weights[0].dtype
    return _counted(H, L, widths, types, problem._replace(norm=None), backward)


@lru_cache
def _counted(
    H: int,
    L: int,
    widths: tuple[int, ...],
    types: tuple[torch.dtype, torch.dtype],
    problem: Problem,
    backward: bool,
) -> int:
    """Of one block of one sequence, as launchers allocate it."""
    with torch.device("meta"):
        x, gate = torch.empty(1, H, widths[0], dtype=types[0]), torch.empty(1, H, L)
        weights = [torch.empty(1, H, *size, dtype=types[1]) for size in pairwise(widths)]
        one, row = torch.empty(1, 2), torch.empty(1)
        token = Tokens(x, x, gate, gate, gate, one, row, row)
        scratch = launch.allocate(token, weights, problem, 1, backward)
        held: list[Any] = list(scratch)
        if backward:
            states = [*weights, *weights]
            of_tokens = TokenGrad(x, x, x, gate, gate, gate)
            grad = launch_backward.allocate(scratch, of_tokens, states, states, problem.read)
            held += [grad.coefficient, [(y.x, y.d, y.e) for y in grad.layers], grad.norm]
    return sum(y.nbytes for y in tree_leaves(held) if isinstance(y, Tensor))


def _tile(q: Tensor, weights: list[Tensor], chunk_size: int = 16, backward: bool = True) -> Tile:
    sizes = q.shape[2], weights[0].shape[-1]
    return tile(*sizes, q.dtype, architecture(q.device), chunk_size, backward)


Count = TypeVar("Count", int, Tensor)
States = tuple[list[Tensor], list[Tensor]]  # running and anchor: weights, then momenta

Record = TypeVar("Record", Packed, Reading)


def _dense_all(tensors: list[Tensor]) -> list[Tensor]:
    return [dense(x) for x in tensors]


def _dense_record(record: Record) -> Record:
    """Every tensor that reaches a kernel goes through here, index tensors too."""
    fields: list[Any] = [
        dense(x) if isinstance(x, Tensor) else x if x is None else _dense_all(x) for x in record
    ]
    return type(record)(*fields)


class Intervals(NamedTuple):
    """How far apart the states are that forward keeps: so many blocks of a sequence."""

    blocks: int
    size: int  # blocks in a period,
    period: int  # and its tokens: of a block, or of a chunk that spans several

    @classmethod
    def of(cls, chunk_size: int, size: Tile, blocks: Blocks) -> Intervals:
        period = blocks.tokens if blocks.span == 1 else chunk_size
        return cls(max(1, GROUP // size.block), blocks.span, period)

    def rows(self, tokens: Count) -> Count:
        """Intervals in so many tokens. A sequence's n tokens start at most rows(n) after its first.

        So no other sequence has row `rows(start) + i`, for the i-th after the first of the one
        with this start: rows(start) + rows(n) is at most rows(start + n).
        """
        return tokens * self.size // (self.blocks * self.period)


class Plan(NamedTuple):
    """How the walk goes over all sequences."""

    problem: Problem
    group: int  # blocks of a sequence whose scratch is one: divides an interval
    turns: int  # groups that have a scratch at the same time
    intervals: Intervals
    most: int  # blocks of a sequence, at most
    short: bool  # whether each is one block, for one program
    tokens: Tokens

    @classmethod
    def of(
        cls,
        packed: Packed,
        options: Options,
        chunk_size: int,
        longest: int,
        backward: bool = True,
        turns: int = 1,
    ) -> Plan:
        size = _tile(packed.q, packed.weights, chunk_size, backward)
        size = size.fitting(longest, chunk_size)
        blocks = Blocks.of(chunk_size, size)
        intervals = Intervals.of(chunk_size, size, blocks)
        if blocks.span == 1:
            most = ceil(longest / blocks.tokens)
        else:
            whole, rest = divmod(longest, chunk_size)
            most = whole * blocks.span + ceil(rest / blocks.tokens)
        # By the length that the self-check rounds to: its problem is to take the same road.
        one = blocks.span == 1 and rounded(longest, chunk_size) <= blocks.tokens
        short = one and size.queries == size.block
        N = max(len(packed.tail), 1)
        total = ceil(len(packed.k) / blocks.tokens) + N  # blocks of all sequences, at most
        wanted = min(most, ceil(total / N))
        problem = Problem(chunk_size, blocks, *options, packed.norm, size)
        tokens = Tokens(*packed.tokens(), packed.bounds, packed.tail, packed.query_start)
        room = budget() // (N * _bytes_of_a_block(tokens, packed.weights, problem, backward))
        turns = min(turns, max(room, 1))
        divisors = [n for n in range(1, intervals.blocks + 1) if intervals.blocks % n == 0]
        enough = next((n for n in divisors if n >= wanted), divisors[-1])
        held = min(enough, max(room // turns, 1), max(intervals.blocks // turns, 1))
        group = max(n for n in divisors if n <= held)
        return cls(problem, group, min(turns, ceil(most / group)), intervals, most, short, tokens)

    def kept_rows(self, first_block: int, rows: int) -> Tensor:
        """Where each sequence keeps the state it starts this block with, [N]; `rows`: it has none.

        The block is the first of an interval, and not of the walk.
        """
        (blocks, size, period), problem = self.intervals, self.problem
        position = first_block // size * period + first_block % size * problem.blocks.tokens
        first, end = self.tokens.bounds.unbind(1)
        row = self.intervals.rows(first) + (first_block // blocks - 1)
        return row.where(end - first > position, rows)


def kept_shapes(packed: Packed, chunk_size: int) -> list[tuple[int, ...]]:
    """Of what forward keeps for backward: weights and momenta, where a chunk spans blocks those
    that it started with too, [rows, H, d_in, d_out] each; the last row is unused.

    One row more: what is compiled for any number of tokens must not depend on whether there is one.
    """
    size = _tile(packed.q, packed.weights, chunk_size)
    blocks = Blocks.of(chunk_size, size)
    rows = Intervals.of(chunk_size, size, blocks).rows(packed.k.shape[0]) + 2
    tables = [(rows, *w.shape[1:]) for w in (*packed.weights, *packed.momentum)]
    return tables if blocks.span == 1 else tables * 2


def forward(
    packed: Packed,
    options: Options,
    chunk_size: int,
    longest: int,
    kept: list[Tensor],
    final: bool = True,
) -> tuple[Tensor, list[Tensor]]:
    """Outputs and, with `final`, the final state; `kept` is filled in where it is not empty."""
    packed = _dense_record(packed)
    plan = Plan.of(packed, options, chunk_size, longest, bool(kept), TURNS)
    # Running state, and that of the last whole chunk: another where a chunk spans blocks.
    running = [*packed.weights, *packed.momentum]
    if final or not plan.short:
        running = [_copy(x) for x in running]
    anchor = running if plan.problem.blocks.span == 1 else [x.clone() for x in running]
    o = torch.empty_like(packed.q)
    if not (running[0].numel() and len(packed.k)):
        pass  # nothing is learned, and nothing is there to read
    elif plan.short:
        _short(plan, packed.q, o, running, final)
    else:
        _walk(plan, packed, o, (running, anchor), kept)
    return o, anchor if final else []


def _walk(plan: Plan, packed: Packed, o: Tensor, states: States, kept: list[Tensor]) -> None:
    """Outputs into `o`, group after group; `states` go on in place."""
    problem, tokens, (running, anchor) = plan.problem, plan.tokens, states
    scratch = [
        launch.allocate(tokens, running[: len(packed.weights)], problem, plan.group)
        for _ in range(plan.turns)
    ]
    # Queries read what a chunk over several blocks started with.
    started = anchor if problem.read == "chunk" and problem.blocks.span > 1 else []
    before = [_rounded(started, packed.q) for _ in scratch]
    keeps = range(plan.intervals.blocks, plan.most if kept else 0, plan.intervals.blocks)
    rows = {first: plan.kept_rows(first, len(kept[0]) - 1) for first in keeps}

    def learn(first: int, turn: int) -> None:
        if first in rows:
            tables = running if anchor is running else [*running, *anchor]
            for table, state in zip(kept, tables, strict=True):
                table.index_copy_(0, rows[first], state)
        group = scratch[turn].at(running, anchor)
        for start, state in zip(before[turn], started, strict=True):
            start.copy_(state)
        launch.coefficients(tokens, group, first, problem)
        launch.scan(tokens, group, first, problem)
        scratch[turn] = group.read_from(before[turn]) if started else group

    def read(first: int, turn: int) -> None:
        query = Queries(packed.q, o, scratch[turn].parts)
        launch.retrieve(query, tokens, scratch[turn], first, problem)

    with Lanes(o.device, plan.turns) as lanes:
        for i, first in enumerate(range(0, plan.most, plan.group)):
            turn = i % plan.turns
            lanes.learn(turn, partial(learn, first, turn))
            if len(o):
                lanes.read(turn, partial(read, first, turn))


def _short(plan: Plan, q: Tensor, o: Tensor, states: list[Tensor], final: bool) -> None:
    """Outputs into `o`, and with `final` the final states into `states`."""
    weights = states[: len(states) // 2]
    scratch = launch.allocate(plan.tokens, weights, plan.problem, 1, states=False)
    query = Queries(q, o, scratch.parts)
    launch.short(query, plan.tokens, scratch.on(states), plan.problem, final)


def step(step: Step, options: Options, rate: float) -> Tensor:
    """A layer's gated output [N, H D] of one token; its state goes on in place."""
    if not step.projected.gate.numel():
        return torch.empty_like(step.projected.gate)
    packed, chunk_size = launch_step.prepare(step, rate), step.state.tokens[0].shape[1]
    plan = Plan.of(packed, options, chunk_size, chunk_size, backward=False)
    if plan.short:
        o = torch.empty_like(packed.q)
        _short(plan, packed.q, o, step.state.memory, True)
    else:
        o, final = forward(packed, options, chunk_size, chunk_size, [])
        for old, new in zip(step.state.memory, final, strict=True):
            old.copy_(new)
    return launch_step.finish(step, o, packed.tail)


_DENSE = torch.contiguous_format


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=_DENSE)


def _rounded(states: list[Tensor], q: Tensor) -> list[Tensor]:
    return [x.to(q.dtype, copy=True) for x in states]


def backward(
    packed: Packed,
    options: Options,
    chunk_size: int,
    longest: int,
    kept: list[Tensor],
    do: Tensor,
    dfinal: list[Tensor],
) -> list[Tensor]:
    """Gradients of `packed.differentiable()`: interval after interval, the last first.

    A group's forward pass is recomputed. Its scratch, about 15 KB a token and head of the group at
    D 64 and hidden 256, is all that is held in addition to the states that forward kept: 128 bytes
    a token and head of all.
    """
    packed, kept, do = _dense_record(packed), _dense_all(kept), dense(do)
    plan = Plan.of(packed, options, chunk_size, longest)
    problem, tokens, depth = plan.problem, plan.tokens, len(packed.weights)
    dnorm = None
    # zero where rows of the packed tokens are padding
    dtokens = TokenGrad(*(torch.zeros_like(x, memory_format=_DENSE) for x in packed[:6]))
    dstate, danchor = [_copy(x) for x in dfinal], [_copy(x) for x in dfinal]
    if problem.blocks.span > 1:  # a chunk that is still open leaves its anchor as the final state
        whole = (packed.lengths() % chunk_size == 0)[:, None, None, None]
        for running, anchor in zip(dstate, danchor, strict=True):
            running.masked_fill_(~whole, 0.0)
            anchor.masked_fill_(whole, 0.0)
    if packed.norm is not None:
        dnorm = torch.zeros_like(packed.norm, memory_format=_DENSE)

    if dstate[0].numel() and len(tokens.k):
        scratch = launch.allocate(tokens, dstate[:depth], problem, plan.group, keep=True)
        grad = launch_backward.allocate(scratch, dtokens, dstate, danchor, problem.read)
        query = Queries(packed.q, do, scratch.parts)
        for start in reversed(range(0, plan.most, plan.intervals.blocks)):
            for first, states in reversed(_starts(plan, packed, kept, start, scratch)):
                before = _rounded(states[1], packed.q)
                group = scratch.at(*states)
                launch.coefficients(tokens, group, first, problem)
                launch.scan(tokens, group, first, problem)
                group = group.read_from(before)
                launch.retrieve(query, tokens, group, first, problem)
                at = (query, tokens, group, grad, first, problem)
                launch_backward.retrieve_backward(*at)
                launch_backward.inputs_backward(*at, keys=False)
                launch_backward.scan_backward(*at)
                launch_backward.inputs_backward(*at, keys=True)
                launch_backward.coefficients_backward(tokens, group, grad, first, problem)
                if dnorm is not None:
                    dnorm += grad.norm.sum(0)
        if dnorm is not None:
            dnorm += grad.norm_keys.sum(0)
    return [*dtokens, *dstate, *([] if dnorm is None else [dnorm])]


def _starts(
    plan: Plan, packed: Packed, kept: list[Tensor], start: int, scratch: Scratch
) -> list[tuple[int, States]]:
    """Groups of the interval from block `start` on, each with the states it starts with."""
    problem, count = plan.problem, 2 * len(packed.weights)
    if start == 0:
        tables = [_copy(x) for x in (*packed.weights, *packed.momentum)]
        tables += [] if problem.blocks.span == 1 else [x.clone() for x in tables]
    else:
        rows = plan.kept_rows(start, len(kept[0]) - 1)
        tables = [table.index_select(0, rows) for table in kept]
    running, anchor = tables[:count], tables[count:] or tables[:count]
    found: list[tuple[int, States]] = []
    stop = min(start + plan.intervals.blocks, plan.most)
    for first in range(start, stop, plan.group):
        if first > start:  # most often an interval is a group
            running = [x.clone() for x in running]
            anchor = running if problem.blocks.span == 1 else [x.clone() for x in anchor]
            walk = scratch._replace(keep=False).at(running, anchor)
            launch.coefficients(plan.tokens, walk, first - plan.group, problem)
            launch.scan(plan.tokens, walk, first - plan.group, problem)
        found.append((first, (running, anchor)))
    return found


def retrieve(reading: Reading, options: Options, longest: int) -> Tensor:
    """f(q) at the weights of every sequence."""
    reading = _dense_record(reading)
    return launch.recall(
        reading.q,
        tuple(w.to(reading.q.dtype) for w in reading.weights),
        reading.norm,
        reading.cu,
        longest,
        *options[:2],
        _tile(reading.q, reading.weights).fitting(longest),
    )

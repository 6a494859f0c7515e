"""Queries projected onto the keys that a memory has learned (TNT, arXiv 2511.07343, appendix C).

    q'_t = P_t q_t        P_t = sum of k_tau k_tau^T / |k_tau|^2

over the tokens tau <= t since the last border: a reset, or the start of a chunk. That is causal
linear attention whose values are its keys. Tokens between two borders, a run, are cut into blocks:
masked products within a block, and a carry [D, D] from block to block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numeric import unit, wide
from ..packing import known, one_each, segments
from ..shards import Runs, most_runs, split
from .state import ProjectionState

BLOCK = 64


def project(
    q: Tensor,
    k: Tensor,
    state: ProjectionState | None,
    cu_seqlens: Tensor | None,
    reset_every: int,
    chunk_size: int | None = None,
) -> tuple[Tensor, ProjectionState]:
    """q, k [B, T, H, D] -> the projected queries, and the state to continue from.

    Args:
        reset_every: a border before each token at a position that is a multiple of it.
        chunk_size: further borders, so many tokens apart, counted from those.
    """
    starts, longest = segments(q, cu_seqlens)
    u, wide_q, dtype = unit(k), wide(q), q.dtype
    if state is None:
        N, (H, D) = len(starts) - 1, q.shape[2:]
        position = torch.zeros(N, dtype=torch.int32, device=q.device)
        state = ProjectionState(u.new_zeros(N, H, D, D), position)
        fresh = True
    else:
        fresh = False
    if q.numel() == 0:
        return q, state
    position = state.position.to(torch.int64)
    if one_each(q, cu_seqlens):
        return _step(wide_q, u, state.projection, position, reset_every, chunk_size, dtype)

    every = reset_every if chunk_size is None else min(chunk_size, reset_every)
    most = most_runs(len(position), q.shape[1], position, fresh, cu_seqlens, reset_every)
    new = starts.diff()
    runs = split(new, position, reset_every, most)
    after = runs.position.to(torch.int32)
    if chunk_size is not None:
        runs = _chunks(runs, position, chunk_size, q.shape[0] * q.shape[1])
    begin, end = (starts[:-1][runs.n] + x for x in (runs.begin, runs.end))
    tokens = wide_q.flatten(0, 1), u.flatten(0, 1)
    carry = None if fresh else state.projection
    if not torch.compiler.is_compiling():
        every = min(every, longest)
    o, last = _attend(*tokens, begin, end, runs, carry, every)
    none = (new == 0).view(-1, 1, 1, 1)
    projection = torch.where(none, state.projection, last)
    return o.view(q.shape).to(dtype), ProjectionState(projection, after)


def recall(q: Tensor, state: ProjectionState, cu_seqlens: Tensor | None) -> Tensor:
    """q [B, T, H, D] projected by P as the last token of each sequence has left it."""
    P = state.projection
    if cu_seqlens is None:
        return torch.einsum("nhij,nthj->nthi", P, wide(q)).to(q.dtype)
    lengths = cu_seqlens.diff().to(q.device)
    n = torch.arange(len(P), device=q.device)
    n = n.repeat_interleave(lengths, output_size=q.shape[1])
    return torch.einsum("thij,thj->thi", P[n], wide(q[0])).to(q.dtype)[None]


def _step(
    q: Tensor,
    u: Tensor,
    P: Tensor,
    position: Tensor,
    reset_every: int,
    chunk_size: int | None,
    dtype: torch.dtype,
) -> tuple[Tensor, ProjectionState]:
    """One token of every sequence."""
    position = position.masked_fill(position == reset_every, 0)
    begins = position == 0 if chunk_size is None else position % chunk_size == 0
    P = P.masked_fill(begins.view(-1, 1, 1, 1), 0.0)
    P = P + u[:, 0, :, :, None] * u[:, 0, :, None]
    o = (P @ q[:, 0, :, :, None]).squeeze(-1)[:, None]
    return o.to(dtype), ProjectionState(P, (position + 1).to(torch.int32))


def _chunks(runs: Runs, position: Tensor, size: int, tokens: int) -> Runs:
    """Runs from reset to reset, with a border after every so many tokens of each."""
    n, new = runs.n, runs.end - runs.begin
    # A chunk that is complete is followed by another, as a shard is: of the whole it has all.
    before = torch.where(position > 0, (position - 1) % size + 1, 0)
    before = before[n].where(runs.opens, 0)
    if known(new):
        most = int(((before + new + size - 1) // size).clamp(min=1).sum())
    else:
        most = 2 * len(n) + tokens // size
    parts = split(new, before, size, most)
    return Runs(
        n[parts.n],
        runs.begin[parts.n] + parts.begin,
        runs.begin[parts.n] + parts.end,
        parts.opens & runs.opens[parts.n],
        parts.last[runs.last],
        parts.position[runs.last],
    )


def _attend(
    q: Tensor,
    u: Tensor,
    begin: Tensor,
    end: Tensor,
    runs: Runs,
    carry: Tensor | None,
    longest: int,
) -> tuple[Tensor, Tensor]:
    """q, u [M, H, D] in runs from `begin` to `end`, [R], at most `longest` tokens each.

    Returns:
        (o, last): [M, H, D], and of every sequence the sum over its last run,
        [N, H, D, D].
    """
    M, size = len(q), min(BLOCK, longest)
    blocks = (end - begin + size - 1) // size  # [R]
    stop = blocks.cumsum(0)
    first = stop - blocks  # its first block
    b = torch.arange(M // size + len(blocks), device=q.device)  # as many as may be
    r = torch.searchsorted(stop, b, right=True).clamp(max=len(blocks) - 1)
    nth = b - first[r]  # the block's place in its run
    token = (begin[r] + nth * size)[:, None] + torch.arange(size, device=q.device)
    there = token < end[r][:, None]  # [blocks, size]
    token = token.where(there, 0)
    Q = q[token].transpose(1, 2)  # [blocks, H, size, D]
    U = u[token].masked_fill(~there[..., None, None], 0.0).transpose(1, 2)
    o = (Q @ U.mT).tril() @ U

    # A sequence continues in its first run, which is empty where there was a border.
    opening = F.pad(runs.last[:-1] + 1, (1, 0))  # [N]
    at, last = first[opening].clamp(max=len(Q) - 1), (stop[runs.last] - 1).clamp(min=0)
    total = U[last].mT @ U[last]
    if carry is not None:
        carry = carry.masked_fill((blocks[opening] == 0).view(-1, 1, 1, 1), 0.0)
    if longest > size:
        P = _carried(U.mT @ U, nth, carry, at, longest)
        o, total = o + Q @ P, total + P[last]
    elif carry is not None:
        o = o.index_add(0, at, Q[at] @ carry)
        total = total + carry.masked_fill((at != last).view(-1, 1, 1, 1), 0.0)

    t = torch.arange(M, device=q.device)
    r = torch.searchsorted(end, t, right=True)
    place = first[r] * size + t - begin[r]
    return o.transpose(1, 2).flatten(0, 1).index_select(0, place), total


def _carried(own: Tensor, nth: Tensor, carry: Tensor | None, at: Tensor, longest: int) -> Tensor:
    """Of every block the sum over its run before it, from each block's own, [blocks, H, D, D].

    Args:
        nth: [blocks], places of the blocks in their runs.
        carry, at: [N, H, D, D], what there was before the blocks at [N].
    """
    P = _shifted(own, nth, 1)
    if carry is not None:
        P = P.index_add(0, at, carry)
    reach = 1
    while reach * BLOCK < longest:
        P = P + _shifted(P, nth, reach)
        reach *= 2
    return P


def _shifted(P: Tensor, nth: Tensor, by: int) -> Tensor:
    """Of every block what the one so many before it in its run has; none: 0."""
    earlier = F.pad(P, (0, 0, 0, 0, 0, 0, by, 0))[: len(P)]
    return earlier.masked_fill((nth < by).view(-1, 1, 1, 1), 0.0)

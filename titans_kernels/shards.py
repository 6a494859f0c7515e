"""Resets: a sequence as shards, each a sequence of its own, so that backends run them in parallel.

A shard holds the tokens between two resets. Shards of a sequence follow one another in the packed
rows, so sharding moves no token: only the bounds change. Plain PyTorch, nothing waits for a
GPU: there the number of shards is a bound, and those too many are empty.
"""

from __future__ import annotations

from itertools import pairwise, repeat
from typing import NamedTuple

import torch
from torch import Tensor

from .packing import Packed, known
from .state import MemoryState
from .transforms import values


class Shards(NamedTuple):
    """All shards of all sequences, in order."""

    packed: Packed  # a sequence each
    last: Tensor  # [N] int64, the last shard of every sequence
    position: Tensor  # [N] int32, tokens in it

    def ends(self, final: list[Tensor]) -> tuple[Packed, list[Tensor]]:
        """The last shards alone, and their final weights and momenta."""
        packed = self.packed
        of_sequences = packed.bounds, packed.tail, packed.query_start
        *state, bounds, tail, start = (
            x.index_select(0, self.last) for x in (*packed.weights, *packed.momentum, *of_sequences)
        )
        depth = len(packed.weights)
        packed = packed._replace(
            weights=state[:depth],
            momentum=state[depth:],
            bounds=bounds,
            tail=tail,
            query_start=start,
        )
        return packed, [x.index_select(0, self.last) for x in final]


def restart(
    state: MemoryState, weights: tuple[Tensor, ...], T: int, cu_seqlens: Tensor | None
) -> MemoryState:
    """Sequences that have reached a reset and have a next token begin with `weights` again."""
    assert state.position is not None and state.reset_every is not None
    done = torch.eq(state.position, state.reset_every)
    if cu_seqlens is not None:
        done = done & (cu_seqlens.diff().to(done.device) > 0)
    elif T == 0:
        return state
    if known(done) and not done.any():
        return state
    here = done.view(-1, 1, 1, 1)
    k, v, theta, alpha, eta = (
        x.masked_fill(done.view(-1, *[1] * (x.dim() - 1)), 0.0)
        for x in (state.k, state.v, state.theta, state.alpha, state.eta)
    )
    return MemoryState(
        tuple(
            torch.where(here, w.to(x.dtype), x) for w, x in zip(weights, state.weights, strict=True)
        ),
        tuple(x.masked_fill(here, 0.0) for x in state.momentum),
        k,
        v,
        theta,
        alpha,
        eta,
        state.length.masked_fill(done, 0),
        state.position.masked_fill(done, 0),
        state.reset_every,
    )


class Runs(NamedTuple):
    """Runs of tokens from one border to the next; those of a sequence follow one another."""

    n: Tensor  # [R] its sequence
    begin: Tensor  # [R] its first token, counted from the first of its sequence
    end: Tensor  # [R]
    opens: Tensor  # [R] bool, whether it is its sequence's first, which continues an open one
    last: Tensor  # [N] the last run of every sequence
    position: Tensor  # [N] tokens in it, those before the call included


def split(new: Tensor, position: Tensor, every: int, most: int) -> Runs:
    """Sequences with a border after every so many tokens, as runs without one.

    Args:
        new: [N] int64, their tokens.
        position: [N] int64, tokens since their last border, 0 to `every`: there the first run is
            empty, as is the only one of a sequence without tokens.
        most: as many runs as there may be; those too many are empty.
    """
    N = len(new)
    count = ((position + new + every - 1) // every).clamp(min=1)  # [N] runs
    stop = count.cumsum(0)
    row = torch.arange(most, device=new.device)
    n = torch.searchsorted(stop, row, right=True).clamp(max=N - 1)
    nth = row - (stop - count)[n]  # the run's place in its sequence
    begins, left = (nth * every - position[n]).clamp(min=0), new[n]
    begin, end = begins.minimum(left), (nth * every + every - position[n]).minimum(left)
    return Runs(n, begin, end, nth == 0, stop - 1, position + new - (count - 1) * every)


def shard(
    packed: Packed,
    weights: tuple[Tensor, ...],
    state: MemoryState | None,
    T: int,
    cu_seqlens: Tensor | None,
    reset_every: int,
) -> Shards:
    """Every sequence as its shards: the first continues the state, later ones `weights`."""
    tail = packed.tail
    N, first = len(tail), packed.bounds[:, 0] + tail  # its first new token
    new = packed.bounds[:, 1] - first
    position = torch.zeros_like(tail) if state is None else state.position
    assert position is not None
    position = position.to(torch.int64)
    most = most_runs(N, T, position, state is None, cu_seqlens, reset_every)
    runs = split(new, position, reset_every, most)
    n, opens = runs.n, runs.opens
    tails = tail[n].where(opens, 0)
    bounds = torch.stack([first[n] + runs.begin - tails, first[n] + runs.end], 1)
    packed = packed._replace(
        weights=_first_or(packed.weights, weights, n, opens, state is None),
        momentum=_first_or(packed.momentum, None, n, opens, state is None),
        bounds=bounds,
        tail=tails,
        query_start=packed.query_start[n] + runs.begin,
    )
    return Shards(packed, runs.last, runs.position.to(torch.int32))


def _first_or(
    first: list[Tensor],
    later: tuple[Tensor, ...] | None,
    n: Tensor,
    opens: Tensor,
    fresh: bool,
) -> list[Tensor]:
    """Per layer [shards, H, d_in, d_out]: a sequence's own where one opens it, else later ones'."""
    if fresh:  # all start alike
        return [x[:1].expand(len(n), *x.shape[1:]) for x in first]
    here, out = opens.view(-1, 1, 1, 1), []
    for i, x in enumerate(first):
        other = x.new_zeros(()) if later is None else later[i].to(x.dtype)
        out.append(torch.where(here, x.index_select(0, n), other))
    return out


def most_runs(
    N: int, T: int, position: Tensor, fresh: bool, cu_seqlens: Tensor | None, S: int
) -> int:
    """Runs of N sequences, of T tokens each without cu_seqlens: as many as may be."""
    if fresh and cu_seqlens is None:
        return N * torch.sym_max(1, (T + S - 1) // S)
    if known(position) and (cu_seqlens is None or known(cu_seqlens)):
        added = (
            repeat(T) if cu_seqlens is None else (b - a for a, b in pairwise(values(cu_seqlens)))
        )
        pairs = zip(values(position), added, strict=False)
        return sum(max(1, -(-(p + more) // S)) for p, more in pairs)
    if cu_seqlens is None:
        return N * torch.sym_max(1, (T + 2 * S - 2) // S)
    return 2 * N + T // S

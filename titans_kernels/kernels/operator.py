"""The operators on the Triton backend: arguments to what the kernels take, and results back.

Nothing here waits for the GPU: lengths are looked at only where they are on the host already, and
sizes of scratch and grids are bounds that hold whatever the lengths are.
"""

from __future__ import annotations

from itertools import pairwise
from math import ceil

import torch
from torch import Tensor

from ..chunked import Options
from ..state import MemoryState
from . import launch
from .launch import Problem, Tokens
from .tiles import Blocks, Tile, architecture, tile

GROUP = 2048  # tokens of a sequence whose scratch is held at a time


def _starts(q: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, int]:
    """First token of every sequence and the end of the last, [N + 1]; the most that one has."""
    B, T = q.shape[:2]
    if cu_seqlens is None:
        return torch.arange(B + 1, device=q.device) * T, T
    longest = T
    if cu_seqlens.device.type == "cpu":
        longest = max((b - a for a, b in pairwise(cu_seqlens.tolist())), default=0)
    return cu_seqlens.to(q.device, torch.int64), longest


def _packed(norm: tuple[Tensor, Tensor] | None, dtype: torch.dtype) -> Tensor | None:
    """LayerNorm weight and bias as [H, 2, D]."""
    return None if norm is None else torch.stack(norm, 1).to(dtype).contiguous()


def _tokens(
    k: Tensor,
    v: Tensor,
    gates: tuple[Tensor, Tensor, Tensor],
    state: MemoryState | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tokens, int, Tensor]:
    """All tokens end to end, the tokens of the longest sequence at most, lengths with tails [N]."""
    B, T = k.shape[:2]
    flat = [_flat(x) for x in (k, v, *gates)]
    starts, longest = _starts(k, cu_seqlens)
    lengths = starts.diff()
    if state is None:
        tail = torch.zeros_like(lengths)
        k, v, theta, alpha, eta = flat
        return Tokens(k, v, theta, alpha, eta, starts, tail, starts[:-1]), longest, lengths

    N, C = len(lengths), state.chunk_size
    tail = state.length.to(k.device, torch.int64)
    lengths = lengths + tail
    cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    place = torch.arange(N * (C - 1) + B * T, device=k.device)  # as many as there may be
    n = torch.searchsorted(cu[1:], place, right=True).clamp(max=N - 1)
    at = place - cu[n]
    source = torch.where(at < tail[n], n * C + at, N * C + starts[n] + at - tail[n])
    source = source.where(place < cu[-1], 0)
    tails = (state.k, state.v, state.theta, state.alpha, state.eta)
    k, v, theta, alpha, eta = (
        torch.cat([_flat(old).to(new.dtype), new]).index_select(0, source)
        for old, new in zip(tails, flat, strict=True)
    )
    return (
        Tokens(k, v, theta, alpha, eta, cu, tail, starts[:-1]),
        longest + C - 1,
        lengths,
    )


def _flat(x: Tensor) -> Tensor:
    """[B, T, H, ...] to [B T, H, width], dense."""
    return x.reshape(-1, x.shape[2], *(x.shape[3:] or (1,))).contiguous()


def _open_chunks(
    tokens: Tokens, lengths: Tensor, chunk_size: int, shapes: list[torch.Size]
) -> list[Tensor]:
    """The tails that are left, [N, chunk_size, ...] zero-padded, and their lengths."""
    N, M = len(lengths), len(tokens.k)
    length = lengths % chunk_size
    offset = torch.arange(chunk_size, device=lengths.device)
    place = (tokens.cu[1:, None] - length[:, None] + offset).clamp(max=max(M - 1, 0))
    there = (offset < length[:, None])[:, :, None, None]
    out = []
    for x, shape in zip(tokens[:5], shapes, strict=True):
        if M == 0:
            out.append(x.new_zeros(N, chunk_size, *shape))
            continue
        tail = x.index_select(0, place.flatten()).view(N, chunk_size, *x.shape[1:])
        out.append(tail.masked_fill(~there, 0.0).view(N, chunk_size, *shape))
    return [*out, length.to(torch.int32)]


def neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: tuple[Tensor, Tensor, Tensor],
    weights: tuple[Tensor, ...],
    norm: tuple[Tensor, Tensor] | None,
    options: Options,
    chunk_size: int,
    initial_state: MemoryState | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    use: Tile | None = None,
) -> tuple[Tensor, MemoryState | None]:
    """As the public operator, of arguments that fit and that kernels cover."""
    H, D = q.shape[2:]
    tokens, longest, lengths = _tokens(k, v, gates, initial_state, cu_seqlens)
    N = len(lengths)
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    if initial_state is None:
        shared = [w.to(acc).contiguous() for w in weights]
        W = [w.expand(N, *w.shape).clone() for w in shared]
        S = [torch.zeros_like(w) for w in W]
    else:
        W = [w.to(acc, copy=True).contiguous() for w in initial_state.weights]
        S = [s.to(acc, copy=True).contiguous() for s in initial_state.momentum]

    size = use or tile(D, weights[0].shape[-1], q.dtype, architecture(q.device))
    chunk = min(chunk_size, 2**31 - 1)  # kernels count a chunk's tokens in int32
    blocks = Blocks.of(chunk, size)
    anchor = (W, S) if blocks.span == 1 else ([x.clone() for x in W], [x.clone() for x in S])
    if blocks.span == 1:
        most = ceil(longest / blocks.tokens)
    else:
        whole, rest = divmod(longest, chunk)
        most = whole * blocks.span + ceil(rest / blocks.tokens)
    total = ceil(len(tokens.k) / blocks.tokens) + N  # blocks of all sequences, at most
    wanted = max(1, min(most, ceil(total / max(N, 1))))
    # A power of two: kernels are compiled for it, and must not be anew for every length.
    group = max(1, min(1 << (wanted - 1).bit_length(), GROUP // size.block))

    packed = _packed(norm, acc)
    problem = Problem(chunk, blocks, group, *options, packed, size)
    asked = q.reshape(-1, H, D).contiguous()
    o = torch.empty_like(asked)
    if len(o) and N:
        scratch = launch.allocate(tokens, W, problem)
        for first in range(0, most, group):
            launch.coefficients(tokens, scratch, first, problem)
            launch.scan(tokens, W, S, anchor, scratch, first, problem)
            launch.retrieve(asked, o, tokens, scratch, first, problem)
    o = o.view(q.shape)
    if not output_final_state:
        return o, None
    shapes = [x.shape[2:] for x in (k, v, *gates)]
    tail = _open_chunks(tokens, lengths, chunk_size, shapes)
    return o, MemoryState(tuple(anchor[0]), tuple(anchor[1]), *tail)


def retrieve(
    q: Tensor,
    weights: tuple[Tensor, ...],
    norm: tuple[Tensor, Tensor] | None,
    options: Options,
    cu_seqlens: Tensor | None,
    use: Tile | None = None,
) -> Tensor:
    """f(q), of arguments that fit, at weights [N, H, d_in, d_out] of every sequence."""
    H, D = q.shape[2:]
    cu, longest = _starts(q, cu_seqlens)
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    o = launch.recall(
        q.reshape(-1, H, D).contiguous(),
        tuple(w.to(q.dtype).contiguous() for w in weights),
        _packed(norm, acc),
        cu,
        longest,
        *options,
        use or tile(D, weights[0].shape[-1], q.dtype, architecture(q.device)),
    )
    return o.view(q.shape)

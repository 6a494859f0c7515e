"""What every backend takes: all sequences end to end, each behind the tail of its open chunk.

Plain PyTorch, so that gradients find their way back, and nothing here waits for a GPU: lengths are
looked at only where they are on the host already, sizes are bounds that hold whatever they are.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .state import MemoryState

Gates = tuple[Tensor, Tensor, Tensor]  # theta, alpha, eta
Norm = tuple[Tensor, Tensor]  # weight and bias, [H, D] each


class Options(NamedTuple):
    """What a memory computes besides its matrices."""

    activation: str
    residual: bool


class Packed(NamedTuple):
    """N sequences, sequence n at `cu[n]` to `cu[n + 1]`. M may be larger than what `cu` ends with.

    Its first `tail[n]` tokens are learned but not asked; the query of the next one is `ask[n]`.
    """

    q: Tensor  # [Mq, H, D]
    k: Tensor  # [M, H, D]
    v: Tensor  # [M, H, D]
    theta: Tensor  # [M, H, G], G is 1 or one per layer
    alpha: Tensor
    eta: Tensor
    weights: list[Tensor]  # per layer [N, H, d_in, d_out], of the dtype that sums have
    momentum: list[Tensor]
    norm: Tensor | None  # [H, 2, D], weight and bias, of that dtype
    cu: Tensor  # [N + 1] int64
    tail: Tensor  # [N] int64
    ask: Tensor  # [N] int64

    def differentiable(self) -> list[Tensor]:
        """All that may have gradients, in order."""
        norm = [] if self.norm is None else [self.norm]
        return [*self[:6], *self.weights, *self.momentum, *norm]

    def like(self, tensors: list[Tensor]) -> Packed:
        """The same with others in the place of what is differentiable."""
        q, k, v, theta, alpha, eta = tensors[:6]
        weights, momentum = _halves(tensors[6 : 6 + 2 * len(self.weights)])
        norm = None if self.norm is None else tensors[-1]
        learned = weights, momentum, norm
        return Packed(q, k, v, theta, alpha, eta, *learned, self.cu, self.tail, self.ask)


class Reading(NamedTuple):
    """Queries of N sequences, sequence n at `cu[n]` to `cu[n + 1]`, and the weights they meet."""

    q: Tensor  # [M, H, D]
    weights: list[Tensor]  # per layer [N, H, d_in, d_out], of the dtype that sums have
    norm: Tensor | None  # [H, 2, D], of that dtype
    cu: Tensor  # [N + 1] int64

    def differentiable(self) -> list[Tensor]:
        """All that may have gradients, in order."""
        return [self.q, *self.weights, *([] if self.norm is None else [self.norm])]

    def like(self, tensors: list[Tensor]) -> Reading:
        """The same with others in the place of what is differentiable."""
        norm = None if self.norm is None else tensors[-1]
        return Reading(tensors[0], tensors[1 : 1 + len(self.weights)], norm, self.cu)


def _halves(tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and momenta."""
    return tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]


def accumulator(x: Tensor) -> torch.dtype:
    """What sums are kept in, whatever is read and returned."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rows(x: Tensor) -> Tensor:
    """[B, T, H, ...] to [B T, H, width], dense."""
    return x.reshape(-1, x.shape[2], *(x.shape[3:] or (1,))).contiguous()


def pack_norm(norm: Norm | None, dtype: torch.dtype) -> Tensor | None:
    return None if norm is None else torch.stack([x.to(dtype) for x in norm], 1)


def bounds(q: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, int]:
    """First token of every sequence and the end of the last, [N + 1]; the most that one has."""
    B, T = q.shape[:2]
    if cu_seqlens is None:
        return torch.arange(B + 1, device=q.device) * T, T
    longest = T
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        longest = max((b - a for a, b in pairwise(cu_seqlens.tolist())), default=0)
    return cu_seqlens.to(q.device, torch.int64), longest


def pack(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    weights: tuple[Tensor, ...],
    norm: Norm | None,
    state: MemoryState | None,
    cu_seqlens: Tensor | None,
) -> tuple[Packed, int]:
    """The operator's arguments packed, and the most tokens that a sequence has."""
    dtype = accumulator(q)
    starts, longest = bounds(q, cu_seqlens)
    lengths, tokens = starts.diff(), [rows(x) for x in (k, v, *gates)]
    if state is None:
        N, zero = lengths.shape[0], torch.zeros((), dtype=dtype, device=q.device)
        first = [w.to(dtype).expand(N, *w.shape) for w in weights]
        momentum = [zero.expand_as(w) for w in first]
        cu, tail = starts, torch.zeros_like(lengths)
    else:
        state = _ordinary(state)
        first = [
            _in_place_of(w, old.to(dtype)) for w, old in zip(weights, state.weights, strict=True)
        ]
        momentum = [s.to(dtype) for s in state.momentum]
        cu, source = _behind_tails(starts, state, tokens[0].shape[0])
        tail = state.length.to(torch.int64)
        tails = (state.k, state.v, state.theta, state.alpha, state.eta)
        tokens = [
            torch.cat([rows(old).to(new.dtype), new]).index_select(0, source)
            for old, new in zip(tails, tokens, strict=True)
        ]
        longest = longest + state.chunk_size - 1
    k, v, theta, alpha, eta = tokens
    learned = first, momentum, pack_norm(norm, dtype)
    return Packed(rows(q), k, v, theta, alpha, eta, *learned, cu, tail, starts[:-1]), longest


def _in_place_of(weights: Tensor, state: Tensor) -> Tensor:
    """A state where weights would have been: their gradient is zero, not missing."""
    if torch.is_grad_enabled() and weights.requires_grad:
        return state + weights[:0].sum()  # the sum of nothing, whatever the weights are
    return state


def _ordinary(state: MemoryState) -> MemoryState:
    """What inference mode made cannot be kept for backward, its copy can. Compilers do not ask."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return state
    return state.map(lambda x: x.clone() if x.is_inference() else x)


def _behind_tails(starts: Tensor, state: MemoryState, count: int) -> tuple[Tensor, Tensor]:
    """Where sequences start with their tails, and the row of (tails, tokens) of every place."""
    N, C = state.k.shape[:2]
    tail = state.length.to(torch.int64)
    cu = torch.nn.functional.pad((starts.diff() + tail).cumsum(0), (1, 0))
    place = torch.arange(N * (C - 1) + count, device=cu.device)  # as many as there may be
    n = torch.searchsorted(cu[1:], place, right=True).clamp(max=N - 1)
    at = place - cu[n]
    source = torch.where(at < tail[n], n * C + at, N * C + starts[n] + at - tail[n])
    return cu, source.where(place < cu[-1], 0)


def pack_open_chunks(state: MemoryState, norm: Norm | None) -> Packed:
    """A state's open chunks as sequences that nobody asks, made whole by tokens that do nothing.

    What fills them up has gates of 0. That clears the momentum, which a reader does not need.
    """
    state = _ordinary(state)
    N, C = state.k.shape[:2]
    there = torch.arange(C, device=state.k.device) < state.length[:, None]  # [N, C]
    k, v, theta, alpha, eta = (
        rows(x.masked_fill(~there.view(N, C, *[1] * (x.dim() - 2)), 0.0))
        for x in (state.k, state.v, state.theta, state.alpha, state.eta)
    )
    dtype, number = accumulator(state.k), torch.arange(N + 1, device=state.k.device)
    weights, momentum = ([x.to(dtype) for x in part] for part in (state.weights, state.momentum))
    return Packed(
        *(k[:0], k, v, theta, alpha, eta),
        *(weights, momentum, pack_norm(norm, dtype)),
        number * C,
        torch.full_like(number[1:], C),
        torch.zeros_like(number[1:]),
    )


def unpack(
    packed: Packed, final: list[Tensor], chunk_size: int, gate_shape: torch.Size
) -> MemoryState:
    """The state after a walk that ended with these weights and momenta."""
    N, M = packed.tail.shape[0], packed.k.shape[0]
    length = packed.cu.diff() % chunk_size
    offset = torch.arange(chunk_size, device=length.device)
    place = (packed.cu[1:, None] - length[:, None] + offset).clamp(max=M - 1)
    there = (offset < length[:, None])[:, :, None, None]

    def tail(x: Tensor) -> Tensor:
        """[M, H, width] to [N, chunk_size, H, width], tokens of the open chunk, then zeros."""
        if M == 0:
            return x.new_zeros(N, chunk_size, *x.shape[1:])
        x = x.index_select(0, place.flatten()).view(N, chunk_size, *x.shape[1:])
        return x.masked_fill(~there, 0.0)

    k, v, *gates = map(tail, packed[1:6])
    theta, alpha, eta = (x.view(N, chunk_size, *gate_shape) for x in gates)
    weights, momentum = map(tuple, _halves(final))
    return MemoryState(weights, momentum, k, v, theta, alpha, eta, length.to(torch.int32))

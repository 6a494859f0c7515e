"""What every backend takes: all sequences in one row, each behind the tail of its open chunk.

Plain PyTorch, so that gradients find their way back, and nothing here waits for a GPU: lengths are
looked at only where they are on the host already, sizes are bounds that hold whatever they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise, repeat
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from .state import MemoryState
from .transforms import values

Gates = tuple[Tensor, Tensor, Tensor]  # theta, alpha, eta
Norm = tuple[Tensor, Tensor]  # weight and bias, [H, D] each


class Options(NamedTuple):
    """What a memory computes besides its matrices."""

    activation: str
    residual: bool
    read: str = "token"  # "chunk": queries read the weights that their chunk starts with


Tokens = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # k, v, theta, alpha, eta


class Packed(NamedTuple):
    """N sequences in order, sequence n at `bounds[n]`. Rows between them are padding.

    Its first `tail[n]` tokens, the open chunk's, update the memory but have no query; the query of
    the next one is `query_start[n]`.
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
    bounds: Tensor  # [N, 2] int64, first token and end
    tail: Tensor  # [N] int64
    query_start: Tensor  # [N] int64

    def differentiable(self) -> list[Tensor]:
        """All that may have gradients, in order."""
        norm = [] if self.norm is None else [self.norm]
        return [self.q, *self.tokens(), *self.weights, *self.momentum, *norm]

    def like(self, tensors: list[Tensor]) -> Packed:
        """The same with others in place of what is differentiable."""
        q, k, v, theta, alpha, eta = tensors[:6]
        weights, momentum = _halves(tensors[6 : 6 + 2 * len(self.weights)])
        norm = None if self.norm is None else tensors[-1]
        memory = weights, momentum, norm
        return Packed(q, k, v, theta, alpha, eta, *memory, self.bounds, self.tail, self.query_start)

    def tokens(self) -> Tokens:
        """What updates the memory."""
        return self.k, self.v, self.theta, self.alpha, self.eta

    def lengths(self) -> Tensor:
        """[N] int64, tokens of every sequence, its tail with them."""
        return self.bounds[:, 1] - self.bounds[:, 0]


class Reading(NamedTuple):
    """Queries of N sequences, sequence n at `cu[n]` to `cu[n + 1]`, and the weights they read."""

    q: Tensor  # [M, H, D]
    weights: list[Tensor]  # per layer [N, H, d_in, d_out], of the dtype that sums have
    norm: Tensor | None  # [H, 2, D], of that dtype
    cu: Tensor  # [N + 1] int64

    def differentiable(self) -> list[Tensor]:
        """All that may have gradients, in order."""
        return [self.q, *self.weights, *([] if self.norm is None else [self.norm])]

    def like(self, tensors: list[Tensor]) -> Reading:
        """The same with others in place of what is differentiable."""
        norm = None if self.norm is None else tensors[-1]
        return Reading(tensors[0], tensors[1 : 1 + len(self.weights)], norm, self.cu)


def _halves(tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and momenta."""
    return tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]


def accumulator(x: Tensor) -> torch.dtype:
    """What sums are kept in, whatever is read and returned."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def dense(x: Tensor) -> Tensor:
    """Contiguous, and aligned as Triton's widest loads want it: kernels know no strides, and are
    compiled anew for a pointer that 16 does not divide."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def rows(x: Tensor) -> Tensor:
    """[B, T, H, ...] to [B T, H, width], dense."""
    return x.reshape(-1, x.shape[2], *(x.shape[3:] or (1,))).contiguous()


def pack_norm(norm: Norm | None, dtype: torch.dtype) -> Tensor | None:
    return None if norm is None else torch.stack([x.to(dtype) for x in norm], 1)


def segments(q: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, int]:
    """First token of every sequence and the end of the last, [N + 1]; the most that one has."""
    B, T = q.shape[:2]
    if cu_seqlens is None:
        return torch.arange(B + 1, device=q.device) * T, T
    longest = T
    if known(cu_seqlens):
        longest = max((b - a for a, b in pairwise(values(cu_seqlens))), default=0)
    return cu_seqlens.to(q.device, torch.int64), longest


def known(lengths: Tensor) -> bool:
    """Whether the values may be looked at: they are on the host, and no compiler is reading."""
    compiling = torch.compiler.is_compiling()
    return lengths.device.type == "cpu" and not compiling and not is_fake(lengths)


def surely(holds: bool) -> bool:
    """What is known of a size; not, where a graph is made for sizes that are not known."""
    if not torch.compiler.is_compiling():
        return holds
    return torch.fx.experimental.symbolic_shapes.statically_known_true(holds)


def without_values(x: Tensor) -> bool:
    """Whether there is nothing but a shape: on the meta device, or in a FakeTensorMode."""
    return x.is_meta or (not torch.compiler.is_compiling() and is_fake(x))


def ends_chunk(state: MemoryState, T: int, cu_seqlens: Tensor | None) -> bool:
    """Whether any sequence may complete a chunk by its next tokens, T of each without cu_seqlens.

    If none does, weights and momenta stay what they are. False only where that is known.
    """
    if not known(state.length):
        return True
    added: Iterable[int] = repeat(T)
    if cu_seqlens is not None:
        if not known(cu_seqlens):
            return True
        added = (b - a for a, b in pairwise(values(cu_seqlens)))
    return any(
        n + more >= state.chunk_size for n, more in zip(values(state.length), added, strict=False)
    )


def one_each(q: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Whether every sequence is given one token, for which its open chunk has room."""
    return q.shape[1] == 1 and cu_seqlens is None


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
    dtype, tokens = accumulator(q), (k, v, *gates)
    starts, longest = segments(q, cu_seqlens)
    if state is None:
        where = torch.stack([starts[:-1], starts[1:]], 1)
        N, zero = where.shape[0], torch.zeros((), dtype=dtype, device=q.device)
        first = [w.to(dtype).expand(N, *w.shape) for w in weights]
        momentum = [zero.expand_as(w) for w in first]
        tail = torch.zeros_like(starts[1:])
        packed = [rows(x) for x in tokens]
    else:
        state = _ordinary(state)
        first = [
            _in_place_of(w, old.to(dtype)) for w, old in zip(weights, state.weights, strict=True)
        ]
        momentum = [s.to(dtype) for s in state.momentum]
        tail = state.length.to(torch.int64)
        join = _write_behind if one_each(q, cu_seqlens) else _copy_behind
        packed, where = join(state, tokens, tail, starts)
        longest = longest + state.chunk_size - 1
    k, v, theta, alpha, eta = packed
    learned = first, momentum, pack_norm(norm, dtype)
    return Packed(rows(q), k, v, theta, alpha, eta, *learned, where, tail, starts[:-1]), longest


def _in_place_of(weights: Tensor, state: Tensor) -> Tensor:
    """A state where weights would have been: their gradient is zero, not missing."""
    if torch.is_grad_enabled() and weights.requires_grad:
        return state + weights[:0].sum()  # the sum of nothing, whatever the weights are
    return state


def _ordinary(state: MemoryState) -> MemoryState:
    """Tensors of inference mode cannot be saved for backward, their copies can."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return state
    return state.map(lambda x: x.clone() if x.is_inference() else x)


def _tails(state: MemoryState) -> Tokens:
    return state.k, state.v, state.theta, state.alpha, state.eta


def _write_behind(
    state: MemoryState, tokens: Tokens, tail: Tensor, starts: Tensor
) -> tuple[list[Tensor], Tensor]:
    """One token of each sequence, in a copy of its open chunk; and the bounds.

    Rows [N chunk_size, H, width], sequence n from n chunk_size on.
    """
    C = state.chunk_size
    here = torch.arange(C, device=tail.device) == tail[:, None]  # [N, C]
    packed = []
    for old, new in zip(_tails(state), tokens, strict=True):
        there = here.view(*here.shape, *[1] * (new.dim() - 2))
        packed.append(rows(torch.where(there, new, old.to(new.dtype))))
    first = starts[:-1] * C
    return packed, torch.stack([first, first + tail + 1], 1)


def _copy_behind(
    state: MemoryState, tokens: Tokens, tail: Tensor, starts: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Any number of tokens, gathered end to end with the tails; and the bounds."""
    N, C = state.k.shape[:2]
    added = [rows(x) for x in tokens]
    cu = torch.nn.functional.pad((starts.diff() + tail).cumsum(0), (1, 0))
    place = torch.arange(N * (C - 1) + added[0].shape[0], device=cu.device)  # as many as may be
    n = torch.searchsorted(cu[1:], place, right=True).clamp(max=N - 1)
    at = place - cu[n]
    source = torch.where(at < tail[n], n * C + at, N * C + starts[n] + at - tail[n])
    source = source.where(place < cu[-1], 0)
    packed = [
        torch.cat([rows(old).to(new.dtype), new]).index_select(0, source)
        for old, new in zip(_tails(state), added, strict=True)
    ]
    return packed, torch.stack([cu[:-1], cu[1:]], 1)


def pack_open_chunks(state: MemoryState, norm: Norm | None) -> Packed:
    """A state's open chunks as sequences without queries, padded to whole chunks.

    Padding has gates of 0. That clears the momentum, which reading does not need.
    """
    state = _ordinary(state)
    N, C = state.k.shape[:2]
    there = torch.arange(C, device=state.k.device) < state.length[:, None]  # [N, C]
    k, v, theta, alpha, eta = (
        rows(x.masked_fill(~there.view(N, C, *[1] * (x.dim() - 2)), 0.0)) for x in _tails(state)
    )
    dtype, first = accumulator(state.k), torch.arange(N, device=state.k.device) * C
    weights, momentum = ([x.to(dtype) for x in part] for part in (state.weights, state.momentum))
    return Packed(
        *(k[:0], k, v, theta, alpha, eta),
        *(weights, momentum, pack_norm(norm, dtype)),
        torch.stack([first, first + C], 1),
        torch.full_like(first, C),
        torch.zeros_like(first),
    )


def unpack(
    packed: Packed, final: list[Tensor], chunk_size: int, gate_shape: torch.Size, in_chunks: bool
) -> MemoryState:
    """The state after a walk that ended with these weights and momenta.

    Args:
        final (list[Tensor]): none, where no sequence has ended a chunk: they are what they were.
        in_chunks (bool): whether rows are open chunks with one more token, see `_write_behind`.
    """
    N, M = packed.tail.shape[0], packed.k.shape[0]
    length = packed.lengths() % chunk_size
    tokens = list(packed.tokens())
    offset = torch.arange(chunk_size, device=length.device)
    if not in_chunks and M == 0:
        tokens = [x.new_zeros(N * chunk_size, *x.shape[1:]) for x in tokens]
    elif not in_chunks:
        place = packed.bounds[:, 1:] - length[:, None] + offset
        place = place.clamp(max=M - 1).flatten()
        tokens = [x.index_select(0, place) for x in tokens]
    tokens = [x.view(N, chunk_size, *x.shape[1:]) for x in tokens]
    if not in_chunks or final or torch.is_grad_enabled():  # padding has no gradient either
        padding = (offset >= length[:, None])[:, :, None, None]
        tokens = [x.masked_fill(padding, 0.0) for x in tokens]
    k, v, *gates = tokens
    theta, alpha, eta = (x.view(N, chunk_size, *gate_shape) for x in gates)
    state = final or [*packed.weights, *packed.momentum]
    weights, momentum = map(tuple, _halves(state))
    return MemoryState(weights, momentum, k, v, theta, alpha, eta, length.to(torch.int32))

"""The operators on the PyTorch backend: arguments to what the walk takes, and results back."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..state import MemoryState
from .autograd import ChunkedMemory, InPlaceOf
from .layout import BlockSize, Layout, block_size
from .network import Network, output
from .scan import Options
from .span import Box, Inputs, compute_dtype, norm_rows

Gates = tuple[Tensor, Tensor, Tensor]  # theta, alpha, eta


def _sequences(q: Tensor, cu_seqlens: Tensor | None) -> tuple[list[int], list[int]]:
    """First token and length of every sequence. On a GPU, cu_seqlens costs a synchronisation."""
    B, T = q.shape[:2]
    if cu_seqlens is None:
        return [i * T for i in range(B)], [T] * B
    ends = cu_seqlens.tolist()
    return ends[:-1], [b - a for a, b in pairwise(ends)]


def _layout(
    q: Tensor,
    cu_seqlens: Tensor | None,
    tails: list[int] | None,
    chunk_size: int,
    block: BlockSize,
) -> tuple[Layout, Tensor | None]:
    """The layout, longest sequence first, and the order of its sequences if it is not theirs."""
    starts, lengths = _sequences(q, cu_seqlens)
    table = 0 if tails is None else chunk_size * len(starts)
    tails = tails or [0] * len(starts)
    order = sorted(range(len(starts)), key=lambda i: -tails[i] - lengths[i])
    pick = lambda x: [x[i] for i in order]  # noqa: E731
    layout = Layout(
        pick(tails), pick(lengths), pick(starts), order, table, chunk_size, block, q.device
    )
    same = order == list(range(len(order)))
    return layout, None if same else torch.tensor(order, device=q.device)


def _joined(tokens: Tensor, tail: Tensor | None = None) -> Tensor:
    """[B, T, H, ...] and [N, C, H, ...] to [N C + B T, H, width], the table of tails first."""
    width = tokens.shape[3] if tokens.dim() == 4 else 1
    flat = tokens.reshape(-1, tokens.shape[2], width)
    if tail is None:
        return flat.contiguous()
    return torch.cat([tail.reshape(-1, tokens.shape[2], width).to(flat.dtype), flat])


def neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    weights: tuple[Tensor, ...],
    norm: tuple[Tensor, Tensor] | None,
    options: Options,
    chunk_size: int,
    initial_state: MemoryState | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, MemoryState | None]:
    """As the public operator, of arguments that fit."""
    old = initial_state
    tails = None if old is None else old.length.tolist()
    block = block_size(chunk_size, q.device)
    layout, order = _layout(q, cu_seqlens, tails, chunk_size, block)
    N, H, dtype = len(layout.lengths), q.shape[2], compute_dtype(q)

    theta, alpha, eta = gates
    inputs = Inputs(
        _joined(q),
        _joined(k, old.k if old else None),
        _joined(v, old.v if old else None),
        _joined(theta, old.theta if old else None),
        _joined(alpha, old.alpha if old else None),
        _joined(eta, old.eta if old else None),
        *(norm or (None, None)),
    )
    if old is None:
        first, momentum = weights, tuple(torch.zeros_like(w) for w in weights)
    else:
        pairs = zip(old.weights, weights, strict=True)
        first, momentum = tuple(InPlaceOf.apply(*pair) for pair in pairs), old.momentum
    state = []
    for W, S in zip(first, momentum, strict=True):
        WS = torch.stack([W.to(dtype), S.to(dtype)], -3)
        WS = WS.expand(N, *WS.shape) if old is None else WS
        WS = WS if order is None else WS.index_select(0, order)
        state.append(WS.reshape(N * H, *WS.shape[-3:]))

    with torch.autocast(q.device.type, enabled=False):
        tensors = (*inputs, *state)
        if not torch.is_grad_enabled():  # nothing is kept then, not even for what has gradients
            tensors = tuple(None if x is None else x.detach() for x in tensors)
        o, *final = ChunkedMemory.apply(layout, options, *tensors)
    o = o.view(q.shape)
    if not output_final_state:
        return o, None

    index, valid, length = layout.tail()
    back = None if order is None else order.argsort()
    restore = lambda x: x if back is None else x.index_select(0, back)  # noqa: E731

    def tail(x: Tensor, shape: torch.Size) -> Tensor:
        if not len(x):  # no token anywhere
            return x.new_zeros(N, chunk_size, *shape)
        out = x.index_select(0, index.flatten()).view(N, chunk_size, *x.shape[1:])
        out = out.masked_fill(~valid[:, :, None, None], 0.0)
        return restore(out.view(N, chunk_size, *shape))

    states = [restore(x.view(N, H, *x.shape[1:])).unbind(2) for x in final]
    return o, MemoryState(
        tuple(W.contiguous() for W, _ in states),
        tuple(S.contiguous() for _, S in states),
        tail(inputs.k, k.shape[2:]),
        tail(inputs.v, v.shape[2:]),
        tail(inputs.theta, theta.shape[2:]),
        tail(inputs.alpha, alpha.shape[2:]),
        tail(inputs.eta, eta.shape[2:]),
        restore(length),
    )


def retrieve(
    q: Tensor,
    weights: tuple[Tensor, ...],
    norm: tuple[Tensor, Tensor] | None,
    options: Options,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """f(q), of arguments that fit, at weights [N, H, d_in, d_out] of every sequence."""
    H, dtype = q.shape[2], compute_dtype(q)
    layout, order = _layout(q, cu_seqlens, None, 64, block_size(64, q.device))
    if order is not None:
        weights = tuple(W.index_select(0, order) for W in weights)

    tokens = _joined(q)
    out = torch.zeros_like(tokens)
    with torch.autocast(q.device.type, enabled=False):
        for span in layout.spans():
            box = Box(span, H, 0)
            network = Network(*options, norm_rows(norm, span.sequences, dtype))
            x = box.queries.take(tokens, dtype).transpose(0, 1)  # [R, g, N, D]
            x = h = x.flatten(1, 2)
            for i, W in enumerate(weights):
                y = torch.bmm(h, W[: span.sequences].flatten(0, 1).to(dtype))
                if i < len(weights) - 1:
                    (h,) = network.activate(y)
            answers = output(y, x, network).unflatten(1, (-1, layout.block.tokens))
            box.queries.put(out, answers.transpose(0, 1))
    return out.view(q.shape)

"""One token of a layer around its memory, by PyTorch's operations: as `kernels.step`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numeric import unit
from ..packing import Packed, accumulator
from ..stepping import Step


def prepare(step: Step, rate: float) -> Packed:
    """The token as a query behind its open chunk, into which it is written."""
    (_, tokens, length, memory), weight = step.state, step.weight
    (N, C, H, D), dtype, depth = tokens[0].shape, tokens[0].dtype, len(memory) // 2
    acc, at, n = accumulator(tokens[0]), length.long(), torch.arange(N, device=length.device)
    q, k, v = (_head(step, i).view(N, H, D).to(dtype) for i in range(3))
    theta, alpha, eta = (
        torch.sigmoid(x.to(acc) + bias.to(acc)).view(N, H, -1)
        for x, bias in zip(step.projected.gates, weight.biases, strict=True)
    )
    for buffer, new in zip(tokens, (k, v, rate * theta, alpha, eta), strict=True):
        buffer[n, at] = new.to(buffer.dtype)
    norm = torch.stack([x.to(acc) for x in weight.norm], 1) if weight.norm else None
    k, v, theta, alpha, eta = (x.view(N * C, H, x.shape[3]) for x in tokens)
    bounds = torch.stack([n * C, n * C + at + 1], 1)
    learned = memory[:depth], memory[depth:], norm
    return Packed(q, k, v, theta, alpha, eta, *learned, bounds, at, n)


def finish(step: Step, o: Tensor, tail: Tensor) -> Tensor:
    """The gated output [N, H D]; what is left of the open chunk."""
    (_, tokens, length, _), (N, H, D) = step.state, o.shape
    C, acc = tokens[0].shape[1], accumulator(o)
    whole = (tail + 1 == C).view(N, 1, 1, 1)
    for buffer in tokens:
        buffer.masked_fill_(whole, 0.0)
    length.copy_((tail + 1) % C)
    scaled = unit(o.to(acc)) * (D**0.5 * step.weight.out_norm.to(acc))
    y = scaled.view(N, H * D) * F.silu(step.projected.gate.to(acc))
    return y.to(o.dtype)


def _head(step: Step, i: int) -> Tensor:
    """A stream convolved with its last inputs, which move on; each head of unit length."""
    _, _, H, D = step.state.tokens[0].shape
    x = step.projected.streams[i]
    y = x.to(accumulator(x))
    if step.weight.filters:
        history, filters = step.state.history[i], step.weight.filters[i]
        past = torch.cat([history, x[:, None]], 1)  # [N, taps, H D]
        y = (past.to(y.dtype) * filters.to(y.dtype).T).sum(1)
        history.copy_(past[:, 1:])
    return unit(F.silu(y).view(-1, H, D))

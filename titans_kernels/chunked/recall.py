"""Reading without learning: `f(q)` at given weights, and its derivative."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..packing import Options, Reading, accumulator
from .block import read, read_backward
from .layout import BlockSize, Layout
from .links import Link, LinkGrad
from .network import Network, NormGrad
from .span import Rows, norm_rows

BLOCK = BlockSize(64, 1, 1)


class _Span(NamedTuple):
    """Queries of the n longest sequences, so many blocks at a time."""

    sequences: int  # n
    places: Rows
    blocks: int
    network: Network

    def take(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[M, H, D] to [R, tokens, D]."""
        return self.places.take(x, dtype).transpose(0, 1).flatten(1, 2)

    def put(self, out: Tensor, x: Tensor) -> None:
        self.places.put(out, x.unflatten(1, (self.blocks, -1)).transpose(0, 1))

    def rows(self, x: Tensor) -> Tensor:
        """[N, H, d_in, d_out] to [R, 1, d_in, d_out], a view."""
        return x[: self.sequences].flatten(0, 1).unsqueeze(1)


def _spans(reading: Reading, layout: Layout, options: Options) -> Iterator[_Span]:
    for span in layout.spans():
        network = Network(
            options.activation, options.residual, norm_rows(reading.norm, span.sequences)
        )
        places = Rows(span.queries, reading.q.shape[1])
        yield _Span(span.sequences, places, span.stop - span.start, network)


def _layout(cu: Tensor) -> Layout:
    bounds = torch.stack([cu[:-1], cu[1:]], 1)
    return Layout.of(bounds, torch.zeros_like(cu[1:]), cu[:-1], BLOCK.tokens, BLOCK)


def recall(reading: Reading, options: Options) -> Tensor:
    """Outputs [M, H, D], made of differentiable operations."""
    layout, dtype = _layout(reading.cu), accumulator(reading.q)
    out = torch.zeros_like(reading.q, memory_format=torch.contiguous_format)
    weights = [layout.sort(w) for w in reading.weights]
    for span in _spans(reading, layout, options):
        links = [Link(span.rows(w)) for w in weights]
        span.put(out, read(span.take(reading.q, dtype), links, span.network))
    return out


def recall_backward(reading: Reading, options: Options, do: Tensor) -> list[Tensor]:
    """Gradients of all that is differentiable."""
    layout, dtype = _layout(reading.cu), accumulator(reading.q)
    heads, width = reading.q.shape[1:]
    weights = [layout.sort(w) for w in reading.weights]
    dq = torch.zeros_like(reading.q, memory_format=torch.contiguous_format)
    dweights = [torch.zeros_like(w, memory_format=torch.contiguous_format) for w in weights]
    norm_grad = None
    if reading.norm is not None:
        norm_grad = NormGrad(*reading.norm.new_zeros(2, len(weights[0]), heads, width))
    for span in _spans(reading, layout, options):
        norm = None
        if norm_grad is not None:
            norm = NormGrad(*(x[: span.sequences].flatten(0, 1) for x in norm_grad))
        dx = read_backward(
            span.take(do, dtype),
            span.take(reading.q, dtype),
            [Link(span.rows(w)) for w in weights],
            span.network,
            [LinkGrad(span.rows(w)) for w in dweights],
            norm,
        )
        span.put(dq, dx)
    dnorm = [] if norm_grad is None else [torch.stack([x.sum(0) for x in norm_grad], 1)]
    return [dq, *map(layout.restore, dweights), *dnorm]

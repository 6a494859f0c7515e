"""A span of blocks as dense boxes: tokens gathered in, results and gradients put back.

Boxes are [g, R, N, width]: g blocks in time, R = sequences x heads, N tokens to a block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..coefficients import Coefficients, coefficients, coefficients_backward
from ..packing import Packed, accumulator
from .block import BlockCoefficients
from .layout import Places, Span


def norm_rows(norm: Tensor | None, sequences: int) -> tuple[Tensor, Tensor] | None:
    """LayerNorm weight and bias, [H, 2, D], of every row, [R, 1, D] each."""
    if norm is None:
        return None
    weight, bias = norm.expand(sequences, *norm.shape).flatten(0, 1).split(1, 1)
    return weight, bias


class Rows:
    """The rows of a box, [g, n, H, N], in a tensor of [tokens x heads] rows."""

    def __init__(self, places: Places, heads: int):
        head = torch.arange(heads, device=places.row.device).unsqueeze(1)
        self.row = places.row.unsqueeze(2) * heads + head
        self.index, self.valid = self.row.flatten(), places.valid
        if self.valid is not None:
            self.valid = self.valid.unsqueeze(2).expand_as(self.row)

    def take(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[M, H, width] to [g, R, N, width], zero where there is no token."""
        g, n, H, N = self.row.shape
        x = x.flatten(0, 1) if len(x) else x.new_zeros(H, x.shape[-1])  # no queries, but a tail
        out = x.index_select(0, self.index).to(dtype)
        if self.valid is not None:
            out = out.masked_fill(~self.valid.reshape(-1, 1), 0.0)
        return out.view(g, n * H, N, x.shape[-1])

    def put(self, out: Tensor, x: Tensor) -> None:
        """[g, R, N, width] into [M, H, width]."""
        x, index = x.to(out.dtype).reshape(-1, out.shape[-1]), self.index
        if self.valid is not None:
            there = self.valid.flatten()
            x, index = x[there], index[there]
        out.view(-1, out.shape[-1]).index_copy_(0, index, x)


class Box:
    """Where a span's tokens and queries come from and go to."""

    def __init__(self, span: Span, heads: int):
        self.tokens = self.queries = Rows(span.tokens, heads)
        if span.queries is not span.tokens:
            self.queries = Rows(span.queries, heads)


class Tables(NamedTuple):
    """The coefficients of a span's blocks; or their gradients. G is 1 or one per layer."""

    ac: Tensor  # [G, g, R, N + 1, 2]
    G: Tensor  # [G, g, R, N + 1, N]
    keep: Tensor  # [G, g, R, 2, 2]
    learn: Tensor  # [G, g, R, N, 2]

    def blocks(self, depth: int) -> list[list[BlockCoefficients]]:
        """Views of every block, one per layer."""
        layers = [
            [BlockCoefficients(*parts) for parts in zip(*(x.unbind() for x in layer), strict=True)]
            for layer in zip(*self, strict=True)
        ]
        layers = layers if len(layers) == depth else layers * depth
        return [list(block) for block in zip(*layers, strict=True)]


class Gates:
    """The gates of a span, and the way from them to tables and from tables' gradients back."""

    def __init__(self, span: Span, box: Box, packed: Packed):
        g, n, H, N = box.tokens.row.shape
        self.valid = None if box.tokens.valid is None else box.tokens.valid.reshape(g, n * H, N)
        gates = torch.cat([packed.theta, packed.alpha, packed.eta], -1)
        gates = box.tokens.take(gates, accumulator(packed.q)).movedim(-1, 0)
        self.theta, self.alpha, self.eta = gates.chunk(3)  # [G, g, R, N] each
        self.moves = span.moves or span.stop > span.start + 1
        if self.moves:
            end = box.tokens.row.new_full((g, n), N) if span.end is None else span.end
            self.end = end.repeat_interleave(H, 1)[None, :, :, None, None]  # [1, g, R, 1, 1]

    def tables(self) -> Tables:
        a, Q, M = coefficients(self.theta, self.alpha, self.eta, self.valid)
        if not self.moves:
            nothing = a.new_zeros(*a.shape[:3], 0, 2)
            return Tables(torch.stack([a, Q[..., 0]], -1), Q[..., 1:], nothing, nothing)
        end = self._end_rows(a)
        rows = torch.cat([Q.gather(-2, end), M.gather(-2, end)], -2)  # [G, g, R, 2, N + 1]
        # W' takes a of W and c of S, S' takes nothing of W and p of S.
        of_W = torch.stack([a.gather(-1, end[..., 0, :1])[..., 0], torch.zeros_like(a[..., 0])], -1)
        return Tables(
            torch.stack([a, Q[..., 0]], -1),
            Q[..., 1:],
            torch.stack([of_W, rows[..., 0]], -1),
            rows[..., 1:].mT.contiguous(),
        )

    def backward(self, grad: Tables) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of theta, alpha and eta, [g, R, N, G] each."""
        da, dc = grad.ac.unbind(-1)
        dQ = torch.cat([dc.unsqueeze(-1), grad.G], -1)
        dM = torch.zeros_like(dQ)
        if self.moves:
            da = self._ends_backward(grad, da, dQ, dM)
        theta, alpha, eta = coefficients_backward(
            self.theta, self.alpha, self.eta, self.valid, Coefficients(da, dQ, dM)
        )
        return theta.movedim(0, -1), alpha.movedim(0, -1), eta.movedim(0, -1)

    def _ends_backward(self, grad: Tables, da: Tensor, dQ: Tensor, dM: Tensor) -> Tensor:
        """What blocks hand on, added to dQ and dM, and to da, which is returned."""
        end = self._end_rows(da)
        rows = torch.cat([grad.keep[..., 1:], grad.learn.mT], -1)  # [G, g, R, 2, N + 1]
        dQ.scatter_add_(-2, end, rows[..., :1, :])
        dM.scatter_add_(-2, end, rows[..., 1:, :])
        return da.scatter_add(-1, end[..., 0, :1], grad.keep[..., 0, :1])

    def _end_rows(self, a: Tensor) -> Tensor:
        """[G, g, R, 1, N + 1]: which row of the coefficients each block hands on."""
        return self.end.expand(*a.shape[:-1], 1, a.shape[-1])

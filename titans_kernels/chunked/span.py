"""A span of blocks as dense boxes: tokens and coefficients gathered in, results and gradients put back.

Boxes are [g, R, N, width]: g blocks in time, R = sequences x heads, N tokens to a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..coefficients import Coefficients, coefficients, coefficients_backward
from .block import BlockCoefficients
from .layout import Span


class Inputs(NamedTuple):
    """Tokens of all sequences in one row; those of tails come first, and have no queries."""

    q: Tensor  # [Mq, H, D]
    k: Tensor  # [M, H, D]
    v: Tensor  # [M, H, D]
    theta: Tensor  # [M, H, G], G is 1 or one per layer
    alpha: Tensor  # [M, H, G]
    eta: Tensor  # [M, H, G]
    norm_weight: Tensor | None  # [H, D]
    norm_bias: Tensor | None  # [H, D]


def compute_dtype(q: Tensor) -> torch.dtype:
    """What everything is computed in, whatever is read and returned."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def norm_rows(
    norm: tuple[Tensor | None, Tensor | None] | None, sequences: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """LayerNorm weight and bias, [H, D] each, of every row, [R, 1, D] each."""
    if norm is None or norm[0] is None or norm[1] is None:
        return None
    weight, bias = (x.to(dtype).repeat(sequences, 1).unsqueeze(1) for x in norm)
    return weight, bias


class _Places(NamedTuple):
    """Where the tokens of a box lie in a tensor of [tokens x heads] rows."""

    index: Tensor  # [g, n, H, N]
    valid: Tensor | None  # likewise; None: every place is a token's

    def take(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[M, H, width] to [g, R, N, width], zero where there is no token."""
        g, n, H, N = self.index.shape
        out = x.flatten(0, 1).index_select(0, self.index.flatten()).to(dtype)
        if self.valid is not None:
            out = out.masked_fill(~self.valid.reshape(-1, 1), 0.0)
        return out.view(g, n * H, N, -1)

    def put(self, out: Tensor, x: Tensor) -> None:
        """[g, R, N, width] into [M, H, width]."""
        x, index = x.to(out.dtype).reshape(-1, out.shape[-1]), self.index.flatten()
        if self.valid is not None:
            there = self.valid.flatten()
            x, index = x[there], index[there]
        out.view(-1, out.shape[-1]).index_copy_(0, index, x)


class Box:
    """Where a span's tokens and queries come from and go to."""

    def __init__(self, span: Span, heads: int, table: int):
        # A token and a head are one row.
        index = span.index.unsqueeze(2) * heads + torch.arange(
            heads, device=span.index.device
        ).unsqueeze(1)
        valid = asks = _per_head(span.valid, heads)
        if table:  # tokens of tails have no queries
            asks = _per_head(span.index >= table, heads)
            asks = asks if valid is None else asks & valid
        self.tokens = _Places(index, valid)
        at = index - table * heads
        self.queries = _Places(at if asks is None else at.where(asks, 0), asks)


def _per_head(mask: Tensor | None, heads: int) -> Tensor | None:
    return None if mask is None else mask.unsqueeze(2).expand(-1, -1, heads, -1)


@dataclass
class Tables:
    """The coefficients of a span's blocks; or their gradients, of the same shapes."""

    values: Coefficients  # [G, g, R, ...]
    end_a: Tensor  # [G, g, R]          the row of a, Q and M that a block hands on
    end_Q: Tensor  # [G, g, R, N + 1]
    end_M: Tensor  # [G, g, R, N + 1]

    def block(self, i: int, depth: int) -> list[BlockCoefficients]:
        """Views of block i, one per layer."""
        parts = (self.values.a, self.values.Q, self.end_a, self.end_Q, self.end_M)
        layers = [BlockCoefficients(*(x[g, i] for x in parts)) for g in range(len(self.end_a))]
        return layers if len(layers) == depth else layers * depth

    def zeros_like(self) -> Tables:
        return Tables(
            Coefficients(*(torch.zeros_like(x) for x in self.values)),
            *(torch.zeros_like(x) for x in (self.end_a, self.end_Q, self.end_M)),
        )


class Gates:
    """The gates of a span, and the way from them to tables and from tables' gradients back."""

    def __init__(self, span: Span, box: Box, inputs: Inputs):
        g, n, H, N = box.tokens.index.shape
        self.valid = None if box.tokens.valid is None else box.tokens.valid.reshape(g, n * H, N)
        self.gates = [
            box.tokens.take(x, compute_dtype(inputs.q)).movedim(-1, 0)
            for x in (inputs.theta, inputs.alpha, inputs.eta)
        ]  # [G, g, R, N] each
        end = span.index.new_full((g, n), N) if span.end is None else span.end
        self.end = end.repeat_interleave(H, 1)[None, :, :, None, None]  # [1, g, R, 1, 1]

    def tables(self) -> Tables:
        values = coefficients(*self.gates, self.valid)
        end = self.end.expand(*values.a.shape[:-1], 1, values.a.shape[-1])
        return Tables(
            values,
            values.a.gather(-1, end[..., 0, :1])[..., 0],
            values.Q.gather(-2, end)[..., 0, :],
            values.M.gather(-2, end)[..., 0, :],
        )

    def backward(self, grad: Tables) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of theta, alpha and eta, [g, R, N, G] each."""
        a, Q, M = grad.values
        end = self.end.expand(*a.shape[:-1], 1, a.shape[-1])
        a.scatter_add_(-1, end[..., 0, :1], grad.end_a.unsqueeze(-1))
        Q.scatter_add_(-2, end, grad.end_Q.unsqueeze(-2))
        M.scatter_add_(-2, end, grad.end_M.unsqueeze(-2))
        theta, alpha, eta = coefficients_backward(*self.gates, self.valid, grad.values)
        return theta.movedim(0, -1), alpha.movedim(0, -1), eta.movedim(0, -1)

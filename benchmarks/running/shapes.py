"""Sizes of a benchmark and the floating-point operations that they cost.

A unit is 2 D hidden FLOP per token and head: one product of a token with one of the memory's two
matrices. On a CPU a block of tokens is one chunk of 16 to 64, or an even part of a longer one, all
anchored at the first state of the chunk:

    keys      x W_1, h W_2, and the error back through W_2           3 units
    queries   two layers, W and S                                    4
    update    two layers, W and S                                    4
    pairs     q X^T and its product with D, two layers               2 block (2 D + 2 hidden) FLOP
    state     a block hands on (W, S), two layers                    8 / block units

and forward with backward 44 units, 11 of which compute the forward again, four times the pairs and
four times the state. That is what this implementation does, not the least that could be done, and
only in matrix products: what is left of a machine's ceiling went into everything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

FORWARD, BOTH = "forward", "forward+backward"


@dataclass(frozen=True)
class Shape:
    """Sizes: B sequences of T tokens, H heads of size D, memories of one hidden layer."""

    T: int
    chunk: int = 16
    B: int = 1
    H: int = 6
    D: int = 64
    expansion: int = 4

    @property
    def dim(self) -> int:
        return self.H * self.D

    @property
    def hidden(self) -> int:
        return self.expansion * self.D

    @property
    def checked(self) -> int:
        """Tokens of the prefix compared with the definition: a chunk and half of another."""
        return min(self.T, self.chunk + self.chunk // 2)


def operator_flop(shape: Shape, mode: str) -> int:
    """Of `neural_memory` on a CPU, for chunks of 16 and more."""
    assert shape.chunk >= 16, "shorter chunks share a block"
    block = ceil(shape.chunk / ceil(shape.chunk / 64))
    unit = 2 * shape.D * shape.hidden
    pairs = 2 * block * (2 * shape.D + 2 * shape.hidden)
    state = 8 * unit // block
    units, others = (44, 4) if mode == BOTH else (11, 1)
    return shape.B * shape.T * shape.H * (units * unit + others * (pairs + state))


def layer_flop(shape: Shape, mode: str) -> int:
    """Of the layer: the operator, five projections [dim, dim] and three [dim, H]."""
    projections = 2 * shape.dim * (5 * shape.dim + 3 * shape.H)
    times = 3 if mode == BOTH else 1
    return operator_flop(shape, mode) + times * shape.B * shape.T * projections


def reading_flop(shape: Shape, mode: str) -> int:
    """Of `retrieve`, forward: two layers."""
    assert mode == FORWARD
    return shape.B * shape.T * shape.H * 2 * 2 * shape.D * shape.hidden


def attention_flop(shape: Shape, mode: str) -> int:
    """Of causal attention: half of two products of [T, T], and five in the backward pass."""
    products = 7 if mode == BOTH else 2
    return products * shape.B * shape.H * shape.T**2 * shape.D

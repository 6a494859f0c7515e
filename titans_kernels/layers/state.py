"""What the layers carry from one call to the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..state import MemoryState, State, registered


@registered
@dataclass(eq=False)
class LayerState(State):
    """What `NeuralMemory` and `TitansLMM` carry.

    Args:
        memory (MemoryState): the learned weights, their momentum and the open chunk.
        convolution (tuple[Tensor, ...]): the last inputs of the convolutions of q, k and v, each
            [N, conv_size - 1, heads * dim_head]; empty in a layer without convolutions.
    """

    memory: MemoryState
    convolution: tuple[Tensor, ...]


@registered
@dataclass(eq=False)
class ProjectionState(State):
    """What the projection of queries onto keys carries.

    Args:
        projection (Tensor): [N, H, D, D], the sum of k k^T / |k|^2 over the tokens since the last
            border, float32 at least.
        position (Tensor): [N] int32, tokens since the last reset, 0 to reset_every.
    """

    projection: Tensor
    position: Tensor


@registered
@dataclass(eq=False)
class TNTState(LayerState):
    """What `TitansTNT` carries.

    Args:
        memory (MemoryState): of the global memory.
        convolution (tuple[Tensor, ...]): as in `LayerState`.
        local (tuple[MemoryState, ...]): of the local memories.
        projections (tuple[ProjectionState, ...]): of their queries: one for all with
            project="shard", one of each with "chunk", none with None.
    """

    local: tuple[MemoryState, ...]
    projections: tuple[ProjectionState, ...]


@registered
@dataclass(eq=False)
class WindowState(State):
    """What sliding-window attention carries: the tokens that the next one still sees.

    Args:
        keys, values (Tensor): [N, window - 1, heads * dim_head], the last token last; zeros where
            a sequence has not had as many. Keys are kept without their rotation.
        length (Tensor): [N] int32, tokens there: 0 to window - 1.
    """

    keys: Tensor
    values: Tensor
    length: Tensor


@registered
@dataclass(eq=False)
class HybridState(State):
    """What `TitansMAG` and `TitansMAL` carry.

    Args:
        memory (LayerState): of the memory; a `TNTState` where it has local ones.
        attention (WindowState): of the attention.
    """

    memory: LayerState
    attention: WindowState


@registered
@dataclass(eq=False)
class ContextState(State):
    """What `TitansMAC` carries.

    Args:
        memory (LayerState): the memory now, M_t.
        past (LayerState): the memory with which the open segment began, M_{t-1}, which its tokens
            read; its convolution is that of their queries.
        keys, values (Tensor): [N, 2, segment, heads * dim_head] of the open segment, retrieved
            tokens and its own; zeros where it is not filled yet. Keys without their rotation.
        length (Tensor): [N] int32, tokens in the open segment: 0 to segment - 1.
    """

    memory: LayerState
    past: LayerState
    keys: Tensor
    values: Tensor
    length: Tensor


S = TypeVar("S")


def choose(rows: Tensor, state: S, other: S) -> S:
    """The rows [N] of one state where true, of another where not."""

    def pick(x: Tensor, y: Tensor) -> Tensor:
        return torch.where(rows.view(-1, *[1] * (x.dim() - 1)), x, y)

    return pytree.tree_map(pick, state, other)


def concatenate(states: list[Any]) -> Any:
    """One state of all their sequences."""
    return pytree.tree_map(lambda *parts: torch.cat(parts), *states)


def divide(state: S, first: int) -> tuple[S, S]:
    """The state of the first sequences, and of the others."""
    leaves, spec = pytree.tree_flatten(state)
    one, other = zip(*(x.split([first, len(x) - first]) for x in leaves), strict=True)
    return pytree.tree_unflatten(one, spec), pytree.tree_unflatten(other, spec)

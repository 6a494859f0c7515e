"""Pieces of a batch of memories: some of its rows and some of its heads."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..layers.state import concatenate
from ..state import MemoryState

# The dimension of the heads in the tensors of all states, by their names. In those of the layers
# the heads are concatenated, in the last.
_HEADS = {
    **dict.fromkeys(("weights", "momentum", "projection"), 1),
    **dict.fromkeys(("k", "v", "theta", "alpha", "eta"), 2),
    **dict.fromkeys(("convolution", "keys", "values"), -1),
}


def dimension_of_heads(path: tuple[Any, ...], x: Tensor) -> int | None:
    """Of a state's tensor, found there by this path; None where it has no heads."""
    name = [key.name for key in path if isinstance(key, pytree.GetAttrKey)][-1]
    return _HEADS[name] % x.dim() if name in _HEADS else None


class Piece(NamedTuple):
    rows: slice
    heads: slice

    def of_tokens(self, x: Tensor) -> Tensor:
        """Of [B, T, H, ...]."""
        return x[self.rows, :, self.heads]

    def of_state(self, state: MemoryState) -> MemoryState:
        def part(path: tuple[Any, ...], x: Tensor) -> Tensor:
            dim, rows = dimension_of_heads(path, x), x[self.rows]
            return rows if dim is None else rows.movedim(dim, 0)[self.heads].movedim(0, dim)

        return pytree.tree_map_with_path(part, state)


def divide(sequences: int, heads: int, count: int, packed: bool) -> list[list[Piece]]:
    """About `count` pieces, at most one for each row and head: lists of rows, of heads each.

    Args:
        packed: sequences are in one row, which is not divided.
    """
    n = 1 if packed else max(1, min(sequences, count))
    m = min(heads, max(1, count // n))
    rows = [slice(None)] if packed else _slices(sequences, n)
    return [[Piece(row, head) for head in _slices(heads, m)] for row in rows]


def _slices(size: int, count: int) -> list[slice]:
    bounds = [size * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(bounds)]


def choose(count: int | None, ranks: int, work: int, device: torch.device) -> int:
    """How many pieces: given, or four for each rank that waits.

    A GPU runs one memory on each multiprocessor: fewer do not take it less time.

    Args:
        work: memories, sequences times heads.
    """
    if count is not None:
        return count
    most = work
    if device.type == "cuda":
        most = work // torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(4 * (ranks - 1), most))


def join_tokens(parts: list[list[Tensor]]) -> Tensor:
    return torch.cat([torch.cat(row, 2) for row in parts])


def join_states(parts: list[list[MemoryState]]) -> MemoryState:
    """The state of all pieces."""

    def join(path: tuple[Any, ...], *heads: Tensor) -> Tensor:
        dim = dimension_of_heads(path, heads[0])
        return heads[0] if dim is None or len(heads) == 1 else torch.cat(heads, dim)

    rows = [pytree.tree_map_with_path(join, *row) for row in parts]
    return rows[0] if len(rows) == 1 else concatenate(rows)

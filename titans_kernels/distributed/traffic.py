"""What sharded layers send, on paper: bytes that do not depend on the length, and those that do."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ..layers import NeuralMemory, TitansLMM, TitansMAC, TitansMAG, TitansMAL
from ..layers.attention import WindowAttention
from ..layers.local import TNTMemory
from .messages import HEADER
from .pieces import divide

INT = 4  # bytes of a length


class Bytes(NamedTuple):
    forward: int
    backward: int

    def __add__(self, other: tuple[int, ...]) -> Bytes:  # type: ignore[override]
        return Bytes(self.forward + other[0], self.backward + other[1])


def of_length(
    layer: nn.Module,
    rows: int,
    dtype: torch.dtype,
    pieces: int = 1,
    packed: bool = False,
    at_reset: bool = False,
) -> Bytes:
    """Bytes that a rank sends in a call of a layer under `ShardLength`.

    Forward to the rank behind it, backward to the one before it; whatever the number of tokens, and
    without a state that goes to all ranks.

    Args:
        layer: as it is on a rank: with the heads that it has there.
        rows: sequences whose states are sent: all, or with state="none" the one that is cut.
        dtype: of the layer.
        pieces: as given to `ShardLength`.
        packed: whether the sequences are in one row.
        at_reset: whether the border is a reset of local memories, of which nothing is then sent.
    """
    e = dtype.itemsize
    if isinstance(layer, TitansMAC):
        inner, segment = layer.heads * layer.dim_head, layer.segment
        memories = [*_memories(layer.memory, e), *_projections(layer.memory, e)]
        floats = 2 * (sum(size for size, _ in memories) + _history(layer.memory, e))
        floats += 2 * 2 * segment * inner * e
        # Of the memory, of that of the segment before, and the length of the segment.
        counts = 2 * sum(count for _, count in memories) + 1
        return Bytes(HEADER + rows * (floats + counts * INT), rows * floats)
    found = Bytes(HEADER, 0)
    memory = layer if isinstance(layer, NeuralMemory) else layer.memory
    assert isinstance(memory, NeuralMemory)
    history = rows * _history(memory, e)
    found += Bytes(history, history)
    cut = divide(rows, memory.heads, pieces, packed)
    times = max(len(row) for row in cut)  # that the counts of a row are sent, once with each piece
    of_global, *of_local = _memories(memory, e)
    for size, count in [of_global] if at_reset else [of_global, *of_local]:
        found += Bytes(rows * (size + count * times * INT), rows * size)
    for size, count in [] if at_reset else _projections(memory, e):
        found += Bytes(rows * (size + count * INT), rows * size)
    if isinstance(layer, (TitansMAG, TitansMAL)):
        window = rows * _window(layer.attention, e)
        found += Bytes(window + INT * rows, window)
    elif not isinstance(layer, (NeuralMemory, TitansLMM)):
        raise TypeError(f"layer: got {type(layer).__name__}, takes a NeuralMemory or a block")
    return found


def of_heads(layer: nn.Module, rows: int, tokens: int, dtype: torch.dtype) -> Bytes:
    """Bytes of the tensors that the ranks of `ShardHeads` sum, in calls without a past.

    In a ring of R ranks each sends 2 (R - 1) / R of them.

    Args:
        tokens: of a row, persistent ones of `layer` not among them.
    """
    dim, outputs = layer.dim, rows * tokens
    if isinstance(layer, TitansMAC):
        raise TypeError("layer: got TitansMAC, whose sums depend on its segments")
    inputs = outputs
    if isinstance(layer, (TitansMAG, TitansMAL)):
        outputs, inputs = 2 * outputs, 2 * inputs
    size = int(dim) * dtype.itemsize  # type: ignore[arg-type]
    return Bytes(outputs * size, inputs * size)


def _memories(memory: NeuralMemory, e: int) -> list[tuple[int, int]]:
    """Of a sequence and each of its memories: bytes of numbers, and how many counts of tokens.

    Numbers are weights and momentum, and the open chunk's keys, values and gates.
    """
    wide = max(e, 4)
    matrices = 2 * sum(a * b for a, b in memory.shapes) * wide
    gates = memory.depth if memory.per_layer_gates else 1
    token = 2 * memory.dim_head * e + 3 * gates * wide
    local = memory.local_chunks if isinstance(memory, TNTMemory) else ()
    chunks = [(memory.chunk_size, 1), *((chunk, 2) for chunk in local)]
    return [(memory.heads * (matrices + chunk * token), counts) for chunk, counts in chunks]


def _projections(memory: NeuralMemory, e: int) -> list[tuple[int, int]]:
    """The same of the projections of its queries."""
    if not isinstance(memory, TNTMemory) or memory.project is None:
        return []
    count = 1 if memory.project == "shard" else len(memory.local_chunks)
    return [(memory.heads * memory.dim_head**2 * max(e, 4), 1)] * count


def _history(memory: NeuralMemory, e: int) -> int:
    taps = max(0, memory.conv_size - 1)
    return 3 * taps * memory.heads * memory.dim_head * e


def _window(attention: WindowAttention, e: int) -> int:
    return 2 * (attention.window - 1) * attention.heads * attention.dim_head * e

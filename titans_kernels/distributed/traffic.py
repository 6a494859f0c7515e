"""What sharded layers send, on paper: bytes that do not depend on the length, and those that do."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ..layers import NeuralMemory, TitansLMM, TitansMAC, TitansMAG, TitansMAL
from ..layers.attention import WindowAttention
from .messages import HEADER
from .pieces import divide

INT = 4  # bytes of a length


class Bytes(NamedTuple):
    forward: int
    backward: int

    def __add__(self, other: tuple[int, ...]) -> Bytes:  # type: ignore[override]
        return Bytes(self.forward + other[0], self.backward + other[1])


def of_length(
    layer: nn.Module, rows: int, dtype: torch.dtype, pieces: int = 1, packed: bool = False
) -> Bytes:
    """Bytes that a rank sends in a call of a layer under `ShardLength`.

    Forward to the rank behind it, backward to the one before it; whatever the number of tokens, and
    without a state that goes to all ranks.

    Args:
        layer: as it is on a rank: with the heads that it has there.
        rows: sequences.
        dtype: of the layer.
        pieces: as given to `ShardLength`.
        packed: whether the sequences are in one row.
    """
    e = dtype.itemsize
    if isinstance(layer, TitansMAC):
        inner, segment = layer.heads * layer.dim_head, layer.segment
        floats = 2 * (_memory(layer.memory, e) + _history(layer.memory, e))
        floats += 2 * 2 * segment * inner * e
        # Three lengths: of the memory, of that of the segment before, and of the segment.
        return Bytes(HEADER + rows * (floats + 3 * INT), rows * floats)
    found = Bytes(HEADER, 0)
    memory = layer if isinstance(layer, NeuralMemory) else layer.memory
    assert isinstance(memory, NeuralMemory)
    history = rows * _history(memory, e)
    state = rows * _memory(memory, e)
    cut = divide(rows, memory.heads, pieces, packed)
    lengths = INT * rows * max(len(row) for row in cut)
    found += Bytes(history + state + lengths, history + state)
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


def _memory(memory: NeuralMemory, e: int) -> int:
    """Of a sequence: weights and momentum, and the open chunk's keys, values and gates."""
    wide = max(e, 4)
    matrices = sum(a * b for a, b in memory.shapes)
    gates = memory.depth if memory.per_layer_gates else 1
    chunk = memory.chunk_size * (2 * memory.dim_head * e + 3 * gates * wide)
    return memory.heads * (2 * matrices * wide + chunk)


def _history(memory: NeuralMemory, e: int) -> int:
    taps = max(0, memory.conv_size - 1)
    return 3 * taps * memory.heads * memory.dim_head * e


def _window(attention: WindowAttention, e: int) -> int:
    return 2 * (attention.window - 1) * attention.heads * attention.dim_head * e

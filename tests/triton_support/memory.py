"""What one launch may touch of memory, and which program touched it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]

SEVERAL = -1  # instead of a program's number
POISON_LIMIT = 2**28  # bytes; larger tensors stay untouched, so that their pages do
_POISON = {
    torch.float64: 0x7FFEDEDEDEDEDEDE,
    torch.int64: 0x7FFEDEDEDEDEDEDE,
    torch.float32: 0x7FDEDEDE,
    torch.int32: 0x7FDEDEDE,
    torch.bfloat16: 0x7FDE,
    torch.float16: 0x7FDE,
}
_INTEGER = {8: torch.int64, 4: torch.int32, 2: torch.int16}
_POISON_OF_SIZE = {dtype.itemsize: pattern for dtype, pattern in _POISON.items()}


def poison(tensor: Tensor) -> None:
    """Fill with a value that marks what is uninitialised: a NaN of its own, or a huge integer."""
    if tensor.dtype in _POISON and tensor.numel() * tensor.itemsize <= POISON_LIMIT:
        _bits(tensor).fill_(_POISON[tensor.dtype])


def poisoned(tensor: Tensor) -> int:
    """How many elements are uninitialised."""
    if tensor.dtype not in _POISON or tensor.numel() * tensor.itemsize > POISON_LIMIT:
        return 0
    return int((_bits(tensor) == _POISON[tensor.dtype]).sum())


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view(_INTEGER[tensor.itemsize])


def is_poison(values: Array, floating: bool) -> Array:
    """Which of some loaded values are uninitialised; small integers may be anything."""
    if values.dtype.itemsize < (2 if floating else 4):
        return np.zeros(values.shape, bool)
    bits = np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")
    return bits == _POISON_OF_SIZE[values.dtype.itemsize]


class Allocation:
    """One tensor's memory during one launch: the views that are arguments, and a shadow.

    The shadow holds an entry a unit, the smallest element of any argument in this memory: the
    program that last stored there, when, and who loaded. Zero is none, so an entry that is not
    touched costs no memory.
    """

    def __init__(self, arguments: list[tuple[str, Tensor]]) -> None:
        storage = arguments[0][1].untyped_storage()
        self.base, self.bytes = storage.data_ptr(), storage.nbytes()
        self.name = " = ".join(name for name, _ in arguments)
        self.unit = min(tensor.itemsize for _, tensor in arguments)
        units = self.bytes // self.unit
        self.valid = self._inside([tensor for _, tensor in arguments], units)
        self.stored_by, self.loaded_by, self.atomic_by = (np.zeros(units, np.int32) for _ in "123")
        self.stored_at = np.zeros(units, np.int64)
        self._lane = np.empty(units, np.int32)

    def _inside(self, tensors: list[Tensor], units: int) -> Array | None:
        """Which units belong to a view; None where all do."""
        if any(t.is_contiguous() and t.numel() * t.itemsize == self.bytes for t in tensors):
            return None
        inside = np.zeros(units, bool)
        for t in tensors:
            each = t.itemsize // self.unit
            np.lib.stride_tricks.as_strided(
                inside[t.storage_offset() * each :],
                (*t.shape, each),
                (*(s * each for s in t.stride()), 1),
            )[...] = True
        return inside

    def outside(self, offsets: Array, size: int) -> Array:
        """Which accesses, at these offsets in bytes, touch what belongs to no argument."""
        bad = (offsets < 0) | (offsets + size > self.bytes)
        if self.valid is not None and not bad.any():
            bad = ~self.valid[self.units(offsets, size)].reshape(len(offsets), -1).all(1)
        return bad

    def units(self, offsets: Array, size: int) -> Array:
        """The units of accesses of `size` bytes, one access after the other."""
        first = offsets // self.unit
        return (first[:, None] + np.arange(max(size // self.unit, 1))).reshape(-1)

    def conflicting(self, at: Array, values: Array) -> Array:
        """Which lanes of one store another lane overwrites with something else."""
        lanes = np.arange(len(at), dtype=np.int32)
        self._lane[at] = lanes
        winner = self._lane[at]
        bits = np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")
        return (winner != lanes) & (bits != bits[winner])

"""Tiles: how much of the work one program holds, as data."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch


@dataclass(frozen=True)
class Tile:
    """Sizes of the scan and of retrieve.

    Args:
        block (int): tokens to a block at most, a power of 2 from 16 on.
        slice (int): hidden units at a time, likewise.
        scan_warps, read_warps (int): warps to a program.
    """

    block: int = 64
    slice: int = 64
    scan_warps: int = 4
    read_warps: int = 4

    def __post_init__(self) -> None:
        for name in ("block", "slice"):
            value = getattr(self, name)
            if value < 16 or value & (value - 1):
                raise ValueError(f"{name}: got {value}, takes a power of 2 from 16 on")


def tile(head_dim: int, hidden: int, dtype: torch.dtype) -> Tile:
    """The tile for a memory: compiled without spills for D up to 128, see benchmarks."""
    return Tile(scan_warps=8 if head_dim > 128 else 4, read_warps=8 if head_dim > 128 else 4)


@dataclass(frozen=True)
class Blocks:
    """How a chunk size falls into blocks: whole chunks to a block, or a chunk over several."""

    tokens: int  # to a block
    chunks: int  # in a block, 1 where a chunk spans several
    span: int  # blocks to a chunk, 1 where a block holds several

    @classmethod
    def of(cls, chunk_size: int, tile: Tile) -> Blocks:
        if chunk_size <= tile.block:
            chunks = tile.block // chunk_size
            return cls(chunks * chunk_size, chunks, 1)
        span = ceil(chunk_size / tile.block)
        return cls(ceil(chunk_size / span), 1, span)

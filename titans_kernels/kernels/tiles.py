"""Tiles: how much of the work one program holds, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil

import torch


@dataclass(frozen=True)
class Schedule:
    """How a kernel is compiled.

    Args:
        warps (int): to a program, a power of 2.
        stages (int): loads of a loop in flight, where the loop allows it.
    """

    warps: int = 4
    stages: int = 1

    def __post_init__(self) -> None:
        if self.warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"warps: got {self.warps}, takes a power of 2 up to 16")
        if self.stages < 1:
            raise ValueError(f"stages: got {self.stages}, takes 1 and more")

    def options(self) -> dict[str, object]:
        """For a launch. Fusing a product with a sum is said here: Triton's default changes."""
        return dict(num_warps=self.warps, num_stages=self.stages, enable_fp_fusion=True)


@dataclass(frozen=True)
class Tile:
    """Sizes of the passes and how each is compiled.

    Args:
        block (int): tokens to a block at most, a power of 2 from 16 on.
        slice (int): hidden units at a time, likewise.
        queries (int): tokens of a block that one program answers at most, likewise.
        scan, retrieve, recall (Schedule): of the kernel of that name.
    """

    block: int = 64
    slice: int = 64
    queries: int = 64
    scan: Schedule = Schedule()
    retrieve: Schedule = Schedule()
    recall: Schedule = Schedule()

    def __post_init__(self) -> None:
        for name in ("block", "slice", "queries"):
            value = getattr(self, name)
            if value < 16 or value & (value - 1):
                raise ValueError(f"{name}: got {value}, takes a power of 2 from 16 on")
        if self.scan.stages != 1:
            # A pipelined load may run ahead of the store that it waits for.
            raise ValueError(f"scan: got {self.scan.stages} stages, takes 1")
        object.__setattr__(self, "queries", min(self.queries, self.block))

    @property
    def coefficients(self) -> Schedule:
        return Schedule(1 if self.block <= 64 else 2)


_4, _8 = Schedule(4), Schedule(8)
_4x2, _8x2 = Schedule(4, 2), Schedule(8, 2)

# Head dimensions up to the first number take the tile. Beside it, of scan, retrieve and recall:
# registers and, where a thread has any, bytes of stack (Triton 3.9; `python -m benchmarks.static`).
_HALF = {
    # sm_80's also fit sm_86, sm_89 and sm_120, which have 99 KiB of shared memory to a program.
    "sm_80": (
        (64, Tile(64, 32, 32, scan=_4, retrieve=_4x2, recall=_4x2)),  # 240, 255, 166
        (128, Tile(64, 32, 32, scan=_8, retrieve=_8x2, recall=_8x2)),  # 255 and 8, 255, 174
        (256, Tile(32, 32, 32, scan=_8, retrieve=_8x2, recall=_8x2)),  # 255, 255 and 136, 169
    ),
    "sm_90": (
        (64, Tile(64, 64, 64, scan=_4, retrieve=_8x2, recall=_4x2)),  # 225, 214, 128
        (128, Tile(64, 64, 64, scan=_8, retrieve=_8x2, recall=_8x2)),  # 229, 249, 105
        (256, Tile(64, 64, 32, scan=_8, retrieve=_8, recall=_8x2)),  # 253, 255 and 8, 181
    ),
    "sm_100": (
        (64, Tile(64, 64, 64, scan=_4, retrieve=_8x2, recall=_4x2)),  # 223, 172, 121
        (128, Tile(64, 64, 64, scan=_8, retrieve=_8x2, recall=_8x2)),  # 200, 174, 120
        (256, Tile(64, 64, 64, scan=_8, retrieve=_8, recall=_8x2)),  # 230, 255, 255
    ),
    # Up to 512 registers, for 4 warps: D 64: 258, 258, 160; 128: 332, 304, 154; 256: 348, 430, 276.
    "gfx942": ((256, Tile(64, 64, 64, scan=_4, retrieve=_4, recall=_4)),),
}
ARCHITECTURES = tuple(_HALF)

# float32 is for comparing, not for speed: unless tf32 is allowed, NVIDIA's GPUs multiply it without
# tensor cores, operands in registers. Figures of sm_90; the others differ little.
_SINGLE = (
    (64, Tile(32, 32, 32, scan=_8, retrieve=_8, recall=_8)),  # 250, 216, 64
    (128, Tile(16, 16, 16, scan=_8, retrieve=_8, recall=_8)),  # 255 and 160, 173, 48
    (256, Tile(16, 16, 16, scan=_8, retrieve=_8, recall=_8)),  # 255 and 1304, 255 and 264, 64
)


def tile(head_dim: int, hidden: int, dtype: torch.dtype, architecture: str) -> Tile:
    """The tile of a memory's sizes, on one of ARCHITECTURES; any other has the default."""
    rows = _HALF.get(architecture)
    if rows is None:
        return Tile()
    if dtype.itemsize > 2:
        rows = _SINGLE
    size = next(size for most, size in rows if head_dim <= most)
    return replace(size, slice=min(size.slice, max(16, 1 << (hidden - 1).bit_length())))


def architecture(device: torch.device) -> str:
    """Which of ARCHITECTURES a device is, or is most like; "cpu" where kernels are interpreted."""
    return "cpu" if device.type == "cpu" else _architecture(device.index)


@lru_cache
def _architecture(index: int | None) -> str:
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(index)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


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

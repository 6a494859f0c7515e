"""Tiles: how much of the work one program holds, as data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil
from typing import Any

import torch

SMALLEST = 16  # tokens of a block, at least


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
        queries (int): of a block, to one program at most, likewise.
        rows (int): of the head dimension at a time, backwards, likewise.
        columns (int): of a state's gradient at a time, where it is handed from block to block,
            likewise; a slice at most.
        scan, retrieve, recall, *_backward (Schedule): of the kernel of that name.
    """

    block: int = 64
    slice: int = 64
    queries: int = 64
    rows: int = 64
    columns: int = 32
    scan: Schedule = Schedule()
    retrieve: Schedule = Schedule()
    recall: Schedule = Schedule()
    retrieve_backward: Schedule = Schedule(8)
    scan_backward: Schedule = Schedule(8)
    inputs_backward: Schedule = Schedule(8)

    def __post_init__(self) -> None:
        for name in ("block", "slice", "queries", "rows", "columns"):
            value = getattr(self, name)
            if value < 16 or value & (value - 1):
                raise ValueError(f"{name}: got {value}, takes a power of 2 from 16 on")
        if self.scan.stages != 1:
            # A pipelined load may run ahead of the store that it waits for.
            raise ValueError(f"scan: got {self.scan.stages} stages, takes 1")
        object.__setattr__(self, "queries", min(self.queries, self.block))

    def fitting(self, longest: int, chunk_size: int = 1) -> Tile:
        """One whose blocks are no larger than the longest sequence: a token is no block of 128.

        They still hold the chunk that they held.
        """
        tokens = 1 << (max(longest, chunk_size, SMALLEST) - 1).bit_length()
        return self if tokens >= self.block else replace(self, block=tokens)

    @property
    def coefficients(self) -> Schedule:
        return Schedule(1 if self.block <= 64 else 2)


_4, _8 = Schedule(4), Schedule(8)
_4x2, _8x2 = Schedule(4, 2), Schedule(8, 2)
_4x3, _8x3 = Schedule(4, 3), Schedule(8, 3)
# Backwards; forward passes have 4 warps where a row does not name them.
_BACKWARD_4: dict[str, Any] = dict.fromkeys(
    ("retrieve_backward", "scan_backward", "inputs_backward"), _4
)
ANY = 2**63

# Head dimensions and chunks up to the first two numbers take the tile; chunks set the width of what
# scan holds. Chosen by the warp instructions that are executed for a token, as far as a thread
# spills little (`python -m benchmarks.machine_code.static`; figures in tests/static_ceilings.json).
# A row that `benchmarks.machine_code.tune` wrote says what it measured instead.
_HALF = {
    # sm_80's also fit sm_86, sm_89 and sm_120, which have 99 KiB of shared memory to a program.
    "sm_80": (
        # 8 warps, or slices and rows of 32, would compute products twice.
        (64, ANY, Tile(64, 64, 32, 64, columns=16, **_BACKWARD_4)),
        # So do the 8 of scan, of which 4 spill more.
        (128, ANY, Tile(64, 64, 32, 64, columns=16, scan=_8, **_BACKWARD_4)),
        (256, ANY, Tile(32, 32, 16, 32, scan=_8, retrieve=_8x2, recall=_8x2)),
    ),
    "sm_90": (
        # 8 warps would compute products of 64 rows twice.
        (64, ANY, Tile(64, 64, 64, 64, recall=_4x2, **_BACKWARD_4)),
        # 8 warps find rows for all of them; 4 of scan_backward spill 752 bytes.
        (128, ANY, Tile(64, 128, 64, 128, scan=_8, retrieve=_8, recall=_8)),
        # Slices of 64 take a third more instructions in scan, 8 warps two thirds more backwards.
        (256, 32, Tile(64, 128, 16, 64, scan=_8, retrieve=_8, recall=_8, scan_backward=_4)),
        # Scan of a block of 64 spills, as it holds a chunk of 64.
        (256, ANY, Tile(32, 64, 16, 64, scan=_8, retrieve=_8, recall=_8x2)),
    ),
    "sm_100": (
        # 4 warps have fewer instructions than 8, and no product is computed twice either way.
        (128, ANY, Tile(64, 64, 64, 64, recall=_4x2, **_BACKWARD_4)),
        # Retrieve of 64 queries spills.
        (256, 32, Tile(64, 64, 32, 64, scan=_8, retrieve=_8, recall=_8x2)),
        # A block of 64 takes more tensor memory than there is, and traps (3.6)
        (256, ANY, Tile(32, 64, 32, 64, scan=_8, retrieve=_8, recall=_8x2)),
    ),
    # Up to 512 registers, for 4 warps; of 8, scan_backward spills.
    "gfx942": (
        (64, ANY, Tile(64, 64, 64, 64, **_BACKWARD_4)),
        # Scan of slices of 64 has all 512 registers with Triton 3.6, and spills.
        (128, ANY, Tile(64, 32, 64, 64, **_BACKWARD_4)),
        # So has scan of a block of 64.
        (256, ANY, Tile(32, 64, 32, 64, **_BACKWARD_4)),
    ),
}
ARCHITECTURES = tuple(_HALF)

# Ahead of these rows where no backward pass follows: of states, which are most of what scan moves,
# blocks of 128 tokens move half. Scan and retrieve; recall, alike in both, takes the rows above.
_FORWARD: dict[str, tuple[tuple[int, int, Tile], ...]] = {
    "sm_80": (),
    "sm_90": (
        # As in training: blocks of 128 take a fifth more instructions.
        (64, ANY, Tile(64, 64, 64, 64, recall=_4x2, **_BACKWARD_4)),
        # One in fifteen more instructions than in blocks of 64, where memory decides.
        (128, 32, Tile(128, 128, 64, 128, scan=_8, retrieve=_8, recall=_8)),
        # Fewer.
        (128, 64, Tile(128, 128, 64, 128, scan=_8, retrieve=_8, recall=_8)),
    ),
    "sm_100": (),
    "gfx942": (),
}

# float32 is for comparing, not for speed: unless tf32 is allowed, NVIDIA's GPUs multiply it without
# tensor cores, operands in registers.
_SINGLE = (
    (64, ANY, Tile(32, 32, 32, 64, scan=_8, retrieve=_8, recall=_8)),
    (128, ANY, Tile(16, 16, 16, 64, scan=_8, retrieve=_8, recall=_8)),
    (256, ANY, Tile(16, 16, 16, 64, scan=_8, retrieve=_8, recall=_8)),
)

_chosen: ContextVar[Tile | None] = ContextVar("tile", default=None)


def chosen() -> Tile | None:
    """What `using` says here."""
    return _chosen.get()


@contextmanager
def using(choice: Tile | None) -> Iterator[None]:
    """Calls inside take this tile, in this thread alone, and so does their backward pass wherever
    it runs; with None, the one that ships. For tests and for tuning."""
    token = _chosen.set(choice)
    try:
        yield
    finally:
        _chosen.reset(token)


def tile(
    head_dim: int,
    hidden: int,
    dtype: torch.dtype,
    architecture: str,
    chunk_size: int = 16,
    backward: bool = True,
) -> Tile:
    """The tile of a memory's sizes, on one of ARCHITECTURES; any other has the default.

    Training takes one tile for all its passes, what is never differentiated perhaps another.
    """
    if (choice := chosen()) is not None:
        return choice
    rows = _HALF.get(architecture)
    if rows is None:
        return Tile()
    if dtype.itemsize > 2:
        rows = _SINGLE
    elif not backward:
        rows = (*_FORWARD[architecture], *rows)
    size = next(size for D, chunk, size in rows if head_dim <= D and chunk_size <= chunk)
    size = replace(size, slice=min(size.slice, max(16, 1 << (hidden - 1).bit_length())))
    return size if architecture != "sm_90" or _fences() else _unpipelined(size)


@lru_cache
def _fences() -> bool:
    """Whether Triton puts a proxy fence between asynchronous copies and the products of them.

    Before 3.8 it leaves that out ahead of a pipelined loop's first wgmma, which may then read
    shared memory from before the copy.
    """
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)


def _unpipelined(size: Tile) -> Tile:
    """Nothing is copied asynchronously where loops have one stage."""
    retrieve, recall = (replace(x, stages=1) for x in (size.retrieve, size.recall))
    return replace(size, retrieve=retrieve, recall=recall)


def rounded(longest: int, chunk_size: int) -> int:
    """Lengths that are rounded to one are computed by the same kernels, if they have few blocks.

    The smallest are the whole chunks that the smallest block holds, or one chunk.
    """
    least = max(SMALLEST // chunk_size, 1) * chunk_size
    return least if longest <= least else 1 << (longest - 1).bit_length()


def architecture(device: torch.device) -> str:
    """Which of ARCHITECTURES a device is, or is most like; "cpu" where kernels are interpreted."""
    return _architecture(device.index) if device.type == "cuda" else "cpu"


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

"""A launch: memory in windows of its own, every program of the grid, and what was found."""

from __future__ import annotations

import ctypes
import re
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .build import core, operations
from .decode import Program

COUNTERS = [
    "instr",
    "mma",
    "races_shared",
    "races_global",
    "races_grid",
    "same_shared",
    "uninitialised",
    "nc",
    "pending",
    "misaligned",
    "barriers",
    "proxy",
    "divergent",
    "poisoned",
    "same_global",
    "proxy_copies",
    "uninitialised_global",
]
# What no launch may show. `same_*` are two warps that write the same value: replicated tiles.
FAULTS = [
    "races_shared",
    "races_global",
    "races_grid",
    "uninitialised",
    "nc",
    "pending",
    "misaligned",
    "proxy",
    "proxy_copies",
    "uninitialised_global",
]
UNWRITTEN = 0x7FA57FA5  # what uninitialised global memory holds: core/memory.h
SHADOW = 32  # bytes of the core's struct Sh, one for two bytes of memory
_ticks = (ctypes.c_uint32 * 2)(0, 0)  # epochs and programs so far


class Fault(Exception):
    """The launch stopped: an access out of bounds, a barrier that not every warp reached."""


def unwritten(x: torch.Tensor) -> torch.Tensor:
    """A dense tensor, as if nobody had written it: the core finds who reads it."""
    half = torch.int16 if x.itemsize == 2 else torch.int32
    x.view(half).fill_(UNWRITTEN if half == torch.int32 else UNWRITTEN & 0xFFFF)
    return x


@dataclass(frozen=True)
class Memory:
    """A pointer into a storage on the CPU: where it starts, its bytes, the pointer's offset."""

    start: int
    size: int
    offset: int = 0


@dataclass
class Found:
    """Of one launch: COUNTERS, executed instructions of a warp by operation, notes.

    What was compiled, the launch's integers and its programs are for counts along loops.
    """

    kernel: str
    counts: dict[str, int]
    operations: Counter = field(default_factory=Counter)
    notes: str = ""
    compiled: Any = None
    integers: Sequence[int] = ()
    programs: int = 0

    @property
    def faults(self) -> dict[str, int]:
        return {name: self.counts[name] for name in FAULTS if self.counts[name]}


def execute(
    program: Program,
    grid: Sequence[int],
    arguments: Sequence[Memory | int | float],
    shared: int,
    *,
    seed: int = 0,
    late: bool = True,
    poison: bool = False,
    limit: int = 10**9,
) -> Found:
    """Run a grid.

    Args:
        program (Program): decoded.
        grid (sequence of int): up to three sizes.
        arguments (sequence): as the kernel's parameters, scratch pointers included.
        shared (int): bytes of dynamic shared memory.
        seed (int): of the order of warps and programs.
        late (bool): asynchronous operands land as late as a wait allows, else at once.
        poison (bool): a load that races reads NaN.
        limit (int): instructions of a warp between two barriers.

    Raises:
        Fault: with the text of the instruction at which the launch stopped.
    """
    windows = {x.start: x.size for x in arguments if isinstance(x, Memory)}
    starts = list(windows)
    # A window a storage, 1 TiB apart: no access strays from one tensor into another unseen.
    values = [
        ((starts.index(x.start) + 1) << 40) + x.offset if isinstance(x, Memory) else x
        for x in arguments
    ]
    shadows = [np.zeros((size // 2 + 2) * SHADOW, np.uint8) for size in windows.values()]
    n = max(len(starts), 1)
    hosts = (ctypes.c_void_p * n)(*starts)
    sizes = (ctypes.c_uint64 * n)(*windows.values())
    shadow = (ctypes.c_void_p * n)(*(x.ctypes.data for x in shadows))
    parameters = _packed(program, values)
    sides = np.array((*grid, 1, 1)[:3], np.uint32)
    stats, counts = (ctypes.c_uint64 * len(COUNTERS))(), (ctypes.c_uint64 * len(operations()))()
    error, log = ctypes.create_string_buffer(500), ctypes.create_string_buffer(16_000)
    registers = _sized(program, sides)
    stopped = core().launch(
        _pointer(program.code),
        len(program.code),
        _pointer(program.operands),
        _pointer(registers),
        len(registers),
        program.warps,
        _pointer(program.special),
        hosts,
        sizes,
        shadow,
        len(starts),
        int(shared),
        (ctypes.c_char * len(parameters)).from_buffer(parameters),
        _pointer(sides),
        ctypes.c_uint64(seed),
        int(late) | 2 * int(poison),
        _ticks,
        ctypes.c_uint64(limit),
        stats,
        counts,
        error,
        len(error),
        log,
        len(log),
    )
    if stopped:
        raise Fault(f"{program.name}: " + _described(program, error.value.decode()))
    notes = [_described(program, line) for line in log.value.decode().splitlines()]
    executed = Counter({name: counts[i] for name, i in operations().items() if counts[i]})
    return Found(program.name, dict(zip(COUNTERS, stats, strict=True)), executed, "\n".join(notes))


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


def _packed(program: Program, values: Sequence[int | float]) -> bytearray:
    """The parameters' bytes, little endian."""
    if len(values) != len(program.parameters):
        raise ValueError(f"{program.name}: {len(values)} values, {len(program.parameters)} taken")
    packed = bytearray(16 + sum(size + 8 for _, _, size in program.parameters))
    for (_, at, size), value in zip(program.parameters, values, strict=True):
        if isinstance(value, float):
            packed[at : at + size] = struct.pack("<f" if size == 4 else "<d", value)
        else:
            packed[at : at + size] = (int(value) % 2 ** (8 * size)).to_bytes(size, "little")
    return packed


def _sized(program: Program, sides: np.ndarray) -> np.ndarray:
    registers = program.registers.copy()
    for name, at in program.sizes.items():
        axis = "xyz".index(name[-1])
        threads = program.warps * 32 if axis == 0 else 1
        registers[at : at + 32] = sides[axis] if name.startswith("%nctaid") else threads
    return registers


def _described(program: Program, note: str) -> str:
    """A note of the core, with the lines of PTX and Python that it speaks of."""
    lines = [int(x) for x in re.findall(r"line (\d+)", note) if 0 < int(x) <= len(program.lines)]
    return note + "".join(
        f"\n    [{program.source(x)}] {program.lines[x - 1].strip()[:100]}" for x in lines
    )

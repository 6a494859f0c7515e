"""What the package is run on: tiles that ship, and small shapes over the table's edges."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One memory and how it is called; one batch row."""

    name: str
    T: int = 80
    D: int = 16
    hidden: int = 32
    chunk: int = 16
    depth: int = 2
    H: int = 2
    norm: bool = True
    tile: tuple[int, ...] | None = None  # block, slice, queries, rows; None: what ships
    lengths: tuple[int, ...] | None = None  # of packed sequences
    pieces: tuple[int, ...] | None = None  # a state is passed between them
    seeds: int = 1
    backward: bool = True


SMALL = (
    Case("two layers", tile=(32, 32), seeds=6),
    Case("depth 1", hidden=16, depth=1, tile=(32, 32), seeds=6),
    Case("three layers", depth=3, tile=(32, 32), seeds=6),
    Case("chunk over blocks", T=90, chunk=40, tile=(16, 16), norm=False, seeds=6),
    Case("short chunks", T=70, chunk=4, tile=(16, 16), seeds=6),
    Case("padded head dimension", T=70, D=48, hidden=64, tile=(64, 32, 16, 16), seeds=6),
    Case("packed", T=97, lengths=(65, 1, 31), tile=(32, 32), seeds=6),
    Case("initial state", T=80, pieces=(33, 47), tile=(32, 32), seeds=6),
    Case("decode", T=44, pieces=(41, 1, 1, 1), tile=(32, 32), seeds=6, backward=False),
)
SHIPPED = (
    Case("D 64", T=128, D=64, hidden=256, seeds=6),
    Case("D 64, forward only", T=128, D=64, hidden=256, backward=False, seeds=3),
    Case("D 64, depth 1", T=100, D=64, hidden=64, depth=1, seeds=3),
    Case("D 64, chunk 64", T=150, D=64, hidden=256, chunk=64, seeds=3),
    Case("D 64, chunk 100", T=230, D=64, hidden=256, chunk=100, seeds=3),
    Case("D 64, packed", T=150, D=64, hidden=256, lengths=(70, 17, 63), seeds=3),
    Case("D 64, initial state", T=100, D=64, hidden=256, pieces=(37, 63), seeds=3),
    Case("D 128", T=90, D=128, hidden=512, seeds=2),
)
CASES = {case.name: case for case in (*SMALL, *SHIPPED)}
# Full blocks, and as many as a launch has programs for: what is executed can be counted beforehand.
COUNTED = {
    case.name: case
    for case in (
        Case("counted", T=512, H=1, tile=(32, 32)),
        Case("D 64, counted", T=1024, H=1, D=64, hidden=256),
    )
}
# The rows of docs/machine.md, by architecture and dtype: with the Triton that torch brings, and
# with another one.
ROWS = {
    "sm_80": {
        "bfloat16": tuple(CASES),
        "float16": ("two layers", "packed", "D 64", "D 64, packed"),
        "float32": ("D 64",),
    },
    "sm_90": {
        "bfloat16": tuple(case.name for case in SHIPPED),
        "float16": ("D 64",),
    },
}
SECOND = {
    "sm_80": {"bfloat16": ("two layers", "decode", "D 64", "D 64, chunk 64", "D 64, packed")},
    "sm_90": {"bfloat16": ("D 64", "D 64, packed", "D 128")},
}

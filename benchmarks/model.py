"""What kernels cost on paper, and the time that this predicts: `python -m benchmarks.model`

FLOP and bytes of a token and head are those of the passes as they are written, for matrices D by
hidden, N tokens to a block and chunks of C:

    scan          20 D hidden + 6 N (D + hidden) FLOP: 12 of the 20 for keys, 8 for the update
                  k, v and, in float32, D_2: 8 D; X and, in float32, D_1: 6 hidden; G's rows at
                  chunks and at the end: 4 N / C + 8; W and S read and written in float32, passed
                  on in bfloat16: 40 D hidden / N
    retrieve      8 D hidden + 4 N (D + hidden) FLOP
                  q, k, o and, in float32, D_2: 10 D; X and, in float32, D_1: 6 hidden;
                  G, a, c: 4 N + 8; W and S: 8 D hidden / N
    recall        4 D hidden FLOP
                  q, o: 4 D; W, once for T tokens: 4 D hidden / T
    coefficients  gates: 6; G, a, c and the row at the end: 4 N + 16

The bytes have to pass between the pass and the GPU's memory: a tensor once a block, nothing for
what caches can give again. A pass takes the slower of the two; scan, whose chunks wait for each
other and which has one program to a sequence and head, at least its chunks' latency, in as many
turns as its programs need. Rates were measured on an H200; the latency of a chunk is a guess that a
measurement has to replace.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import product
from math import ceil
from pathlib import Path
from typing import NamedTuple

import torch

from titans_kernels.kernels.tiles import Blocks, tile

from .shapes import FORWARD, Shape

H200_FLOPS, H200_BYTES = 790e12, 4.3e12  # a second
SMS = 132
CHUNK_LATENCY = 4e-6  # seconds, at 64 by 256; estimated


class Cost(NamedTuple):
    """Of a token and head."""

    flop: float
    bytes: float

    @property
    def floor(self) -> float:
        """Nanoseconds on an H200."""
        return 1e9 * max(self.flop / H200_FLOPS, self.bytes / H200_BYTES)


def cost(name: str, D: int, hidden: int, block: int, chunk: int, T: int) -> Cost:
    """The formulas above."""
    matrix, wide = D * hidden, D + hidden
    return {
        "scan": Cost(
            20 * matrix + 6 * block * wide,
            8 * D + 6 * hidden + 4 * block / chunk + 8 + 40 * matrix / block,
        ),
        "retrieve": Cost(
            8 * matrix + 4 * block * wide,
            10 * D + 6 * hidden + 4 * block + 8 + 8 * matrix / block,
        ),
        "recall": Cost(4 * matrix, 4 * D + 4 * matrix / T),
        "coefficients": Cost(0, 6 + 4 * block + 16),
    }[name]


def forward_flop(shape: Shape, mode: str, arch: str = "sm_90") -> int | None:
    """Of the kernels' passes over all tokens; None for what is not written down."""
    if mode != FORWARD:
        return None
    block = tile(shape.D, shape.hidden, torch.bfloat16, arch, shape.chunk).block
    sizes = (shape.D, shape.hidden, block, shape.chunk, shape.T)
    once = sum(cost(name, *sizes).flop for name in ("scan", "retrieve"))
    return int(shape.B * shape.T * shape.H * once)


def forward_bytes(shape: Shape, arch: str = "sm_90") -> float:
    """Of the same passes."""
    block = tile(shape.D, shape.hidden, torch.bfloat16, arch, shape.chunk).block
    sizes = (shape.D, shape.hidden, block, shape.chunk, shape.T)
    once = sum(cost(name, *sizes).bytes for name in ("coefficients", "scan", "retrieve"))
    return shape.B * shape.T * shape.H * once


def predict(shape: Shape, arch: str = "sm_90") -> dict[str, float]:
    """Seconds of each pass of a forward call, by name."""
    size = tile(shape.D, shape.hidden, torch.bfloat16, arch, shape.chunk)
    sizes = (shape.D, shape.hidden, size.block, shape.chunk, shape.T)
    tokens = shape.B * shape.T * shape.H
    seconds = {
        name: 1e-9 * tokens * cost(name, *sizes).floor
        for name in ("coefficients", "scan", "retrieve")
    }
    blocks = Blocks.of(shape.chunk, size)
    steps = ceil(shape.T / blocks.tokens) * blocks.chunks
    wider = max(1.0, shape.D * shape.hidden / (64 * 256))
    turns = ceil(shape.B * shape.H / SMS)
    return seconds | {"scan": max(seconds["scan"], turns * steps * wider * CHUNK_LATENCY)}


def measured(results: Path) -> dict[tuple[Shape, str], float]:
    """Seconds of ours on kernels by shape and mode, from recorded runs on an H200."""
    found = {}
    for path in sorted(results.glob("*h200*.json")):
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            ours = row["case"] == "operator" and row["provider"] == "titans_kernels"
            if ours and row["median_s"] is not None:
                found[Shape(**row["shape"]), row["mode"]] = row["median_s"]
    return found


def table(results: Path) -> list[str]:
    """Predictions over T, batch and chunk, each beside its measurement if there is one."""
    there = measured(results)
    head = ("B x H x D", "T", "chunk", "coefficients", "scan", "retrieve", "sum ms", "measured ms")
    rows = [" ".join(f"{x:>12}" for x in head)]
    for D, B, T, chunk in product((64, 128), (1, 8), (2048, 8192, 32768), (16, 64)):
        shape = Shape(T, chunk, B, 16, D)
        parts = predict(shape)
        real = there.get((shape, FORWARD))
        cells = [f"{B} x 16 x {D}", T, chunk, *(f"{1e3 * x:.3f}" for x in parts.values())]
        cells += [f"{1e3 * sum(parts.values()):.3f}", "-" if real is None else f"{1e3 * real:.3f}"]
        rows.append(" ".join(f"{x!s:>12}" for x in cells))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    print(*table(parser.parse_args(argv).results), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

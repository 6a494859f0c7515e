"""What kernels cost on paper, and the time that this predicts.

Run `python -m benchmarks.machine_code.model`.

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

With "+" they are computed again for the backward pass, and leave it more, in float32: scan X W_1,
e, y, and W unrounded: 4 D + 8 hidden + 8 D hidden / N; retrieve not its outputs but its products
and what of the last is W's and S's, and, rounded, h: 10 D + 6 hidden; coefficients p and P:
4 N + 4. Then

    retrieve_backward     4 D hidden + N (4 D + 6 hidden) FLOP
                          do: 2 D; D_2, y and its parts and gradient, dD_2: 24 D; h, X: 4 hidden;
                          z and its gradient, dX_2: 12 hidden; G, dG, a, c, da, dc: 8 N + 16; the
                          LayerNorm's gradient: 8 D / N; W_2, S_2: 4 D hidden / N
    inputs_backward q     4 D hidden + N (6 D + 4 hidden) FLOP
                          q, k, do, dq: 8 D; dX_1: 4 D; D_1, dz, dD_1: 12 hidden; a, c, G, and
                          da, dc, dG read and written: 12 N + 24; W_1, S_1: 4 D hidden / N
    scan_backward         44 D hidden + 12 N (D + hidden) FLOP: 16 of the 44 from the gradient of
                          the state to inputs and errors, 8 for chunks, 20 for that gradient
                          q, k, v, dv: 8 D; D_2, y, dX_1, dD_2 and queries' gradient: 28 D; X, h,
                          de: 6 hidden; z, e, D_1, dX_2, dD_1, queries' gradient: 32 hidden; a, c
                          and the row at the end, and its gradient: 24; rows of G, dG, da, dc at
                          chunks: (12 N + 16) / C; W unrounded, S and the last layer's W rounded:
                          14 D hidden / N; their gradients, read and written: 32 D hidden / N
    inputs_backward k     4 D hidden + N (4 D + 2 hidden) FLOP
                          k, dk, dX_1: 8 D; D_1, dz: 8 hidden; da, dc, dG: 4 N + 8; rows of a,
                          c, G at chunks; W_1, S_1: 4 D hidden / N
    coefficients_backward gates and their gradients: 10; a, c, p, da, dc of queries and of keys, the
                          gradient at the end: 36; G, P, dG of both: 16 N

which is 56 D hidden, twice forward's 28, and N (26 D + 24 hidden) FLOP, forward computed again not
among them. Products of N by N and N by C tokens are whole here, as they are done: of those with
history, half is masked. A block's first chunk is counted like the others, though scan leaves out S
and history there.

The bytes have to pass between the pass and the GPU's memory: a tensor once a block, nothing for
what caches can give again. Of scan's and scan_backward's, 32 D hidden / N are the running state
and its gradient, which stay in the L2 cache where those of all programs fit.

A pass takes the slowest of its products, its bytes to memory and through L2, and, counted in
machine code (`hardware`), the time in which multiprocessors issue its instructions and L1 serves
them. A program of scan or scan_backward is all that its multiprocessor has, or one of two, and a
warp waits for its own results: a scheduler with one warp issues an instruction every CYCLES cycles
at best.
CYCLES is a guess that a measurement has to replace. In a forward pass the retrieve of a group runs
beside the scan of the next one: what scan leaves idle hides it, but that of the last group.
Launches cost the host LAUNCH seconds each, in parallel with the GPU's work: a CUDA graph hides
them.

TNT is predicted as its two memories one after the other: the local one as so many more sequences
as there are shards of 2,048 tokens, the global one in chunks of 2,048, whose queries read matrices
that are there (recall, and twice its cost backwards) instead of a block's history.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from math import ceil
from pathlib import Path
from typing import NamedTuple

import torch

from titans_kernels.kernels.operator import GROUP, TURNS
from titans_kernels.kernels.tiles import Blocks, Tile, tile

from .. import RESULTS
from ..running.shapes import BOTH, FORWARD, Shape
from .hardware import GPU, GPUS, H200, demand
from .published import delta_rule, sdpa

CYCLES = 2.0  # between two instructions of a warp; a guess
LAUNCH = 3e-6  # seconds of the host, a kernel
FORWARD_PASSES = ("coefficients", "scan", "retrieve")
BACKWARD_PASSES = (
    *(f"{name}+" for name in FORWARD_PASSES),
    "retrieve_backward",
    "inputs_backward q",
    "scan_backward",
    "inputs_backward k",
    "coefficients_backward",
)
PASSES = {FORWARD: FORWARD_PASSES, BOTH: (*FORWARD_PASSES, *BACKWARD_PASSES)}


class Cost(NamedTuple):
    """Of a token and head."""

    flop: float
    bytes: float
    running: float = 0.0  # of these bytes, those that may stay in L2

    @property
    def floor(self) -> float:
        """Nanoseconds on an H200, of products and bytes alone."""
        return 1e9 * max(self.flop / H200.flops, self.bytes / H200.bytes)


def cost(name: str, D: int, hidden: int, block: int, chunk: int, T: int) -> Cost:
    """The formulas above."""
    matrix, wide = D * hidden, D + hidden
    states = matrix / block
    if name.endswith("+"):
        once = cost(name[:-1], D, hidden, block, chunk, T)
        more = {
            "scan": 4 * D + 8 * hidden + 8 * states,
            "retrieve": 10 * D + 6 * hidden,
            "coefficients": 4 * block + 4,
        }
        return Cost(once.flop, once.bytes + more[name[:-1]], once.running)
    return {
        "scan": Cost(
            20 * matrix + 6 * block * wide,
            8 * D + 6 * hidden + 4 * block / chunk + 8 + 40 * states,
            32 * states,
        ),
        "retrieve": Cost(
            8 * matrix + 4 * block * wide,
            10 * D + 6 * hidden + 4 * block + 8 + 8 * states,
        ),
        "recall": Cost(4 * matrix, 4 * D + 4 * matrix / T),
        "coefficients": Cost(0, 6 + 4 * block + 16),
        "short": Cost(  # of one chunk, whose keys read W alone; states are read in float32
            22 * matrix + 4 * block * wide,
            18 * D + 22 * hidden + 4 * block + 8 + 32 * states,
        ),
        "retrieve_backward": Cost(
            4 * matrix + block * (4 * D + 6 * hidden),
            26 * D + 16 * hidden + 8 * block + 16 + 8 * D / block + 4 * states,
        ),
        "scan_backward": Cost(
            44 * matrix + 12 * block * wide,
            36 * D + 38 * hidden + 24 + (12 * block + 16) / chunk + 46 * states,
            32 * states,
        ),
        "inputs_backward q": Cost(
            4 * matrix + block * (6 * D + 4 * hidden),
            12 * D + 12 * hidden + 12 * block + 24 + 4 * states,
        ),
        "inputs_backward k": Cost(
            4 * matrix + block * (4 * D + 2 * hidden),
            8 * D + 8 * hidden + 4 * block + 8 + (4 * block + 8) / chunk + 4 * states,
        ),
        "coefficients_backward": Cost(0, 10 + 36 + 16 * block),
    }[name]


def _tile(shape: Shape, mode: str, arch: str) -> Tile:
    return tile(shape.D, shape.hidden, torch.bfloat16, arch, shape.chunk, mode == BOTH)


def forward_flop(shape: Shape, mode: str, arch: str = "sm_90") -> int | None:
    """Of the kernels' passes over all tokens; None for other modes."""
    if mode != FORWARD:
        return None
    block = _tile(shape, FORWARD, arch).block
    sizes = (shape.D, shape.hidden, block, shape.chunk, shape.T)
    once = sum(cost(name, *sizes).flop for name in ("scan", "retrieve"))
    return int(shape.B * shape.T * shape.H * once)


def forward_bytes(shape: Shape, arch: str = "sm_90") -> float:
    """Of the same passes."""
    block = _tile(shape, FORWARD, arch).block
    sizes = (shape.D, shape.hidden, block, shape.chunk, shape.T)
    once = sum(cost(name, *sizes).bytes for name in ("coefficients", "scan", "retrieve"))
    return shape.B * shape.T * shape.H * once


def predict(
    shape: Shape, mode: str = FORWARD, arch: str = "sm_90", gpu: GPU = H200
) -> dict[str, float]:
    """Seconds of each pass of a call, by name."""
    return {name: _seconds(name, shape, mode, arch, gpu) for name in PASSES[mode]}


def call(shape: Shape, mode: str = FORWARD, arch: str = "sm_90", gpu: GPU = H200) -> float:
    """Seconds of a call: of its passes, without what the next group's scan hides of retrieve."""
    return sum(predict(shape, mode, arch, gpu).values()) - hidden(shape, mode, arch, gpu)


def hidden(shape: Shape, mode: str, arch: str = "sm_90", gpu: GPU = H200) -> float:
    """Seconds of retrieve, of all groups but the last, that fit into what scan leaves idle."""
    groups = ceil(shape.T * TURNS / GROUP)
    scan, retrieve = (_seconds(name, shape, mode, arch, gpu) for name in ("scan", "retrieve"))
    idle = scan - _busy("scan", shape, mode, arch, gpu)
    return (1 - 1 / groups) * min(retrieve, idle)


def _busy(name: str, shape: Shape, mode: str, arch: str, gpu: GPU) -> float:
    """Of a pass whose programs never wait."""
    size = _tile(shape, mode, arch)
    each = cost(name, shape.D, shape.hidden, size.block, shape.chunk, shape.T)
    needs = demand(name, shape.D, shape.hidden, shape.chunk, mode == BOTH)
    tokens, programs = shape.B * shape.T * shape.H, shape.B * shape.H
    held = each.running if programs * 16 * shape.D * shape.hidden <= gpu.cache_size else 0.0
    return max(
        tokens * each.flop / gpu.flops,
        tokens * (each.bytes - held) / gpu.bytes,
        tokens * each.bytes / gpu.cache,
        tokens * needs.bytes / gpu.near,
        tokens * needs.instructions / gpu.issue,
    )


def _seconds(name: str, shape: Shape, mode: str, arch: str, gpu: GPU) -> float:
    seconds = _busy(name, shape, mode, arch, gpu)
    if name.startswith("scan"):
        size, programs = _tile(shape, mode, arch), shape.B * shape.H
        needs = demand(name, shape.D, shape.hidden, shape.chunk, mode == BOTH)
        schedule = size.scan_backward if name == "scan_backward" else size.scan
        resident = 2 if programs > gpu.sms and schedule.warps <= 4 else 1  # by its registers
        waits = max(1.0, CYCLES / (resident * schedule.warps / 4))
        block = Blocks.of(shape.chunk, size).tokens
        one = ceil(programs / gpu.sms) * ceil(shape.T / block) * block  # tokens of a multiprocessor
        seconds = max(seconds, waits * one * needs.instructions * gpu.sms / gpu.issue)
    return seconds


def issue(shape: Shape, mode: str = FORWARD, gpu: GPU = H200) -> float:
    """Seconds in which multiprocessors, all of them busy, issue the instructions of a call."""
    sizes = (shape.D, shape.hidden, shape.chunk, mode == BOTH)
    once = sum(demand(name, *sizes).instructions for name in PASSES[mode])
    return shape.B * shape.T * shape.H * once / gpu.issue


def launches(shape: Shape, mode: str = FORWARD) -> float:
    """Seconds of the host, where no CUDA graph hides them."""
    forward = len(FORWARD_PASSES) * ceil(shape.T * TURNS / GROUP)
    backward = (len(PASSES[mode]) - len(FORWARD_PASSES)) * ceil(shape.T / GROUP)
    return LAUNCH * (forward + backward)


def tnt(
    shape: Shape, mode: str = FORWARD, size: int = 2048, gpu: GPU = H200
) -> tuple[float, float]:
    """Seconds of the local memory, with the chunk of the shape and so many tokens to a shard, and
    of the global one with as many to a chunk."""
    T = min(shape.T, size)
    local = call(replace(shape, B=shape.B * ceil(shape.T / T), T=T), mode, gpu=gpu)
    whole = replace(shape, chunk=size)
    others = {
        name: s for name, s in predict(whole, mode, gpu=gpu).items() if "retrieve" not in name
    }
    block = _tile(whole, mode, "sm_90").block
    reading = cost("recall", whole.D, whole.hidden, block, whole.chunk, whole.T).floor
    times = (3 if mode == BOTH else 1) * whole.B * whole.T * whole.H
    return local, sum(others.values()) + 1e-9 * times * reading


def tnt_and_titans() -> list[str]:
    """A row for each mode and batch: what chunks that wait for each other cost, and shards."""
    head = (
        "GPU",
        "B x H x D",
        "T",
        "chunk",
        "mode",
        "Titans ms",
        "local ms",
        "global ms",
        "TNT is",
    )
    rows = ["", "TNT, with resets and a global chunk of 2,048, and Titans"]
    rows.append(" ".join(f"{x:>12}" for x in head))
    for gpu, mode, B, chunk in product(GPUS, COLUMNS, (1, 8), (16, 64)):
        shape = Shape(32768, chunk, B, 16, 64)
        whole = call(shape, mode, gpu=gpu)
        local, other = tnt(shape, mode, gpu=gpu)
        times = f"{whole / (local + other):.1f}x as fast"
        short = "forward" if mode == FORWARD else "both"
        cells = (f"{1e3 * x:.3f}" for x in (whole, local, other))
        row = (gpu.name, f"{B} x 16 x 64", shape.T, chunk, short, *cells, times)
        rows.append(" ".join(f"{x!s:>12}" for x in row))
    return rows


def measured(results: Path) -> dict[tuple[Shape, str], float]:
    """Seconds of ours on kernels by shape and mode, from recorded runs on an H200."""
    found = {}
    for path in sorted(results.glob("*h200*.json")):
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            ours = row["case"] == "operator" and row["provider"] == "titans_kernels"
            if ours and row["median_s"] is not None:
                found[Shape(**row["shape"]), row["mode"]] = row["median_s"]
    return found


COLUMNS = {
    FORWARD: {name: (name,) for name in FORWARD_PASSES},
    BOTH: {
        "forward": FORWARD_PASSES,
        "again": BACKWARD_PASSES[:3],
        "retrieve'": ("retrieve_backward",),
        "scan'": ("scan_backward",),
        "inputs'": ("inputs_backward q", "inputs_backward k"),
        "gates'": ("coefficients_backward",),
    },
}


def table(results: Path, mode: str = FORWARD) -> list[str]:
    """Predictions over T, batch and chunk, each next to its measurement if there is one."""
    there = measured(results)
    columns = COLUMNS[mode]
    head = ("B x H x D", "T", "chunk", *columns, "hidden", "call ms", "measured ms")
    rows = ["", f"{mode}, ms on an H200", " ".join(f"{x:>12}" for x in head)]
    for D, B, T, chunk in product((64, 128), (1, 8), (2048, 8192, 32768), (16, 64)):
        shape = Shape(T, chunk, B, 16, D)
        parts = predict(shape, mode)
        real = there.get((shape, mode))
        cells = [f"{B} x 16 x {D}", T, chunk]
        cells += [f"{1e3 * sum(parts[x] for x in names):.3f}" for names in columns.values()]
        cells += [f"{1e3 * hidden(shape, mode):.3f}", f"{1e3 * call(shape, mode):.3f}"]
        cells += ["-" if real is None else f"{1e3 * real:.3f}"]
        rows.append(" ".join(f"{x!s:>12}" for x in cells))
    return rows


def compared() -> list[str]:
    """As many heads as fill a GPU once: ours on paper, others as published."""
    head = ("GPU", "D", "T", "chunk", "mode", "issue ms", "predicted ms", "launches ms")
    head += ("SDPA ms", "delta rule ms")
    rows = ["", "128 heads of all sequences, on paper; others as published (published.py)"]
    rows.append("| " + " | ".join(head) + " |")
    rows.append("|" + "---|" * len(head))
    for gpu, D, T, chunk, mode in product(GPUS, (64, 128), (2048, 8192, 16384), (16, 64), COLUMNS):
        shape = Shape(T, chunk, 8, 16, D)
        seconds = [issue(shape, mode, gpu), call(shape, mode, gpu=gpu)]
        seconds += [launches(shape, mode), sdpa(shape, mode), delta_rule(shape, mode)]
        cells = ["-" if x is None else f"{1e3 * x:.2f}" for x in seconds]
        rows.append("| " + " | ".join(map(str, (gpu.name, D, T, chunk, mode, *cells))) + " |")
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--results", type=Path, default=RESULTS)
    results = parser.parse_args(argv).results
    for mode in COLUMNS:
        print(*table(results, mode), sep="\n")
    print(*tnt_and_titans(), *compared(), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the shipped kernels cost in machine code, without a GPU.

Run `python -m benchmarks.machine_code.static`.

Compiles every kernel for every target with the tile that ships, in bfloat16, chunks of 16, hidden
4 D, a memory of two layers; scan, which holds a chunk, for chunks of 64 too; with `--depth 3 4`, at
D 64, memories of three and four layers. A "+" marks what backward computes again of forward, and
keeps more of; inputs_backward is compiled for queries (q) and for keys (k). Prints registers, bytes
of stack and of shared memory, instructions and how many of them are products on tensor cores; then
what a token of a head costs: FLOP, bytes and the floor of both, and the warp instructions that are
executed for it, all of them and by kind ("float": elementwise, "special": of the special function
unit). "twice" is how often a product is computed, on average: warps that do not find rows of their
own in a tile compute those of others again. `--check` judges all of it by limits and by the
ceilings recorded for the installed Triton, `--record` records them. Any other case:

    python -m benchmarks.machine_code.offline benchmarks.machine_code.static:launch \\
        --arch sm_90 --case \\
        '{"head_dim": 64, "arch": "sm_90", "dtype": "float32", "depth": 1, "backward": true}'

FLOP, bytes and the floor, the slower of the two on an H200, are those of model.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from math import ceil
from typing import Any

import torch
import triton

from titans_kernels.kernels import operator
from titans_kernels.kernels.tiles import tile, using
from titans_kernels.packing import Options, Reading, pack

from .. import ROOT
from . import model
from .executed import CLASSES
from .model import Cost
from .offline import compiling
from .sass import ARCHITECTURES, Report

FORWARD = (*model.FORWARD_PASSES, "recall", "short")
KERNELS = (*FORWARD, *model.BACKWARD_PASSES)
HEAD_DIMS = (64, 128, 256)
DEPTHS = (3, 4)  # of deeper memories, which are compiled at D 64
T, H = 2048, 16
CHUNK, LONG_CHUNK = 16, 64

PRODUCTS = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
SMALL_SHARED_MEMORY = 99 * 1024  # bytes on sm_86, sm_89 and sm_120, which sm_80's tiles serve too
ROWS = {"sm_90": 64, "sm_100": 64}  # fewer, as in blocks of 32, take the tensor cores of sm_80
CEILINGS = ROOT / "tests" / "static_ceilings.json"
MOST_STACK = 512  # bytes a thread may spill: what it costs is among the instructions
TWICE = 1.05  # how often a product may be computed, on average, where nothing excuses it


def launch(
    head_dim: int,
    arch: str,
    dtype: str = "bfloat16",
    depth: int = 2,
    chunk: int = CHUNK,
    backward: bool = False,
    training: bool = False,
) -> None:
    """Launch every kernel of forward, or of backward, as the operators do.

    Forward takes the tile of backward in training.
    """
    D, hidden = head_dim, 4 * head_dim if depth > 1 else head_dim
    q = torch.empty(1, T, H, D, dtype=getattr(torch, dtype), device="meta")
    gates = (q.new_empty(1, T, H),) * 3
    widths = [D, *[hidden] * (depth - 1), D]
    weights = tuple(q.new_empty(H, *size) for size in pairwise(widths))
    norm, options = (q.new_empty(H, D),) * 2, Options("gelu_tanh", True)
    packed, longest = pack(q, q, q, gates, weights, norm, None, None)
    with using(tile(D, hidden, q.dtype, arch, chunk, backward or training)):
        if backward:
            states = [*packed.weights, *packed.momentum]
            kept = [states[0].new_empty(x) for x in operator.kept_shapes(packed, chunk)]
            operator.backward(packed, options, chunk, longest, kept, packed.q, states)
            return
        operator.forward(packed, options, chunk, longest, [])
        # As many tokens, each with the 15 before it: chunks that it decodes.
        q, gates = q.view(-1, CHUNK, H, D), tuple(x.view(-1, CHUNK, H) for x in gates)
        packed, longest = pack(q, q, q, gates, weights, norm, None, None)
        operator.forward(packed, options, CHUNK, longest, [])
    with using(tile(D, hidden, q.dtype, arch)):
        starts = torch.cat([packed.bounds[:1, 0], packed.bounds[:, 1]])
        reading = Reading(packed.q, packed.weights, packed.norm, starts)
        operator.retrieve(reading, options, longest)


def name(report: Report) -> str:
    """Of KERNELS."""
    keeps = "+" if report.constants.get("KEEP") == "True" else ""
    reader = {"True": " k", "False": " q"}.get(report.constants.get("KEYS", ""), "")
    return report.kernel.removesuffix("_kernel") + keeps + reader


def size(report: Report, name: str, otherwise: int = 0) -> int:
    """A number of the launch that the kernel was compiled for: D, BT, CHUNK, ..."""
    return int(report.constants.get(name, otherwise))


def head_dim(report: Report) -> int:
    """0 for the coefficients, which have none: they are compiled for every size of blocks."""
    return size(report, "D")


def chunk_size(report: Report) -> int:
    """Recall, which reads without learning, has none."""
    return CHUNK if name(report) == "recall" else size(report, "CHUNK", CHUNK)


def key(report: Report) -> str:
    sizes = [f"D {head_dim(report)}" if head_dim(report) else f"block {size(report, 'BT')}"]
    sizes += [f"depth {depth(report)}"] if depth(report) > 2 else []
    sizes += [f"chunk {chunk_size(report)}"] if chunk_size(report) != CHUNK else []
    sizes += [f"block {size(report, 'BT')}"] if is_training(report) else []
    return ", ".join([name(report), *sizes, report.arch])


def is_training(report: Report) -> bool:
    """Whether it is scan or retrieve with a tile that only training takes."""
    D = head_dim(report)
    alone = tile(D, 4 * D, torch.bfloat16, report.arch, chunk_size(report), backward=False)
    return name(report) in ("scan", "retrieve") and size(report, "BT") != alone.block


def depth(report: Report) -> int:
    """Of the memory; 2 for the coefficients, which know none."""
    return size(report, "DEPTH", 2)


def cost(report: Report) -> Cost | None:
    """Of hidden widths as in `launch`; of deeper memories there is no formula."""
    if depth(report) > 2:
        return None
    D, block = head_dim(report), size(report, "BT")
    return model.cost(name(report), D, 4 * D, block, chunk_size(report), T)


def narrow_loads(report: Report) -> int:
    """Instructions that load less than 16 bytes from global memory: coefficients, positions."""
    return sum(n for size, n in report.loads.items() if size < 16)


def a_token(report: Report, *kinds: str) -> float:
    """Warp instructions of a token and head: those of some of CLASSES, or all."""
    return sum(report.executed.get(kind, 0) for kind in kinds or CLASSES) / (T * H)


def measured(report: Report) -> dict[str, int]:
    """What has a recorded ceiling. Registers are handed out by eights."""
    spilled = {"bytes of stack": report.stack} if depth(report) > 2 else {}
    return {
        "registers": -(-report.registers // 8) * 8,
        "bytes of shared memory": report.shared,
        "narrow loads": narrow_loads(report),
        "instructions a token": ceil(a_token(report)),
        **spilled,
    }


def version() -> str:
    """Figures are those of a compiler: a recorded ceiling holds for its version only."""
    return ".".join(triton.__version__.split(".")[:2])


def computes_twice(report: Report) -> bool:
    """Whether warps compute products that others compute too, where tiles leave no room for it.

    Blocks of 16 tokens do: their products of tokens by tokens are one warp's.
    """
    fast = report.arch == "sm_90" and head_dim(report) <= 128 and size(report, "BT", 64) > 16
    return fast and report.twice is not None and report.twice > TWICE


def problems(reports: Iterable[Report], ceilings: dict[str, dict[str, int]]) -> list[str]:
    """What is worse than it may be, of the limits that hold for all and of recorded ceilings."""
    found = []
    for report in reports:
        where = key(report)
        found += report.faults(stack=MOST_STACK)
        if report.uncounted:
            found.append(f"{where}: {report.uncounted}")
        if computes_twice(report):
            found.append(f"{where}: products are computed {report.twice:.2f} times")
        if report.arch == "sm_80" and report.shared > SMALL_SHARED_MEMORY:
            found.append(f"{where}: {report.shared:,} bytes of shared memory; sm_86 has fewer")
        if ceilings and where not in ceilings:
            found.append(f"{where}: no ceilings are recorded")
        other = [op for op in report.tensor_core if not op.startswith(PRODUCTS[report.arch])]
        if other and size(report, "BT", 64) >= ROWS.get(report.arch, 0):
            found.append(f"{where}: {', '.join(other)} instead of {PRODUCTS[report.arch]}")
        if report.twice is not None and report.twice < 1:
            found.append(f"{where}: {report.twice:.0%} of the products on tensor cores")
        for what, value in measured(report).items():
            ceiling = ceilings.get(where, {}).get(what, value)
            if value > ceiling:
                found.append(f"{where}: {value:,} {what}, recorded {ceiling:,}")
    return found


def recorded() -> dict[str, dict[str, dict[str, int]]]:
    """Ceilings of every kernel by version of Triton."""
    return json.loads(CEILINGS.read_text()) if CEILINGS.exists() else {}


def record(reports: Iterable[Report]) -> None:
    """Make what was found the ceilings of this version of Triton, a line a kernel."""
    versions = recorded()
    versions.setdefault(version(), {}).update({key(r): measured(r) for r in reports})
    blocks = []
    for which, kernels in sorted(versions.items()):
        rows = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in kernels.items())
        blocks.append(f"  {json.dumps(which)}: {{\n{rows}\n  }}")
    CEILINGS.write_text("{\n" + ",\n".join(blocks) + "\n}\n")


COLUMNS = (
    *("kernel", "D", "depth", "chunk", "target", "block", "slice", "queries", "warps", "stages"),
    *("regs", "stack", "shared", "products", "instr", "FLOP", "bytes", "floor ns"),
    *("executed", *CLASSES, "twice"),
)
WIDTHS = (  # negative: to the left
    *(-22, 5, 7, 7, 8, 7, 7, 9, 7, 8, 6, 7, 9, 10, 8, 12, 10, 10),
    *(10, *(max(7, len(kind) + 2) for kind in CLASSES), 7),
)


def line(report: Report) -> str:
    """A row of the table."""
    sizes = [size(report, name) or "" for name in ("BT", "BH", "BQ")]
    costs = cost(report)
    theirs = (f"{costs.flop:,.0f}", f"{costs.bytes:,.0f}") if costs else ("", "")
    memory = (head_dim(report) or "all", depth(report), chunk_size(report))
    cells = (
        *(name(report), *memory, report.arch, *sizes),
        *(report.num_warps, report.num_stages, report.registers, report.stack, report.shared),
        *(report.products, report.instructions, *theirs),
        f"{costs.floor:.2f}" if costs and report.arch == "sm_90" else "",
        f"{a_token(report):.0f}",
        *(f"{a_token(report, kind):.1f}" for kind in CLASSES),
        f"{report.twice:.2f}" if report.twice else "",
    )
    return row(cells)


def row(cells: Iterable[object]) -> str:
    cells = list(zip(cells, WIDTHS, strict=True))
    return "".join(f"{cell!s:<{-w}}" if w < 0 else f"{cell!s:>{w}}" for cell, w in cells)


def together(reports: Iterable[Report]) -> list[Report]:
    """One of each kernel: what a group of blocks executes and what the next one does."""
    found: dict[str, list[Report]] = {}
    for report in reports:
        found.setdefault(key(report), []).append(report)
    return [
        replace(
            launches[0],
            executed=dict(sum((Counter(x.executed) for x in launches), Counter())),
            traffic=sum(x.traffic for x in launches),
            flop=sum(x.flop for x in launches),
            needed=sum(x.needed for x in launches),
        )
        for launches in found.values()
    ]


def compiled(
    architectures: Iterable[str], head_dims: Iterable[int], depths: Iterable[int] = ()
) -> Iterable[list[Report]]:
    """Reports of a launch at a time; coefficients know a block's size, and no head dimension.

    Of memories deeper than two layers those of `depths`, at D 64.
    """
    for arch in architectures:
        seen: set[str] = set()
        for size in head_dims:
            launches: list[tuple[set[str] | None, dict[str, Any]]] = [
                (None, {}),
                ({"scan_kernel"}, {"chunk": LONG_CHUNK}),
                (None, {"backward": True}),
            ]
            for only, options in launches[:2]:
                chunk = options.get("chunk", CHUNK)
                ways = [tile(size, 4 * size, torch.bfloat16, arch, chunk, x) for x in (True, False)]
                if ways[0] != ways[1]:
                    only = only or {"scan_kernel", "retrieve_kernel"}
                    launches.append((only, options | {"training": True}))
            for depth in depths if size == HEAD_DIMS[0] else ():
                launches += [(None, {"depth": depth, "backward": x}) for x in (False, True)]
            for only, options in launches:
                with compiling(arch, only) as reports:
                    launch(size, arch, **options)
                new = [report for report in together(reports) if key(report) not in seen]
                seen |= {key(report) for report in new}
                yield new


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 1 if a check fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--head-dim", nargs="+", type=int, default=HEAD_DIMS)
    parser.add_argument("--depth", nargs="*", type=int, choices=DEPTHS, default=(), help="at D 64")
    parser.add_argument("--check", action="store_true", help="judge; the exit code says how")
    parser.add_argument("--record", action="store_true", help="make this the ceilings")
    options = parser.parse_args(argv)

    print(f"Triton {triton.__version__}; FLOP, bytes and floor of a token and head")
    print(row(COLUMNS), flush=True)
    reports = []
    for batch in compiled(options.arch, options.head_dim, options.depth):
        print(*map(line, batch), sep="\n", flush=True)
        reports += batch
    if options.record:
        record(reports)
    if not options.check:
        return 0
    found = problems(reports, recorded().get(version(), {}))
    print("", *(found or ["within all limits"]), sep="\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())

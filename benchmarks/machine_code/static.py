"""What the shipped kernels cost in machine code, without a GPU.

Run `python -m benchmarks.machine_code.static`.

Compiles every kernel for every target with the tile that ships, in bfloat16, chunks of 16, hidden
4 D; scan, which holds a chunk, for chunks of 64 too. A "+" marks what backward computes again of
forward, and keeps more of; inputs_backward is compiled for queries (q) and for keys (k). Prints
registers, bytes of stack and of shared memory, instructions and how many of them are products on
tensor cores, and what a token of a head costs. `--check` judges all of it by limits and by the
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
from collections.abc import Iterable
from typing import Any

import torch
import triton

from titans_kernels.kernels import operator
from titans_kernels.kernels.tiles import tile, using
from titans_kernels.packing import Options, Reading, pack

from .. import ROOT
from . import model
from .model import Cost
from .offline import compiling
from .sass import ARCHITECTURES, Report

FORWARD = (*model.FORWARD_PASSES, "recall")
KERNELS = (*FORWARD, *model.BACKWARD_PASSES)
HEAD_DIMS = (64, 128, 256)
T, H = 2048, 16
CHUNK, LONG_CHUNK = 16, 64

PRODUCTS = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
SMALL_SHARED_MEMORY = 99 * 1024  # bytes on sm_86, sm_89 and sm_120, which sm_80's tiles serve too
ROWS = {"sm_90": 64, "sm_100": 64}  # fewer, as in blocks of 32, take the tensor cores of sm_80
CEILINGS = ROOT / "tests" / "static_ceilings.json"


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
    D, hidden = head_dim, 4 * head_dim if depth == 2 else head_dim
    q = torch.empty(1, T, H, D, dtype=getattr(torch, dtype), device="meta")
    gates = (q.new_empty(1, T, H),) * 3
    weights = (q.new_empty(H, D, hidden), q.new_empty(H, hidden, D))[:depth]
    norm, options = (q.new_empty(H, D),) * 2, Options("gelu_tanh", True)
    packed, longest = pack(q, q, q, gates, weights, norm, None, None)
    with using(tile(D, hidden, q.dtype, arch, chunk, backward or training)):
        if backward:
            states = [*packed.weights, *packed.momentum]
            kept = [states[0].new_empty(x) for x in operator.kept_shapes(packed, chunk)]
            operator.backward(packed, options, chunk, longest, kept, packed.q, states)
            return
        operator.forward(packed, options, chunk, longest, [])
    with using(tile(D, hidden, q.dtype, arch)):
        starts = torch.cat([packed.bounds[:1, 0], packed.bounds[:, 1]])
        reading = Reading(packed.q, packed.weights, packed.norm, starts)
        operator.retrieve(reading, options, longest)


def name(report: Report) -> str:
    """Of KERNELS."""
    keeps = "+" if report.constants.get("KEEP") == "True" else ""
    reader = {"True": " k", "False": " q"}.get(report.constants.get("KEYS", ""), "")
    return report.kernel.removesuffix("_kernel") + keeps + reader


def head_dim(report: Report) -> int:
    """0 for the coefficients, which have none: they are compiled once."""
    return int(report.constants.get("D", 0))


def chunk_size(report: Report) -> int:
    return int(report.constants.get("CHUNK", CHUNK))


def key(report: Report) -> str:
    sizes = [f"D {head_dim(report)}"] if head_dim(report) else []
    sizes += [f"chunk {chunk_size(report)}"] if chunk_size(report) != CHUNK else []
    sizes += [f"block {report.constants['BT']}"] if is_training(report) else []
    return ", ".join([name(report), *sizes, report.arch])


def is_training(report: Report) -> bool:
    """Whether it is scan or retrieve with a tile that only training takes."""
    D = head_dim(report)
    alone = tile(D, 4 * D, torch.bfloat16, report.arch, chunk_size(report), backward=False)
    return name(report) in ("scan", "retrieve") and int(report.constants["BT"]) != alone.block


def cost(report: Report) -> Cost:
    """Of hidden widths as in `launch`."""
    D, block = head_dim(report), int(report.constants["BT"])
    return model.cost(name(report), D, 4 * D, block, chunk_size(report), T)


def fewest_products(report: Report) -> int:
    """Tensor-core instructions at least, where no product in the kernel's source goes without.

    One instruction sums over 16 elements at most, on every target: listed is what the products sum
    over, all together.
    """
    which = name(report).rstrip("+").removesuffix(" k")
    if which.startswith("coefficients"):
        return 0
    BD, BT, BH = (int(report.constants[size]) for size in ("BD", "BT", "BH"))
    BR = int(report.constants.get("BR", BD))
    BN = min(BH, 32)  # of the hidden dimension at a time, backwards
    summed = {
        "scan": 6 * BD + 7 * BT + 3 * BH,
        "retrieve": 3 * BD + 2 * BT + 3 * BH,
        "recall": BD + BH,
        "retrieve_backward": 3 * BR + 3 * BT + BH,
        "inputs_backward q": BR + 3 * BT + 3 * BH,
        "scan_backward": 10 * BR + 4 * BN + 15 * BT + 5 * BH,
        "inputs_backward": BR + 2 * BT + 3 * BH,
    }
    return summed[which] // 16


def narrow_loads(report: Report) -> int:
    """Instructions that load less than 16 bytes from global memory: coefficients, positions."""
    return sum(n for size, n in report.loads.items() if size < 16)


def measured(report: Report) -> dict[str, int]:
    """What has a recorded ceiling. Registers are handed out by eights."""
    return {
        "registers": -(-report.registers // 8) * 8,
        "bytes of stack": report.stack,
        "bytes of shared memory": report.shared,
        "narrow loads": narrow_loads(report),
    }


def version() -> str:
    """Figures are those of a compiler: a recorded ceiling holds for its version only."""
    return ".".join(triton.__version__.split(".")[:2])


def most_stack(report: Report) -> int:
    """Bytes a thread may spill: none where kernels are meant to be fast.

    That is on gfx942, and on sm_90 and sm_100 up to D 128 in chunks of 16. At D 128 chunks of 64
    take 16 bytes with Triton 3.9.
    """
    if report.arch == "gfx942":
        return 0
    if report.arch in ("sm_90", "sm_100") and head_dim(report) <= 128:
        return 16 if chunk_size(report) > CHUNK else 0
    return 256


def problems(reports: Iterable[Report], ceilings: dict[str, dict[str, int]]) -> list[str]:
    """What is worse than it may be, of the limits that hold for all and of recorded ceilings."""
    found = []
    for report in reports:
        where = key(report)
        found += report.faults(stack=most_stack(report))
        if report.arch == "sm_80" and report.shared > SMALL_SHARED_MEMORY:
            found.append(f"{where}: {report.shared:,} bytes of shared memory; sm_86 has fewer")
        if ceilings and where not in ceilings:
            found.append(f"{where}: no ceilings are recorded")
        other = [op for op in report.tensor_core if not op.startswith(PRODUCTS[report.arch])]
        if other and int(report.constants.get("BT", 64)) >= ROWS.get(report.arch, 0):
            found.append(f"{where}: {', '.join(other)} instead of {PRODUCTS[report.arch]}")
        if report.products < fewest_products(report):
            found.append(f"{where}: {report.products} products, {fewest_products(report)} needed")
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
    *("kernel", "D", "chunk", "target", "block", "slice", "queries", "warps", "stages"),
    *("regs", "stack", "shared", "products", "instr", "FLOP", "bytes", "floor ns"),
)
WIDTHS = (-22, 5, 7, 8, 7, 7, 9, 7, 8, 6, 7, 9, 10, 8, 12, 10, 10)  # negative: to the left


def line(report: Report) -> str:
    """A row of the table."""
    sizes = [report.constants.get(size, "") for size in ("BT", "BH", "BQ")]
    costs = cost(report)
    cells = (
        *(name(report), head_dim(report) or "all", chunk_size(report), report.arch, *sizes),
        *(report.num_warps, report.num_stages, report.registers, report.stack, report.shared),
        *(report.products, report.instructions, f"{costs.flop:,.0f}", f"{costs.bytes:,.0f}"),
        f"{costs.floor:.2f}" if report.arch == "sm_90" else "",
    )
    return row(cells)


def row(cells: Iterable[object]) -> str:
    cells = list(zip(cells, WIDTHS, strict=True))
    return "".join(f"{cell!s:<{-w}}" if w < 0 else f"{cell!s:>{w}}" for cell, w in cells)


def compiled(architectures: Iterable[str], head_dims: Iterable[int]) -> Iterable[list[Report]]:
    """Reports of a launch at a time; coefficients are the same for every head dimension."""
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
            for only, options in launches:
                with compiling(arch, only) as reports:
                    launch(size, arch, **options)
                new = {key(report): report for report in reports if key(report) not in seen}
                seen |= new.keys()
                yield list(new.values())


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 1 if a check fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--head-dim", nargs="+", type=int, default=HEAD_DIMS)
    parser.add_argument("--check", action="store_true", help="judge; the exit code says how")
    parser.add_argument("--record", action="store_true", help="make this the ceilings")
    options = parser.parse_args(argv)

    print(f"Triton {triton.__version__}; FLOP, bytes and floor of a token and head")
    print(row(COLUMNS), flush=True)
    reports = []
    for batch in compiled(options.arch, options.head_dim):
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

"""What the shipped kernels cost in machine code, without a GPU: `python -m benchmarks.static`

Compiles every kernel for every target with the tile that ships, in bfloat16, chunks of 16, hidden
4 D, and prints registers, bytes of stack and of shared memory, instructions and how many of them
are products on tensor cores, and what a token of a head costs. `--check` judges all of it by limits
and by the ceilings recorded for the installed Triton, `--record` records them. Any other case:

    python -m benchmarks.offline benchmarks.static:launch --arch sm_90 \\
        --case '{"head_dim": 64, "arch": "sm_90", "dtype": "float32", "depth": 1, "chunk": 64}'

FLOP and bytes are those of the passes as they are written, for matrices D by hidden, N tokens to a
block and chunks of C:

    scan          20 D hidden + 6 N (D + hidden) FLOP: 12 of the 20 for keys, 8 for the update
                  k, v, D_2: 6 D; X, D_1: 4 hidden; G's rows at chunks and at the end: 4 N / C + 8;
                  W and S read and written in float32, passed on in bfloat16: 40 D hidden / N
    retrieve      8 D hidden + 4 N (D + hidden) FLOP
                  q, k, D_2, o: 8 D; X, D_1: 4 hidden; G, a, c: 4 N + 8; W and S: 8 D hidden / N
    recall        4 D hidden FLOP
                  q, o: 4 D; W, once for T = 2,048 tokens: 4 D hidden / T
    coefficients  gates: 6; G, a, c and the row at the end: 4 N + 16

The bytes have to pass between the pass and the GPU's memory: a tensor once a block, nothing for
what caches can give again. The floor is the slower of the two on an H200, at rates measured on one:
790 TFLOP/s for products in bfloat16, 4.3 TB/s for copies.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from titans_kernels.chunked import Options
from titans_kernels.kernels import operator
from titans_kernels.kernels.tiles import tile

from .machine_code import ARCHITECTURES, Report
from .offline import compiling

KERNELS = ("coefficients", "scan", "retrieve", "recall")
HEAD_DIMS = (64, 128, 256)
T, CHUNK, H = 2048, 16, 16
H200_FLOPS, H200_BYTES = 790e12, 4.3e12  # a second

PRODUCTS = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
CEILINGS = Path(__file__).parents[1] / "tests" / "static_ceilings.json"


class Cost(NamedTuple):
    """Of a token and head."""

    flop: float
    bytes: float

    @property
    def floor(self) -> float:
        """Nanoseconds on an H200."""
        return 1e9 * max(self.flop / H200_FLOPS, self.bytes / H200_BYTES)


def launch(
    head_dim: int, arch: str, dtype: str = "bfloat16", depth: int = 2, chunk: int = CHUNK
) -> None:
    """Launch every kernel once, as the operators do."""
    D, hidden = head_dim, 4 * head_dim if depth == 2 else head_dim
    q = torch.empty(1, T, H, D, dtype=getattr(torch, dtype), device="meta")
    gates = (q.new_empty(1, T, H),) * 3
    weights = (q.new_empty(H, D, hidden), q.new_empty(H, hidden, D))[:depth]
    norm, options = (q.new_empty(H, D),) * 2, Options("gelu_tanh", True)
    use = tile(D, hidden, q.dtype, arch)
    operator.neural_memory(
        q, q, q, gates, weights, norm, options, chunk, None, False, None, use=use
    )
    batch = tuple(w[None] for w in weights)
    operator.retrieve(q, batch, norm, options, None, use=use)


def name(report: Report) -> str:
    return report.kernel.removesuffix("_kernel")


def head_dim(report: Report) -> int:
    """0 for the coefficients, which have none: they are compiled once."""
    return int(report.constants.get("D", 0))


def key(report: Report) -> str:
    size = [f"D {head_dim(report)}"] if head_dim(report) else []
    return ", ".join([name(report), *size, report.arch])


def cost(report: Report) -> Cost:
    """The formulas above."""
    D, N = head_dim(report), int(report.constants["BT"])
    hidden = 4 * D
    if name(report) == "scan":
        return Cost(
            20 * D * hidden + 6 * N * (D + hidden),
            6 * D + 4 * hidden + 4 * N / CHUNK + 8 + 40 * D * hidden / N,
        )
    if name(report) == "retrieve":
        return Cost(
            8 * D * hidden + 4 * N * (D + hidden),
            8 * D + 4 * hidden + 4 * N + 8 + 8 * D * hidden / N,
        )
    if name(report) == "recall":
        return Cost(4 * D * hidden, 4 * D + 4 * D * hidden / T)
    return Cost(0, 6 + 4 * N + 16)


def fewest_products(report: Report) -> int:
    """Tensor-core instructions at least, where no product in the kernel's source goes without.

    One instruction sums over 16 elements at most, on every target: listed is what the products sum
    over, all together.
    """
    if name(report) == "coefficients":
        return 0
    BD, BT, BH = (int(report.constants[size]) for size in ("BD", "BT", "BH"))
    summed = {
        "scan": 6 * BD + 7 * BT + 3 * BH,
        "retrieve": 3 * BD + 2 * BT + 3 * BH,
        "recall": BD + BH,
    }
    return summed[name(report)] // 16


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


def problems(reports: Iterable[Report], ceilings: dict[str, dict[str, int]]) -> list[str]:
    """What is worse than it may be, of the limits that hold for all and of recorded ceilings."""
    found = []
    for report in reports:
        strict = report.arch in ("sm_90", "sm_100") and head_dim(report) <= 128
        found += report.faults(stack=0 if strict else 256)
        where = key(report)
        other = [op for op in report.tensor_core if not op.startswith(PRODUCTS[report.arch])]
        if other:
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
    *("kernel", "D", "target", "block", "slice", "queries", "warps", "stages"),
    *("regs", "stack", "shared", "products", "instr", "FLOP", "bytes", "floor ns"),
)
WIDTHS = (-12, 5, 8, 7, 7, 9, 7, 8, 6, 7, 9, 10, 8, 12, 10, 10)  # negative: to the left


def line(report: Report) -> str:
    """A row of the table."""
    sizes = [report.constants.get(size, "") for size in ("BT", "BH", "BQ")]
    costs = cost(report)
    cells = (
        *(name(report), head_dim(report) or "all", report.arch, *sizes),
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
            with compiling(arch) as reports:
                launch(size, arch)
            new = [report for report in reports if key(report) not in seen]
            seen |= {key(report) for report in new}
            yield new


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 1 if a check fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__)
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

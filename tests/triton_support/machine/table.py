"""docs/machine.md, from what was executed: `python -m triton_support.machine.table`"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from benchmarks.machine_code import model

from .cases import CASES, COUNTED, Case
from .counts import BRANCHES, FORMS

PRICED = ("D 64", "D 64, forward only")  # whole blocks: the formulas count no padding
ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "machine.md"
RECORD = ROOT / "benchmarks" / "results" / "machine.jsonl"
INTRODUCTION = """\
# The machine's own code, executed without the machine

The PTX that Triton compiles from the package's kernels, executed on a CPU instruction by
instruction (`tests/triton_support/machine`) and compared with the float64 reference: outputs, final
state, `retrieve` and, except in the rows without a backward pass, the gradient of every input.
A row of this table passed three runs that agree to the bit: asynchronous operands land at once, as
late as a wait allows, and late with NaN for every load that races. In none of them was there an
access out of bounds or misaligned, a read of uninitialised shared memory, a race in shared
memory or between programs, a use of bytes that a copy is still writing, an `ld.global.nc` of what
the launch wrote, or a barrier that not every warp reaches.

- **error**: of the worst tensor, relative, in the Frobenius norm, over all seeds.
- **ratio**: the worst tensor's RMS error over the yardstick's, at most 1.25 (float32: over the
  PyTorch backend's, at most 4).
- **instructions**, **products**: of warps, and of tensor cores, executed a token and head. Products
  are `mma.sync` or a warp's part of `wgmma`.
- **kernels**: the commit of `titans_kernels/kernels` that was executed.

Only the rows below were run. Not executed: ptxas and its machine code, timing, races between lanes
of one warp, sm_100, AMD. `make machine` runs all of it and writes this page.

"""
HEAD = (
    "| case | GPU | Triton | dtype | tile | error | ratio | instructions | products | kernels |\n"
    "|---|---|---|---|---|---|---|---|---|---|\n"
)
KERNELS = """
## By kernel

Instructions and products that are executed a token and head: of the forward pass and, where there
is a backward pass, of the forward pass that it recomputes; and the products that the
formulas of `benchmarks.machine_code.model` require, of 4,096 FLOP each. Where more are executed, a
likely cause (not traced here) is a tile with fewer fragments than warps, which several warps
compute alike.

| case | GPU | Triton | dtype | kernel | instructions | products | by formula |
|---|---|---|---|---|---|---|---|
"""
COUNTS = """
## Counted without executing

What the emulator executes, and the same instructions counted along loops: every instruction of the
PTX text, times the turns of its loops by Triton's own IR, times warps and programs
(`python -m triton_support.machine.counts`). Machine code (SASS, by ptxas) is counted so too, in the
forms that ptxas translates one to one. All kernels of forward and backward in bfloat16, a token and
head, the kernels of coefficients in the rows "coefficients" alone. Counts of a kernel that differ
by more than 2% fail `tests/test_machine.py`, with these exceptions, in which the count along loops
is a bound from above and is held to be one:

- global loads, global stores, other (integers, moves, predicates, branches): the count along loops
  has both sides of a branch, and code that only some turns reach in every turn;
- all of the kernels of coefficients: their work at the end of a chunk stands behind a branch.

The table's case is larger than the test's: 1,024 tokens at D 64. There scan, counted along loops,
is up to 1 in 15 above: of its 16 blocks the last one hands on no state or, in the forward pass
alone, no rounded copy of it, and the count has that turn too.
Loads that ptxas writes with a predicate that is never true are not counted.

Not compared with machine code: special functions, float and other, which ptxas merges, hoists and
expands (a division is several instructions there); global accesses, which it merges.

| GPU | Triton | form | executed | along loops of PTX | of machine code |
|---|---|---|---|---|---|
"""
PRODUCT = 16 * 8 * 16 * 2  # FLOP of one m16n8k16


def by_formula(kernel: str, case: Case, block: int) -> float:
    """Products a token and head of a kernel of the 16-bit dtypes, in all launches of a case."""
    again = 2 if case.backward and kernel in ("scan", "retrieve") else 1
    names = ("inputs_backward q", "inputs_backward k") if kernel == "inputs_backward" else (kernel,)
    sizes = (case.D, case.hidden, block, case.chunk, case.T)
    return again * sum(model.cost(name, *sizes).flop for name in names) / PRODUCT


def _cells(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |\n"


def _counted(records: list[dict]) -> str:
    """A row of every form that kernels have, all kernels but those of coefficients together."""
    rows = ""
    places = {(r["case"], r["arch"], r["triton"]) for r in records}
    for case, arch, version in sorted(places):
        tokens = COUNTED[case].T * COUNTED[case].H
        sums: dict[str, Counter[int]] = {}
        for r in records:
            if (r["case"], r["arch"], r["triton"]) == (case, arch, version):
                for form, counts in r["counts"].items():
                    name = "coefficients" if r["kernel"] in BRANCHES else form
                    sums.setdefault(name, Counter()).update(dict(enumerate(counts)))
        for form in (*FORMS, "coefficients"):
            if form in sums:
                cells = [f"{sums[form][i] / tokens:,.1f}" for i in range(3)]
                exact = form in FORMS and FORMS[form].sass and not FORMS[form].bound
                cells[2] = cells[2] if exact else ""
                rows += _cells(arch, version, form, *cells)
    return rows


def page(records: list[dict]) -> str:
    """The page; a record that failed stands in it by its error."""
    rows, kernels = "", ""
    counted = _counted([r for r in records if "counts" in r])
    for r in records:
        if "counts" in r:
            continue
        where = (r["case"], r["arch"], r["triton"], r["dtype"])
        if "failed" in r:
            rows += _cells(
                *where, "failed: " + r["failed"].replace("|", "/"), *[""] * 4, r["commit"]
            )
            continue
        counts = (f"{r['instructions']:,.0f}", f"{r['products']:.1f}")
        error, ratio = f"{r['error']:.1e}", f"{r['rms']:.2f}"
        rows += _cells(*where, r["tile"], error, ratio, *counts, r["commit"])
        # A warp's part of a wgmma is larger than the m16n8k16 that formulas are counted in.
        if r["case"] in PRICED and r["dtype"] != "float32" and r["arch"] == "sm_80":
            block = int(r["tile"].split("x")[0])
            for name, (instructions, products) in r["kernels"].items():
                paper = by_formula(name, CASES[r["case"]], block)
                cells = (f"{instructions:,.0f}", f"{products:.1f}", f"{paper:.1f}")
                kernels += _cells(*where, name, *cells)
    parts = [HEAD + rows, KERNELS + kernels if kernels else "", COUNTS + counted if counted else ""]
    return INTRODUCTION + "".join(parts)


def recorded() -> list[dict]:
    return [json.loads(line) for line in RECORD.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    PAGE.write_text(page(recorded()), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Executed instructions next to the same instructions counted along loops.

`python -m triton_support.machine.counts --arch sm_80` prints both. The emulator counts what a
launch executes. `benchmarks.machine_code.executed` counts without executing: instructions of the
text, times the turns of the loops that they stand in, times warps and programs. Where blocks are
full, and as many as a launch has programs for, that is the same number, found in another way; where
they differ one of them is wrong. Machine code is counted along loops too, in the forms that ptxas
translates one to one.

What is no more than a bound from above: the count along loops has every instruction of a body in
every turn and both sides of a branch, the emulator those that were issued. That changes `global
load`, `global store` and `other` (integers, moves, predicates, branches) in every kernel, and all
forms in those of coefficients, whose work at a chunk's end stands behind a branch. Of scan's blocks
the last one hands on no state to another, which the count along loops has too: LAST_BLOCK.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass

import torch
import triton
from yardstick import rounded_inputs

from benchmarks.machine_code import executed, loops, sass

from .cases import COUNTED, Case
from .opcodes import SKIPPED
from .program import Found
from .sequence import _executed, _operators, _tile

TOLERANCE = 0.02
LAST_BLOCK = {"D 64, counted": 1 / 15}  # above: of scan with 16 blocks, where it is more than that
BRANCHES = ("coefficients", "coefficients_backward")  # kernels with work that few turns do


@dataclass(frozen=True)
class Form:
    """Instructions of one kind: in PTX, in the emulator, in machine code where one to one."""

    ptx: str
    operations: str
    sass: str = ""
    bound: bool = False  # the count along loops is one from above


FORMS = {
    "product": Form(r"mma\.sync|wgmma\.mma_async", "mma16 mma8tf wgmma", r"H(G)?MMA\b"),
    "matrix load": Form(r"ldmatrix", "ldmatrix", r"LDSM\b"),
    "matrix store": Form(r"stmatrix", "stmatrix", r"STSM\b"),
    "copy": Form(r"cp\.async\.c[ag]\.", "cpasync", r"LDGSTS\b"),
    "barrier": Form(r"bar(rier)?\.sync", "bar", r"BAR\b"),
    "shuffle": Form(r"shfl\.", "shfl", r"SHFL\b"),
    "shared load": Form(r"ld\.shared", "lds", r"LDS\b"),
    "shared store": Form(r"st\.shared", "sts", r"STS\b"),
    "special": Form(
        r"(ex2|lg2|rcp|sqrt|rsqrt|tanh|sin|cos)\.",
        "ex2f lg2f rcpf sqrtf_ rsqrtf_ tanhf_ sinf_ cosf_",
    ),
    "float": Form(
        r"(add|sub|mul|fma|div|neg|abs|min|max)\.([\w.]+\.)?(f32|f16|bf16|f16x2|bf16x2)$"
        r"|cvt\.\w+\.(f32|f16|bf16|f16x2|bf16x2|tf32)\.f32$|cvt\.f32\.b?f16$",
        "addf subf mulf fmaf_ divf negf absf minf maxf negbf negbf2 absbf absbf2 bin_h fma_h "
        "bin_h2 fma_h2 cvt_bf16_f32 cvt_f16_f32 cvt_bf16x2 cvt_f16x2 cvt_tf32 cvt_f32_bf16 "
        "cvt_f32_f16",
    ),
    "global load": Form(r"ld\.global", "ldg", r"LDG\b", bound=True),
    "global store": Form(r"st\.global", "stg", r"STG\b", bound=True),
    "other": Form("", "", bound=True),
}


def _form(name: str, field: str) -> str:
    found = (form for form, x in FORMS.items() if re.match(getattr(x, field) or "$^", name))
    return next(found, "other")


def along_loops(code: executed.Code, source: list[loops.Loop], field: str) -> Counter[str]:
    """Of one warp, by form. PTX that the emulator passes over is not counted."""
    count: Counter[str] = Counter()
    for instruction, turns in zip(code.instructions, executed.turns(code, source), strict=True):
        if not instruction.name.startswith(SKIPPED):
            count[_form(instruction.name, field)] += turns
    return count


def counts(found: Found) -> dict[str, list[int]]:
    """Of a launch by form: executed, along the loops of its PTX and of its machine code."""
    of = {op: form for form, x in FORMS.items() for op in x.operations.split()}
    ran: Counter[str] = Counter()
    for operation, n in found.operations.items():
        ran[of.get(operation, "other")] += n
    asm, warps = found.compiled.asm, found.compiled.metadata.num_warps * found.programs
    source = loops.read(asm["ttgir"], found.integers).loops
    text = along_loops(executed.ptx(asm["ptx"]), source, "ptx")
    code, _ = sass._read_nvidia(asm)
    machine = along_loops(code, source, "sass")
    return {
        form: [ran[form], text[form] * warps, machine[form] * warps]
        for form in FORMS
        if ran[form] or text[form]
    }


def disagreements(kernel: str, of: dict[str, list[int]], case: str = "counted") -> list[str]:
    """Forms whose counts differ by more than TOLERANCE, and bounds that do not hold."""
    above, found = LAST_BLOCK.get(case, TOLERANCE) if kernel == "scan" else TOLERANCE, []
    for form, (ran, text, machine) in of.items():
        bound = FORMS[form].bound or kernel in BRANCHES
        counted = {"PTX": text} if bound or not FORMS[form].sass else {"PTX": text, "SASS": machine}
        for where, n in counted.items():
            if n < ran * (1 - TOLERANCE) or (n > ran * (1 + above) and not bound):
                found.append(
                    f"{kernel}: {form}: {ran:,} executed, {n:,} along the loops of {where}"
                )
    return found


def run(case: Case, dtype: torch.dtype, arch: str) -> list[tuple[str, dict[str, list[int]]]]:
    """Execute a case once: every kernel, and its counts."""
    size = _tile(case, dtype, arch)
    kernels, *_ = _operators(case, dtype, size)
    sizes = {"T": case.T, "H": case.H, "D": case.D, "hidden": case.hidden}
    inputs, _ = rounded_inputs(dtype, seed=0, **sizes, depth=case.depth, norm=case.norm, B=1)
    _, found = _executed(kernels, inputs, case, size, arch, assemble=True)
    return [(launch.kernel.removesuffix("_kernel"), counts(launch)) for launch in found]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m triton_support.machine.counts")
    parser.add_argument("--arch", default="sm_80", choices=("sm_80", "sm_90"))
    parser.add_argument("--case", default="counted", choices=[*COUNTED])
    options = parser.parse_args()
    torch.set_num_threads(1)
    case, wrong = COUNTED[options.case], []
    for kernel, of in run(case, torch.bfloat16, options.arch):
        record = {"kernel": kernel, "case": case.name, "arch": options.arch, "counts": of}
        print(json.dumps(record | {"triton": triton.__version__}), flush=True)
        wrong += disagreements(kernel, of, case.name)
    print(*wrong, sep="\n", end="\n" * bool(wrong), file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

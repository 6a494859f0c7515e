"""What the machine code of a compiled kernel costs, read from the code itself."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import triton

from . import executed, loops

TENSOR_MEMORY = 512  # columns of a streaming multiprocessor, from sm_100 on


@dataclass(frozen=True)
class Architecture:
    """A GPU, as its compiler knows it, and what a program may use of it."""

    backend: str
    name: int | str
    warp: int  # threads
    shared_memory: int  # bytes


ARCHITECTURES = {
    "sm_80": Architecture("cuda", 80, 32, 166_912),
    "sm_90": Architecture("cuda", 90, 32, 232_448),
    "sm_100": Architecture("cuda", 100, 32, 232_448),
    "gfx942": Architecture("hip", "gfx942", 64, 65_536),
}


@dataclass(frozen=True)
class Report:
    """One kernel, compiled for one GPU. Bytes, unless said otherwise."""

    kernel: str
    arch: str  # of ARCHITECTURES
    num_warps: int
    num_stages: int
    constants: dict[str, str]  # the kernel's compile-time arguments
    registers: int  # of a thread
    stack: int  # of a thread: what does not fit in registers is spilled there
    spills: int  # instructions that move it there and back; on AMD, registers moved
    shared: int
    tensor_memory: int  # columns
    traps: int  # in the kernel itself, where the compiler gave up
    instructions: int
    tensor_core: dict[str, int]  # instructions by name
    loads: dict[int, int]  # from global memory: instructions by bytes a thread
    stores: dict[int, int]
    unfenced: int = 0  # products on Hopper that may read shared memory from before a copy to it
    executed: dict[str, int] = field(default_factory=dict)  # warp instructions of a launch, by kind
    traffic: int = 0  # of a launch, through the caches of its multiprocessors at most
    flop: float = 0.0  # of a launch, on tensor cores
    needed: float = 0.0  # FLOP of a launch that products in the kernel's source have
    uncounted: str = ""  # why there are none of the four

    def __str__(self) -> str:
        figures = {
            "registers": self.registers,
            "stack": self.stack,
            "shared": self.shared,
            "tensor memory": self.tensor_memory,
            "instructions": self.instructions,
            "tensor core": self.tensor_core,
            "loads": self.loads,
            "stores": self.stores,
            "executed": self.executed or self.uncounted,
        }
        return f"{self.kernel} on {self.arch}: " + ", ".join(f"{k} {v}" for k, v in figures.items())

    @property
    def products(self) -> int:
        """Tensor-core instructions."""
        return sum(self.tensor_core.values())

    @property
    def twice(self) -> float | None:
        """How often a product is computed on tensor cores, on average."""
        return self.flop / self.needed if self.needed else None

    def faults(self, *, stack: int = 0) -> list[str]:
        """Why this kernel would not run, or would run slowly: nothing, for one to be shipped."""
        arch = ARCHITECTURES[self.arch]
        limits = {
            "bytes of stack": (self.stack, stack),
            "bytes of shared memory": (self.shared, arch.shared_memory),
            "columns of tensor memory": (self.tensor_memory, TENSOR_MEMORY),
            "traps": (self.traps, 0),
            "products without a fence behind an asynchronous copy": (self.unfenced, 0),
        }
        return [
            f"{self.kernel} on {self.arch}: {found:,} {what}, at most {limit:,}"
            for what, (found, limit) in limits.items()
            if found > limit
        ]


def report(
    compiled: Any, arch: str, constants: dict[str, str], integers: Sequence[int], programs: int
) -> Report:
    """Read what `triton.compile` made for `arch`, and how a launch executes it.

    Args:
        integers (sequence of int): what is given to those of the kernel's arguments that are.
        programs (int): of the launch.
    """
    meta = compiled.metadata
    read = _read_nvidia if ARCHITECTURES[arch].backend == "cuda" else _read_amd
    code, figures = read(compiled.asm)
    return Report(
        kernel=meta.name,
        arch=arch,
        num_warps=meta.num_warps,
        num_stages=meta.num_stages,
        constants=constants,
        shared=meta.shared,
        tensor_memory=getattr(meta, "tmem_size", None) or 0,
        **figures,
        **_execution(code, compiled.asm, integers, programs, meta.num_warps, arch),
    )


def _execution(
    code: executed.Code, asm: Any, integers: Sequence[int], programs: int, warps: int, arch: str
) -> dict[str, Any]:
    try:
        # Pipelining may take a turn out of a loop, so loops are those after it.
        source = loops.read(asm["ttgir"], integers)
        one = executed.executed(code, source.loops)
        needed = loops.read(asm["ttir"], integers).flop
    except ValueError as unknown:
        return dict(uncounted=str(unknown))
    threads = ARCHITECTURES[arch].warp
    return dict(
        executed={what: n * warps * programs for what, n in one.instructions.items()},
        traffic=one.traffic * threads * warps * programs,
        flop=(one.flop * warps + source.tensor_memory) * programs,
        needed=needed * programs,
    )


# ------------------------------------------------------------------------------------------- NVIDIA

_SASS_FUNCTION = re.compile(r"^(?=[\w$]+:$)", re.M)
_NVIDIA_PRODUCT = re.compile(r"HMMA|HGMMA|DMMA|UTC\w*MMA")


def _read_nvidia(asm: Any) -> tuple[executed.Code, dict[str, Any]]:
    usage = dict(re.findall(r"(REG|STACK):(\d+)", _tool("cuobjdump", "-res-usage", asm["cubin"])))
    functions = _SASS_FUNCTION.split(_tool("nvdisasm", "-c", asm["cubin"]))
    # On sm_100 every kernel carries helpers that trap when tensor memory is misused.
    kernel = "".join(body for body in functions if "guardrail_trap" not in body.split(":", 1)[0])
    code = executed.sass(kernel)
    ops = Counter(instruction.name for instruction in code.instructions)
    return code, dict(
        registers=int(usage["REG"]),
        stack=int(usage["STACK"]),
        spills=sum(n for op, n in ops.items() if op.split(".")[0] in ("LDL", "STL")),
        traps=ops["BPT.TRAP"],
        instructions=ops.total(),
        tensor_core=_by_name(ops, _NVIDIA_PRODUCT),
        loads=_by_width(ops, r"LDG(STS)?\b"),
        stores=_by_width(ops, r"STG\b"),
        unfenced=unfenced(asm["ptx"]),
    )


def unfenced(ptx: str) -> int:
    """wgmma after a wait for copies, with no proxy fence in between, as the text goes."""
    found, waited = 0, False
    for line in map(str.strip, ptx.splitlines()):
        if line.startswith("cp.async.wait"):
            waited = True
        elif line.startswith("fence.proxy.async"):
            waited = False
        elif line.startswith("wgmma.mma_async"):
            found += waited
    return found


def _tool(name: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [getattr(triton.knobs.nvidia, name).path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _by_name(ops: Counter[str], pattern: re.Pattern[str]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for op, n in ops.items():
        if match := pattern.match(op):
            found[match[0]] += n
    return dict(found)


def _by_width(ops: Counter[str], pattern: str) -> dict[int, int]:
    """Instructions by the bytes that a thread moves."""
    found: Counter[int] = Counter()
    for op, n in ops.items():
        if re.match(pattern, op):
            found[executed.width(op)] += n
    return dict(sorted(found.items()))


# ---------------------------------------------------------------------------------------------- AMD

_AMD_PRODUCT = re.compile(r"v_mfma_\w+")


def _read_amd(asm: Any) -> tuple[executed.Code, dict[str, Any]]:
    text = asm["amdgcn"]
    figures = {name: int(n) for name, n in re.findall(r"\.(\w+):\s+(\d+)\s*$", text, re.M)}
    code = executed.gcn(text)
    ops = Counter(instruction.name for instruction in code.instructions)
    return code, dict(
        registers=figures["vgpr_count"],  # accumulation registers among them
        stack=figures["private_segment_fixed_size"],
        spills=figures["vgpr_spill_count"],
        traps=ops["s_trap"],
        instructions=ops.total(),
        tensor_core=_by_name(ops, _AMD_PRODUCT),
        loads=_by_width(ops, r"(global|buffer|flat)_load"),
        stores=_by_width(ops, r"(global|buffer|flat)_store"),
    )

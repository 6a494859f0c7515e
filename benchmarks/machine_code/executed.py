"""Warp instructions that a kernel executes, by what they are, from the loops of its machine code.

Basic blocks, dominators, back edges and natural loops are those of any compiler. The loops of the
machine code are those of the source in the same order and nest, which is checked; `loops.py` says
how often each turns. All of a loop's body counts with every turn, branches that few turns take and
instructions whose predicate does not hold among it: those cost an issue slot all the same.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from .loops import Loop

CLASSES = ("product", "shared", "global", "integer", "float", "special", "wait", "spill", "control")
WAIT = 12  # instructions at most in a loop that only waits, for memory or for a product


@dataclass(frozen=True)
class Instruction:
    name: str
    target: str | None = None  # label that it may go on at
    ends: bool = False  # never goes on behind itself


@dataclass(frozen=True)
class Code:
    """Of one function: instructions, and at which of them the labels are."""

    instructions: Sequence[Instruction]
    labels: dict[str, int]


# -------------------------------------------------------------------------------------------- loops


def _blocks(code: Code) -> tuple[list[range], list[list[int]]]:
    """Basic blocks, and the blocks that each may go on with."""
    count = len(code.instructions)
    starts = {0, *code.labels.values()}
    starts |= {i + 1 for i, x in enumerate(code.instructions) if x.target or x.ends}
    edges = [*sorted(i for i in starts if i < count), count]
    blocks = [range(a, b) for a, b in pairwise(edges)]
    index = {block.start: i for i, block in enumerate(blocks)}
    following = []
    for block in blocks:
        last = code.instructions[block[-1]]
        after = [] if last.ends or block.stop == count else [index[block.stop]]
        at = code.labels.get(last.target or "")
        following.append([*after, index[at]] if at in index else after)
    return blocks, following


def _reached(following: list[list[int]], start: int, without: int | None = None) -> set[int]:
    seen, todo = {start}, [start]
    while todo:
        for block in following[todo.pop()]:
            if block not in seen and block != without:
                seen.add(block)
                todo.append(block)
    return seen


def _dominators(following: list[list[int]]) -> dict[int, int]:
    """Of every block that is reached, as bits: the blocks that every way to it goes through."""
    reached = sorted(_reached(following, 0))
    before: dict[int, list[int]] = {block: [] for block in reached}
    for block in reached:
        for after in following[block]:
            before[after].append(block)
    everything = sum(1 << block for block in reached)
    found = dict.fromkeys(reached, everything)
    found[0] = 1
    changed = True
    while changed:
        changed = False
        for block in reached[1:]:
            through = everything
            for other in before[block]:
                through &= found[other]
            through |= 1 << block
            changed |= through != found[block]
            found[block] = through
    return found


def nest(code: Code) -> tuple[list[set[int]], set[int]]:
    """Loops in the order of their heads, each by its instructions; and all that can be reached."""
    blocks, following = _blocks(code)
    dominators = _dominators(following)
    before: dict[int, list[int]] = {block: [] for block in dominators}
    for block in dominators:
        for after in following[block]:
            before[after].append(block)
    loops: dict[int, set[int]] = {}
    for block, through in dominators.items():
        for head in following[block]:
            if through >> head & 1:  # a back edge
                body = loops.setdefault(head, {head})
                todo = [block]
                while todo:
                    inside = todo.pop()
                    if inside not in body:
                        body.add(inside)
                        todo += before[inside]
    bodies = [{i for block in loops[head] for i in blocks[block]} for head in sorted(loops)]
    return bodies, {i for block in dominators for i in blocks[block]}


def turns(code: Code, source: Sequence[Loop]) -> list[int]:
    """How often every instruction is executed.

    Raises:
        ValueError: where loops are not those of the source.
    """
    bodies, reached = nest(code)
    bodies = [body for body in bodies if len(body) > WAIT]
    depths = [sum(body < other for other in bodies) for body in bodies]
    if depths != [loop.depth for loop in source]:
        raise ValueError(f"loops of depths {depths}, the source's {[x.depth for x in source]}")
    times = [int(i in reached) for i in range(len(code.instructions))]
    for body, loop in zip(bodies, source, strict=True):
        for i in body:
            times[i] *= loop.turns
    return times


# ------------------------------------------------------------------------------------------- NVIDIA

_SASS_LABEL = re.compile(r"^\s*(\.L_x_\d+|\$[\w$.]+):")
_SASS = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+\{?\s*(@!?U?PT?\w*\s+)?([A-Z][A-Z0-9_.x]*)\s*(.*?)\s*;?\s*\}?\s*$"
)
_SASS_TARGET = re.compile(r"`\(([.$][\w$.]+)\)")
_SASS_CLASSES = {
    "product": "HMMA HGMMA DMMA IMMA QGMMA IGMMA UTCHMMA UTCQMMA UTCIMMA UTCOMMA",
    # what goes through its banks, and tensor memory
    "shared": "LDS LDSM STS STSM ATOMS SHFL MOVM LDTM STTM UTCCP REDUX",
    "global": "LDG LDGSTS STG LD ST ATOM ATOMG RED UTMALDG UTMASTG UTMAREDG UBLKCP",
    "float": "FADD FMUL FFMA FSEL FSETP FSET FMNMX FMNMX3 FCHK FSWZADD F2F F2FP F2I F2IP I2F I2FP "
    "FRND FADD2 FMUL2 FFMA2 HADD2 HMUL2 HFMA2 HMNMX2 HSETP2 HSET2 DADD DMUL DFMA DSETP",
    "special": "MUFU",
    "wait": "BAR WARPGROUP WARPGROUPSET WARPSYNC DEPBAR LDGDEPBAR MEMBAR FENCE ERRBAR CCTL CCTLL "
    "SYNCS UTCBAR ARRIVES NANOSLEEP UTCATOMSWS",
    "spill": "LDL STL",
    "control": "BRA BRX JMP EXIT CALL RET BSSY BSYNC BREAK BMOV NOP YIELD BPT ELECT",
}
_OF_SASS = {name: kind for kind, names in _SASS_CLASSES.items() for name in names.split()}


def sass(text: str) -> Code:
    """Of `nvdisasm -c`."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _SASS_LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif match := _SASS.match(line):
            predicate, name, operands = match.groups()
            operation = name.split(".")[0]
            target = _SASS_TARGET.search(operands)
            if operation not in ("BRA", "BRX", "JMP", "EXIT", "RET", "CALL"):
                instructions.append(Instruction(name))
                continue
            # A predicate stands ahead of the name or, of a whole warp, among the operands.
            always = not predicate and not re.search(r"\bU?P[\dT]", operands.split("`")[0])
            instructions.append(
                Instruction(name, target and target[1], always and operation != "CALL")
            )
    return Code(instructions, labels)


def kind(name: str) -> str:
    """Which of CLASSES an instruction is; "LDG.E.128" or "v_add_f32"."""
    if name[0].isupper():
        return _OF_SASS.get(name.split(".")[0], "integer")
    return next(kind for pattern, kind in _GCN_CLASSES if pattern.match(name))


_SASS_SHAPES = (
    (re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)\."), 4),  # of a warp group
    (re.compile(r"HMMA\.(16)(8)(16|8)\."), 1),
)


def flop(name: str) -> float:
    """Of one tensor-core instruction in one warp; 0 where its name does not say it (sm_100)."""
    for pattern, warps in (*_SASS_SHAPES, _GCN_SHAPE):
        if match := pattern.match(name):
            return 2 * prod(map(int, match.groups())) / warps
    return 0.0


# ---------------------------------------------------------------------------------------------- AMD

_GCN_LABEL = re.compile(r"^(\.LBB\w+):")
_GCN = re.compile(r"^\t([a-z][a-z0-9_]+)\b[ \t]*(\S*)")
_GCN_SHAPE = (re.compile(r"v_mfma_f32_(32|16)x(32|16)x(\d+)(?!\d|_\d+b)"), 1)
_GCN_CLASSES = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        ("v_mfma", "product"),
        ("ds_|v_.*_dpp|v_readlane|v_writelane", "shared"),
        ("global_|buffer_|flat_|s_load|s_buffer", "global"),
        ("scratch_|v_accvgpr", "spill"),
        ("v_(exp|log|rcp|rsq|sqrt|sin|cos)_", "special"),
        ("s_waitcnt|s_barrier|s_nop|s_sleep|s_delay", "wait"),
        (r"s_c?branch|s_endpgm|s_setpc|s_swappc|s_and_saveexec|s_or_saveexec", "control"),
        (r"v_(cvt_|pk_)?\w*_b?f(16|32|64)", "float"),
        ("", "integer"),
    )
)


def gcn(text: str) -> Code:
    """Of the "amdgcn" of a compiled kernel."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _GCN_LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif match := _GCN.match(line):
            name, operand = match.groups()
            branch = re.match(r"s_c?branch", name)
            ends = name in ("s_branch", "s_endpgm", "s_setpc_b64")
            instructions.append(Instruction(name, operand if branch else None, ends))
    return Code(instructions, labels)


# --------------------------------------------------------------------------------------------- both


@dataclass(frozen=True)
class Executed:
    """Of one warp of one program."""

    instructions: dict[str, int]  # by CLASSES
    flop: float  # on tensor cores, as far as instructions' names say


def executed(code: Code, source: Sequence[Loop]) -> Executed:
    """Instructions with all turns."""
    times = turns(code, source)
    count: Counter[str] = Counter(dict.fromkeys(CLASSES, 0))
    work = 0.0
    for instruction, n in zip(code.instructions, times, strict=True):
        count[kind(instruction.name)] += n
        work += n * flop(instruction.name)
    return Executed(dict(count), work)

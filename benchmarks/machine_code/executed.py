"""Warp instructions that a kernel executes, by what they are, from the loops of its machine code.

Basic blocks and loops are those of any compiler. The loops of the machine code are those of the
source in the same order and nest, which is checked; `loops.py` says how often each turns. All of a
loop's body counts with every turn, branches that few turns take and instructions whose predicate
does not hold among it: those cost an issue slot all the same.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
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


def _reached(start: int, following: Sequence[Iterable[int]], inside: set[int]) -> set[int]:
    seen, todo = {start}, [start]
    while todo:
        for block in following[todo.pop()]:
            if block in inside and block not in seen:
                seen.add(block)
                todo.append(block)
    return seen


def _loops(inside: set[int], following: list[set[int]]) -> Iterator[tuple[int, set[int]]]:
    """Heads and bodies: blocks that reach each other, and so on without the edges to a head.

    A body that is entered at several blocks has several heads; the first counts.
    """
    before: list[set[int]] = [set() for _ in following]
    for block, after in enumerate(following):
        for other in after:
            before[other].add(block)
    left = set(inside)
    while left:
        block = min(left)
        body = _reached(block, following, inside) & _reached(block, before, inside)
        left -= body
        if len(body) == 1 and block not in following[block]:
            continue
        heads = {x for x in body if before[x] - body} or {block}
        yield min(heads), body
        without = [after - heads if x in body else set() for x, after in enumerate(following)]
        yield from _loops(body, without)


def nest(code: Code) -> tuple[list[set[int]], set[int]]:
    """Loops in the order of their heads, each by its instructions; and all that can be reached."""
    blocks, edges = _blocks(code)
    reached = _reached(0, edges, set(range(len(blocks))))
    following = [set(after) if i in reached else set() for i, after in enumerate(edges)]
    found = sorted(_loops(reached, following), key=lambda loop: (loop[0], -len(loop[1])))
    bodies = [{i for block in body for i in blocks[block]} for _, body in found]
    return bodies, {i for block in reached for i in blocks[block]}


def _matched(depths: Sequence[int], source: Sequence[Loop]) -> list[Loop]:
    """The source's loops that are loops still: one of a single turn may have become none."""
    single = [i for i, loop in enumerate(source) if loop.turns <= 1]
    for gone in combinations(single, max(0, len(source) - len(depths))):
        kept = [i for i in range(len(source)) if i not in gone]
        outside = {i: sum(g in _around(source, i) for g in gone) for i in kept}
        if [source[i].depth - outside[i] for i in kept] == list(depths):
            return [source[i] for i in kept]
    raise ValueError(f"loops of depths {list(depths)}, the source's {[x.depth for x in source]}")


def _around(source: Sequence[Loop], at: int) -> set[int]:
    """Loops that a loop stands in."""
    found, depth = set(), source[at].depth
    for i in reversed(range(at)):
        if source[i].depth < depth:
            found.add(i)
            depth = source[i].depth
    return found


def turns(code: Code, source: Sequence[Loop]) -> list[int]:
    """How often every instruction is executed.

    Raises:
        ValueError: where loops are not those of the source.
    """
    bodies, reached = nest(code)
    bodies = [body for body in bodies if len(body) > WAIT]
    loops = _matched([sum(body < other for other in bodies) for body in bodies], source)
    times = [int(i in reached) for i in range(len(code.instructions))]
    for body, loop in zip(bodies, loops, strict=True):
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
            if predicate and predicate.strip() == "@!PT":  # never carried out: ptxas waits by it
                name = "NOP"
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


def width(name: str) -> int:
    """Bytes of a thread that an instruction moves to or from global memory.

    LDG.E.128 loads 16, LDG.E.U16 two, LDG.E four; global_load_dwordx4 16, buffer_store_short two.
    """
    if match := _GCN_ACCESS.fullmatch(name):
        return next(size for what, size in _GCN_WIDTHS if what in match[1])
    operation, *suffixes = name.split(".")
    if operation not in ("LDG", "LDGSTS", "STG"):
        return 0
    bits = [int(s.lstrip("US")) for s in suffixes if re.fullmatch(r"[US]?(8|16|64|128)", s)]
    return (bits or [32])[0] // 8


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


_PTX_LABEL = re.compile(r"(\$\w+):$")
_PTX = re.compile(r"(@!?%\w+\s+)?(\S+)\s*(.*)", re.DOTALL)


def ptx(text: str) -> Code:
    """Of the "ptx" of a compiled kernel: statements as a GPU would issue them, were it PTX's."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    rest = ""
    for line in text[text.index("\n{") + 2 :].splitlines():
        line = line.split("//")[0].strip()
        if line == "}":
            break
        if not line or line.startswith("."):
            continue
        if label := _PTX_LABEL.match(line):
            labels[label[1]] = len(instructions)
            continue
        *statements, rest = f"{rest} {line}".split(";")
        for statement in statements:
            match = _PTX.match(statement.strip())
            assert match, statement
            predicate, name, operands = match.groups()
            target = operands.strip() if name in ("bra", "bra.uni") else None
            ends = not predicate and name in ("bra", "bra.uni", "ret", "exit")
            instructions.append(Instruction(name, target, ends))
    return Code(instructions, labels)


# ---------------------------------------------------------------------------------------------- AMD

_GCN_LABEL = re.compile(r"^(\.LBB\w+):")
_GCN = re.compile(r"^\t([a-z][a-z0-9_]+)\b[ \t]*(\S*)")
_GCN_ACCESS = re.compile(r"(?:global|buffer|flat)_(?:load|store)_(\w+)")
_GCN_WIDTHS = (  # of "dwordx4", "lds_dwordx4", "ushort_d16", ...
    *(("dwordx4", 16), ("dwordx3", 12), ("dwordx2", 8), ("dword", 4), ("short", 2), ("byte", 1)),
)
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
    traffic: int  # bytes of a thread, to and from global memory
    flop: float  # on tensor cores, as far as instructions' names say


def executed(code: Code, source: Sequence[Loop]) -> Executed:
    """Instructions with all turns."""
    times = turns(code, source)
    count: Counter[str] = Counter(dict.fromkeys(CLASSES, 0))
    work, traffic = 0.0, 0
    for instruction, n in zip(code.instructions, times, strict=True):
        count[kind(instruction.name)] += n
        traffic += n * width(instruction.name)
        work += n * flop(instruction.name)
    return Executed(dict(count), traffic, work)

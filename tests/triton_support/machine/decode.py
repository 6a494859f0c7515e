"""PTX text to the core's instructions. What it does not know is an error with its text."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

from .build import operations
from .opcodes import WIDTH
from .statements import Unsupported, decode

INSTRUCTION = np.dtype(
    [(name, "i4") for name in ["op", "pred", "pneg", "ext", "n", "aux", "aux2", "line"]]
    + [("imm", "i8")]
)
SPECIAL = ("%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%warpid", "%laneid")
SIZES = ("%nctaid", "%ntid")
LANES = 32


@dataclass(frozen=True)
class Program:
    """A kernel, decoded. Registers are slots of 32 words, one a lane; 64 bits take two words."""

    name: str
    code: np.ndarray
    operands: np.ndarray  # slots, by Instruction.ext
    registers: np.ndarray  # as a warp starts with them: constants in place
    special: np.ndarray  # slots of SPECIAL, -1 where not read
    sizes: dict[str, int]  # slots of the grid's and the program's sizes
    parameters: list[tuple[str, int, int]]  # name, offset, bytes
    lines: list[str]
    warps: int

    def source(self, line: int) -> str:
        """The line of Python that a line of PTX is of."""
        files = {}
        for text in self.lines:
            if m := re.match(r"\s*\.file\s+(\d+) \"([^\"]*)\"(?:,? \"([^\"]*)\")?", text):
                files[m[1]] = (m[3] or m[2]).rsplit("/", 1)[-1]
        for text in reversed(self.lines[:line]):
            if m := re.match(r"\s*\.loc\s+(\d+) (\d+)", text):
                return f"{files.get(m[1], m[1])}:{m[2]}"
        return "?"


class Decoder:
    """One pass over the text of one kernel."""

    def __init__(self, text: str) -> None:
        self.lines = text.split("\n")
        self.words, self.line = 0, 0
        self.constants: list[tuple[int, np.ndarray]] = []
        self.slots: dict[object, int] = {}
        self.widths: dict[str, int] = {}  # of registers, in bits
        self.operands: list[int] = []
        self.code: list[tuple[int, ...]] = []
        self.labels: dict[str, int] = {}
        self.jumps: list[tuple[int, str]] = []
        self.parameters: list[tuple[str, int, int]] = []
        self.bytes, self.threads, self.name = 0, 128, ""
        self.static: dict[str, int] = {}  # symbols of shared memory
        self.opcodes: Counter[str] = Counter()
        self.guard = (-1, 0)

    # ------------------------------------------------------------------------------- registers

    def slot(self, key: object, width: int = 32) -> int:
        if key not in self.slots:
            self.slots[key] = self.words
            self.words += 2 * LANES if width == 64 else LANES
        return self.slots[key]

    def constant(self, value: int, width: int) -> int:
        key = ("constant", value, width)
        if key not in self.slots:
            at = self.slot(key, width)
            if width == 64:
                words = np.full(LANES, value % 2**64, np.uint64).view(np.uint32)
            elif width == 1:  # a predicate is a word: a bit a lane
                words = np.full(1, 0xFFFFFFFF if value else 0, np.uint32)
            else:
                words = np.full(LANES, value % 2 ** max(width, 16), np.uint32)
            self.constants.append((at, words))
        return self.slots[key]

    def operand(self, text: str, width: int) -> int:
        """The slot of a register or constant, -1 of none."""
        text = text.strip()
        if text in ("_", ""):
            return -1
        if text in SPECIAL or text.startswith(SIZES):
            return self.slot(text)
        if text.startswith("%"):
            have = self.widths.get(text)
            if have is None:
                raise Unsupported(f"register {text}")
            if (have == 64) != (width == 64) or (have == 1) != (width == 1):
                raise Unsupported(f"{text} holds {have} bits, {width} wanted")
            return self.slots[text]
        if text.startswith(("0f", "0d")):
            return self.constant(int(text[2:], 16), 32 if text[1] == "f" else 64)
        if text in self.static:
            return self.constant(self.static[text], width)
        if text in ("true", "false"):
            return self.constant(text == "true", 1)
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            return self.constant(int(text.rstrip("U"), 0), width)
        raise Unsupported(f"operand {text}")

    def vector(self, text: str, width: int) -> list[int]:
        return [self.operand(x, width) for x in text.strip().strip("{}").split(",")]

    def wide(self, text: str) -> bool:
        """Whether any register of a vector has 64 bits."""
        return any(self.widths.get(x.strip()) == 64 for x in text.strip().strip("{}").split(","))

    def emit(
        self, op: str, operands: list[int], *, n: int = 0, aux: int = 0, aux2: int = 0, imm: int = 0
    ) -> None:
        at = len(self.operands)
        self.code.append((operations()[op], *self.guard, at, n, aux, aux2, self.line, imm))
        self.operands += operands

    # ------------------------------------------------------------------------------------ text

    def run(self) -> Program:
        part, buffer = self._head, ""
        for number, raw in enumerate(self.lines, 1):
            self.line = number
            text = raw.split("//")[0].strip()
            if not text or text.startswith((".loc", ".file", ".pragma", ".section")):
                continue
            if part != self._body:
                part = part(text) or part
            elif text == "}":
                break
            elif not self._declares(text):
                *statements, buffer = f"{buffer} {text}".split(";")
                for statement in statements:
                    self._statement(statement.strip())
        return self._program()

    def _head(self, text: str):
        if m := re.match(r"\.extern \.shared .*?\.b8 (\w+)\[\]", text):
            self.static[m[1]] = 0
        elif ".entry" in text:
            self.name = re.search(r"\.entry (\w+)", text)[1]
            return self._head_of_entry
        elif ".shared" in text or ".func" in text:
            raise Unsupported(text)
        return None

    def _head_of_entry(self, text: str):
        if m := re.match(r"\.param \.(\w+)(?: \.ptr.*?)? (\w+?)(?:\[(\d+)\])?,?$", text):
            size = WIDTH[m[1]] // 8 * int(m[3] or 1)
            at = -(-self.bytes // size) * size
            self.parameters.append((m[2], at, size))
            self.bytes = at + size
        elif m := re.match(r"\.reqntid (\d+)", text):
            self.threads = int(m[1])
        elif text == "{":
            return self._body
        elif text not in "()" and not text.startswith((".maxntid", ".minnctapersm", ".maxnreg")):
            raise Unsupported(text)
        return None

    def _body(self, text: str):
        raise NotImplementedError

    def _declares(self, text: str) -> bool:
        if m := re.match(r"\.reg \.(\w+)\s+(%\w+)<(\d+)>;", text):
            for i in range(int(m[3])):
                self.widths[f"{m[2]}{i}"] = WIDTH[m[1]]
                self.slot(f"{m[2]}{i}", WIDTH[m[1]])
            return True
        if m := re.match(r"(\$\w+):$", text):
            self.labels[m[1]] = len(self.code)
            return True
        if text.startswith(("{", ".reg")):
            raise Unsupported(text)
        return False

    def _statement(self, text: str) -> None:
        self.guard = (-1, 0)
        whole = text
        if m := re.match(r"@(!?)(%\w+)\s+(.*)", text, re.DOTALL):
            self.guard, text = (self.slots[m[2]], int(bool(m[1]))), m[3]
        opcode, _, rest = text.partition(" ")
        self.opcodes[opcode] += 1
        try:
            decode(self, opcode.strip(), _split(rest))
        except (Unsupported, KeyError, ValueError, IndexError) as error:
            raise Unsupported(f"line {self.line}: {whole} ({error})") from error

    def _program(self) -> Program:
        code = np.array(self.code, dtype=INSTRUCTION)
        for at, label in self.jumps:
            code["imm"][at] = self.labels[label]
        registers = np.full(self.words, 0xFFFFFFFF, np.uint32)
        for at, words in self.constants:
            registers[at : at + len(words)] = words
        return Program(
            name=self.name,
            code=code,
            operands=np.array(self.operands or [0], np.int32),
            registers=registers,
            special=np.array([self.slots.get(name, -1) for name in SPECIAL], np.int32),
            sizes={k: v for k, v in self.slots.items() if str(k).startswith(SIZES)},
            parameters=self.parameters,
            lines=self.lines,
            warps=self.threads // LANES,
        )


def _split(text: str) -> list[str]:
    """Operands: at commas outside of brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def parse(text: str) -> Program:
    """Decode the text of one kernel."""
    return Decoder(text).run()

"""How often the loops of a kernel turn, and what its products need: read from Triton's own IR.

A launch's integers go in, so that bounds are numbers. What a kernel loads is as large as it may be:
`min(loaded, 128)` is 128, so blocks are full; a condition on it holds. A bound that changes from
turn to turn is that of the first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil, inf, prod


@dataclass(frozen=True)
class Loop:
    """A loop of the source, in the order of their heads."""

    depth: int
    turns: int  # each time that it is entered


@dataclass
class Source:
    """Of one program."""

    loops: list[Loop] = field(default_factory=list)
    flop: float = 0.0  # of products, with all turns,
    tensor_memory: float = 0.0  # and of those among them that leave their sum in tensor memory


Number = float | None  # None: not known when it is launched

_FUNCTION = re.compile(r"tt\.func public @\w+\((.*)")
_ARGUMENT = re.compile(r"(%[\w.$-]+): ([^,{( ]+)")
_ASSIGNED = re.compile(r"(%[\w.$-]+)(?::\d+)? = ")
_FOR = re.compile(
    r"scf\.for (%[\w.$-]+) = (%[\w.$-]+) to (%[\w.$-]+) step (%[\w.$-]+)"
    r"(?: iter_args\((.*?)\) ->)?"
)
_CONSTANT = re.compile(r"arith\.constant (?:(-?\d+) : i|(true|false))")
_VALUE = re.compile(r"%[\w.$-]+(?:#\d+)?")
_DOT = re.compile(
    r"tt\.dot .*: tensor<([\dx]+)x\w+> \* tensor<([\dx]+)x\w+> ->"
    r"|ttng\.tc_gen5_mma .*? : !ttg\.memdesc<([\dx]+)x\w+,[^>]*>, !ttg\.memdesc<([\dx]+)x\w+,"
)
_CLOSE = re.compile(r"\}\s*(else\s*\{)?")


def _both(function: Callable[[float, float], float]) -> Callable[..., Number]:
    return lambda x, y: None if x is None or y is None else function(x, y)


def _least(x: Number, y: Number) -> Number:
    known = [v for v in (x, y) if v is not None]
    return min(known) if known else None


def _toward_zero(x: float, y: float) -> float:
    return (abs(x) // abs(y)) * (1 if x * y >= 0 else -1) if y else inf


_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y,
    "slt": lambda x, y: x < y,
    "sle": lambda x, y: x <= y,
    "sgt": lambda x, y: x > y,
    "sge": lambda x, y: x >= y,
}
_COMPARE |= {"u" + name[1:]: f for name, f in _COMPARE.items() if name[0] == "s"}
_COMPUTE: dict[str, Callable[..., Number]] = {
    "addi": _both(lambda x, y: x + y),
    "subi": _both(lambda x, y: x - y),
    "muli": _both(lambda x, y: x * y),
    "divsi": _both(_toward_zero),
    "divui": _both(_toward_zero),
    "remsi": _both(lambda x, y: x - y * _toward_zero(x, y)),
    "remui": _both(lambda x, y: x - y * _toward_zero(x, y)),
    "ceildivsi": _both(lambda x, y: ceil(x / y)),
    "andi": _both(lambda x, y: int(x) & int(y)),
    "ori": _both(lambda x, y: int(x) | int(y)),
    "xori": _both(lambda x, y: int(x) ^ int(y)),
    "minsi": _least,
    "minui": _least,
    "maxsi": _both(max),
    "maxui": _both(max),
    **dict.fromkeys(("extsi", "extui", "trunci", "index_cast"), lambda x: x),
    "select": lambda c, x, y: y if c == 0 else x,
}


class _Reader:
    def __init__(self, text: str, integers: Sequence[int]) -> None:
        self.lines = [line.strip() for line in text.splitlines()]
        self.at = 0
        self.values: dict[str, Number] = {}
        self.integers = list(integers)
        self.found = Source()

    def read(self) -> Source:
        while self.at < len(self.lines):
            if match := _FUNCTION.match(self._next()):
                self._arguments(match[1])
                self._region(0, 1.0)
                break
        return self.found

    def _next(self) -> str:
        self.at += 1
        return self.lines[self.at - 1]

    def _arguments(self, text: str) -> None:
        names = [name for name, kind in _ARGUMENT.findall(text) if re.fullmatch(r"i\d+", kind)]
        if len(names) != len(self.integers):
            raise ValueError(f"{len(self.integers)} integers for {', '.join(names) or 'none'}")
        self.values.update(zip(names, self.integers, strict=True))

    def _region(self, depth: int, times: float) -> tuple[list[Number], bool]:
        """What it yields, and whether another one follows (else)."""
        yielded: list[Number] = []
        while self.at < len(self.lines):
            line = self._next()
            if match := _CLOSE.match(line):
                return yielded, bool(match[1])
            if line.startswith("scf.yield"):
                yielded = [self._value(x) for x in _VALUE.findall(line.split(":")[0])]
            elif "scf.for " in line:
                self._for(line, depth, times)
            elif "scf.if " in line:
                self._if(line, depth, times)
            elif "scf.while" in line:
                raise ValueError("a while loop: nothing says how often it turns")
            elif _opens(line):  # reductions
                self._region(depth, times)
            else:
                self._operation(line, times)
        return yielded, False

    def _for(self, line: str, depth: int, times: float) -> None:
        match = _FOR.search(line)
        assert match, line
        first, end, step = (self._value(name) for name in match.groups()[1:4])
        if first is None or end is None or not step:
            raise ValueError(f"a loop with bounds that nothing tells: {line}")
        turns = max(0, ceil((end - first) / step))
        self.found.loops.append(Loop(depth, turns))
        self.values[match[1]] = first
        for pair in (match[5] or "").split(", "):
            name, _, initial = pair.partition(" = ")
            self.values[name] = self._value(initial)
        self._region(depth + 1, times * turns)
        self._assign(line, [])

    def _if(self, line: str, depth: int, times: float) -> None:
        """Both sides are there; the one that is taken counts."""
        condition = self._value(_VALUE.findall(line.split("scf.if")[1])[0])
        taken = condition != 0
        yielded, more = self._region(depth, times if taken else 0.0)
        if more:
            other, _ = self._region(depth, 0.0 if taken else times)
            yielded = yielded if taken else other
        self._assign(line, yielded)

    def _operation(self, line: str, times: float) -> None:
        if match := _DOT.search(line):
            first, second = (
                [int(x) for x in shape.split("x")] for shape in match.groups() if shape
            )
            work = times * 2 * prod(first) * second[-1]
            self.found.flop += work
            self.found.tensor_memory += work if match[3] else 0.0
        elif match := _CONSTANT.search(line):
            self._assign(line, [int(match[1]) if match[1] else int(match[2] == "true")])
        elif "arith." in line and "tensor<" not in line:
            self._arithmetic(line)
        else:
            self._assign(line, [])

    def _arithmetic(self, line: str) -> None:
        operation = line.split("arith.")[1].split(" ")[0]
        operands = [self._value(x) for x in _VALUE.findall(line.split("arith.")[1].split(" : ")[0])]
        if operation == "cmpi":
            compare = _COMPARE[line.split("cmpi ")[1].split(",")[0]]
            value = _both(compare)(*operands)
        else:
            value = _COMPUTE[operation](*operands) if operation in _COMPUTE else None
        self._assign(line, [value])

    def _value(self, name: str) -> Number:
        return self.values.get(name)

    def _assign(self, line: str, values: list[Number]) -> None:
        """A name may stand again in another region, for another value."""
        if match := _ASSIGNED.match(line):
            self.values[match[1]] = values[0] if values else None
            for i, value in enumerate(values):
                self.values[f"{match[1]}#{i}"] = value


def _opens(line: str) -> bool:
    return line.split(" loc(")[0].rstrip().endswith(("{", "({"))


def read(text: str, integers: Sequence[int]) -> Source:
    """Loops and products of a kernel.

    Args:
        text (str): of the module, "ttir" or "ttgir" of a compiled kernel.
        integers (sequence of int): what the launch gives the kernel's integers, in their order.

    Raises:
        ValueError: where nothing tells how often a loop turns.
    """
    return _Reader(text, integers).read()

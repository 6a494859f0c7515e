"""What a GPU can do, and what kernels need of it: rates, and counts from machine code.

`python -m benchmarks.machine_code.hardware` compiles the kernels for sm_90 with the tiles that ship
and writes warp instructions, and bytes through L1, of a token and head into instructions.json.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

RECORD = Path(__file__).with_name("instructions.json")
COMMAND = "python -m benchmarks.machine_code.hardware"
HEAD_DIMS, CHUNKS = (64, 128), (16, 64)


@dataclass(frozen=True)
class GPU:
    """Rates a second. A multiprocessor issues 4 warp instructions a cycle, L1 serves 128 bytes."""

    name: str
    flops: float  # products in bfloat16
    bytes: float  # to and from memory
    cache: float = 5.5e12  # bytes through L2; an estimate
    cache_size: int = 50 * 10**6
    sms: int = 132
    clock: float = 1.755e9

    @property
    def issue(self) -> float:
        return 4 * self.sms * self.clock

    @property
    def near(self) -> float:
        return 128 * self.sms * self.clock


# Products and bytes of an H200 were measured. An H100 SXM is the same chip with other memory:
# 3.35 TB/s by its data sheet (https://www.nvidia.com/en-us/data-center/h100/) where the H200's
# 4.8 (https://www.nvidia.com/en-us/data-center/h200/) give 4.3.
H200 = GPU("H200", 790e12, 4.3e12)
H100 = GPU("H100 SXM", 790e12, 3.0e12)
GPUS = (H200, H100)


class Demand(NamedTuple):
    """Of a token and head."""

    instructions: float
    bytes: float  # to and from L1, of all threads: what a predicate leaves out is among them


@cache
def _recorded() -> dict[str, dict[str, list[float]]]:
    return json.loads(RECORD.read_text(encoding="utf-8"))["kernels"]


def demand(name: str, D: int, hidden: int, chunk: int, training: bool) -> Demand:
    """What a pass executes: that of the recorded size next to this one, by the size of a matrix."""
    of = min((x for x in HEAD_DIMS if x >= D), default=HEAD_DIMS[-1])
    row = _recorded()[_key(of, CHUNKS[0] if chunk <= 32 else CHUNKS[1], training)]
    times = 1.0 if "coefficients" in name else D * hidden / (4 * of * of)
    return Demand(*(times * x for x in row[name]))


def _key(D: int, chunk: int, training: bool) -> str:
    return f"D {D}, chunk {chunk}" + (", training" if training else "")


def record() -> None:
    """Compiles, which takes minutes."""
    import triton

    from . import static
    from .offline import compiling

    kernels: dict[str, dict[str, list[float]]] = {}
    for D, chunk, training in product(HEAD_DIMS, CHUNKS, (False, True)):
        row = kernels[_key(D, chunk, training)] = {}
        only = {"coefficients_kernel", "scan_kernel", "retrieve_kernel"}
        for backward in (False, True) if training else (False,):
            with compiling("sm_90", None if backward else only) as reports:
                static.launch(D, "sm_90", chunk=chunk, backward=backward, training=training)
            for report in static.together(reports):
                tokens = static.T * static.H
                row[static.name(report)] = [
                    round(static.a_token(report), 1),
                    round(report.traffic / tokens, 1),
                ]
        print(_key(D, chunk, training), row, flush=True)
    lines = [f"    {json.dumps(key)}: {json.dumps(row)}" for key, row in kernels.items()]
    head = f'  "command": "{COMMAND}",\n  "triton": "{triton.__version__}",\n'
    text = "{\n" + head + '  "kernels": {\n' + ",\n".join(lines) + "\n  }\n}\n"
    RECORD.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(record())

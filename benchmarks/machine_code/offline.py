"""Compiles kernels for GPUs that are not there, with the arguments that a launch would give them.

Triton specialises a kernel on its arguments: dtypes, a pointer's or a size's divisibility by 16, a
size of one. So nothing is described here: code that launches kernels runs as it is, on CPU or meta
tensors, under a stand-in for the GPU's driver, and every launch compiles instead.

    with compiling("sm_90") as reports:
        matmul_kernel[(1,)](a, b, c, M, N, K, BM=64, num_warps=4)
    assert not reports[0].faults()

needs a process that does not interpret. From a test that does, name a function that launches:

    reports = collect("launches:matmul", ["sm_90", "gfx942"], [{"D": 64}, {"D": 128}])

or look at the figures by hand:

    python -m benchmarks.machine_code.offline launches:matmul --arch sm_90 --case '{"D": 64}'
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from .sass import ARCHITECTURES, Report, report


class _StandIn(DriverBase):
    """A driver that knows its GPU's target, and no GPU."""

    def __init__(self, arch: str) -> None:
        self.arch = arch
        gpu = ARCHITECTURES[arch]
        self.target = GPUTarget(gpu.backend, gpu.name, gpu.warp)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return self.arch  # kernels are kept by device: every architecture has its own

    def set_current_device(self, device: Any) -> None:
        pass

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise RuntimeError("there is no GPU to measure on")


@contextmanager
def compiling(arch: str, only: Container[str] | None = None) -> Iterator[list[Report]]:
    """Compile for `arch` what is launched inside; the list grows by a report a launch.

    Of kernels by other names than `only`, nothing happens.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: this process interprets kernels")
    reports: list[Report] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if only is not None and self.__name__ not in only:
            return None
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        defaults = {p.name: p.default for p in self.params}
        given = defaults | dict(zip(self.arg_names, args, strict=False)) | kwargs
        fixed = {p.name: str(given[p.name]) for p in self.params if p.is_constexpr}
        kinds = compiled.src.signature
        integers = list(_integers([*kinds.values()], [given[name] for name in kinds]))
        programs = prod(grid(given) if callable(grid) else grid)
        fixed |= _constants(given.values())
        reports.append(report(compiled, arch, fixed, integers, programs))
        return compiled

    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(driver, "_active", _StandIn(arch)),
    ):
        yield reports


def _integers(types: Sequence[Any], values: Sequence[Any]) -> Iterator[int]:
    """Of a launch's arguments those that stay integers, records' too; one may be a constant."""
    for kind, value in zip(types, values, strict=True):
        if not isinstance(kind, str):
            yield from _integers(kind, value)
        elif re.fullmatch(r"[iu]\d+", kind):
            yield int(value)


def _constants(arguments: Iterable[Any]) -> dict[str, str]:
    """What is compiled in as fields of records, by the fields' names."""
    records = [x for x in arguments if isinstance(x, tuple) and hasattr(x, "_fields")]
    fields = [pair for record in records for pair in record._asdict().items()]
    return {name: str(x.value) for name, x in fields if isinstance(x, triton.language.constexpr)}


def compile_kernel(kernel: Any, arch: str, *args: Any, **kwargs: Any) -> Report:
    """Compile one kernel; arguments as a launch gives them, `num_warps` and the like included."""
    with compiling(arch) as reports:
        kernel[(1,)](*args, **kwargs)
    return reports[0]


def collect(
    launch: str, architectures: Iterable[str], cases: Iterable[Mapping[str, Any]] = ({},)
) -> list[Report]:
    """Reports of what a function launches, from a process of its own.

    Args:
        launch (str): "module:function", found where this process finds modules.
        architectures (iterable of str): of ARCHITECTURES.
        cases (iterable of dict): keyword arguments of the function, JSON's types.

    Returns:
        list of Report: of every architecture, case and launch, in this order.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    arguments = [launch]
    arguments += [word for arch in architectures for word in ("--arch", arch)]
    arguments += [word for case in cases for word in ("--case", json.dumps(dict(case)))]
    with tempfile.NamedTemporaryFile("r", suffix=".json") as out:
        command = [sys.executable, "-m", __name__, *arguments, "--json", out.name]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(f"{launch} did not compile:\n{done.stdout}{done.stderr}")
        return [_from_json(line) for line in out]


def _from_json(line: str) -> Report:
    fields = json.loads(line)
    for name in ("loads", "stores"):
        fields[name] = {int(size): n for size, n in fields[name].items()}
    return Report(**fields)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.machine_code.offline")
    parser.add_argument("launch", help="module:function that launches kernels")
    parser.add_argument("--arch", action="append", choices=list(ARCHITECTURES), help="default: all")
    parser.add_argument("--case", action="append", type=json.loads, help="its arguments, in JSON")
    parser.add_argument("--json", type=Path, help="write reports here, one a line")
    options = parser.parse_args(argv)

    module, function = options.launch.split(":")
    launch = getattr(importlib.import_module(module), function)
    reports = []
    for arch in options.arch or ARCHITECTURES:
        for case in options.case or [{}]:
            with compiling(arch) as found:
                launch(**case)
            reports += found
    if options.json:
        options.json.write_text("".join(json.dumps(asdict(r)) + "\n" for r in reports))
    else:
        print("\n".join(map(str, reports)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

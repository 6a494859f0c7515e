"""Triton's launches, executed: compiled as for a GPU that is not there, on tensors of the CPU."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from benchmarks.machine_code.offline import _integers, _StandIn

from .decode import Program, parse
from .program import Found, Memory, execute

Edit = Callable[[str, str], str]  # of a kernel's name and PTX: other PTX
CACHE = f"{tempfile.gettempdir()}/titans_kernels-machine-{triton.__version__}-{os.getuid()}"
_programs: dict[str, Program] = {}


@contextmanager
def executing(
    arch: str,
    *,
    seed: int = 0,
    late: bool = True,
    poison: bool = False,
    edit: Edit | None = None,
    assemble: bool = False,
) -> Iterator[list[Found]]:
    """Execute what is launched inside; the list grows by what each launch showed.

    With `assemble`, ptxas makes machine code too: it is not executed, but can be counted.
    """
    found: list[Found] = []
    run = JITFunction.run

    def launch(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        text = compiled.asm["ptx"]
        text = edit(self.__name__, text) if edit else text
        if text not in _programs:
            _programs[text] = parse(text)
        program = _programs[text]
        if program.warps != compiled.metadata.num_warps:
            raise ValueError(f"{self.__name__}: {program.warps} warps in PTX")
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        values = list(_runtime(self, compiled.src.signature, given))
        values += [0, 0]  # scratch in global memory, of the kernel and of a profiler: not used
        sides = grid(given) if callable(grid) else grid
        found.append(
            execute(
                program,
                tuple(sides),
                values,
                compiled.metadata.shared,
                seed=seed + len(found),
                late=late,
                poison=poison,
            )
        )
        found[-1].kernel = self.__name__
        found[-1].compiled, found[-1].programs = compiled, prod(sides)
        kinds = compiled.src.signature
        defaults = {p.name: p.default for p in self.params}
        given = [(defaults | given)[name] for name in kinds]
        found[-1].integers = list(_integers([*kinds.values()], given))
        return compiled

    with ExitStack() as stack:
        if not assemble:
            # ptxas is not needed, and takes longer than all before it. What is compiled without it
            # is kept apart, so that no other process finds kernels with no machine code.
            stack.enter_context(mock.patch.object(CUDABackend, "make_cubin", lambda *_: b""))
            stack.enter_context(mock.patch.object(type(triton.knobs.cache), "dir", CACHE))
        stack.enter_context(mock.patch.object(JITFunction, "run", launch))
        stack.enter_context(mock.patch.object(driver, "_active", _StandIn(arch)))
        yield found


def _runtime(kernel: Any, signature: dict[str, Any], given: dict[str, Any]) -> Iterator[Any]:
    """What a launch passes: every leaf of the arguments that compilation has not fixed."""
    for parameter in kernel.params:
        value = given.get(parameter.name, parameter.default)
        yield from _leaves(signature[parameter.name], value)


def _leaves(kind: Any, value: Any) -> Iterator[Any]:
    if isinstance(kind, tuple | list):
        for k, v in zip(kind, value, strict=True):
            yield from _leaves(k, v)
    elif kind != "constexpr":
        if torch.is_tensor(value):
            storage = value.untyped_storage()
            offset = value.storage_offset() * value.element_size()
            yield Memory(storage.data_ptr(), storage.nbytes(), offset)
        else:
            yield value

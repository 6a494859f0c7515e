"""Watches every access to memory of kernels that the interpreter runs.

    with sanitize(seed=0):
        o, state = neural_memory(..., backend="triton")

raises `MemoryFault`, with the argument, the program and the kernel's line in the traceback, for

    bounds         an access outside the tensors, views included, that are arguments of the launch
    uninitialised  a load of what was not written since `torch.empty` (or one of its kin)
    unwritten      at the end: a tensor of `torch.empty`, an argument of a launch, that is not full
    race           programs of one launch that touch one element, one of them storing
    barrier        a program that loads what it stored with no `tl.debug_barrier()` in between: on a
                   GPU another thread stored it
    duplicate      two lanes of one store that put different values in one element
    overflow       an int32 sum, difference or product that wraps

A seed runs the programs of every launch in an order of its own. `torch.empty` and its kin return
poison while the context is open, and a masked-off lane of a float load without `other` is NaN.
Uninitialised memory is recognised by its bits: tensors of bytes, and any over 256 MiB, are not
followed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Set
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter as stock
from triton.runtime.interpreter import TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

from .interpreter import QUIET_NAN, DeviceBuilder, install
from .memory import SEVERAL, Allocation, Array, is_poison, poison, poisoned

MEMORY_CHECKS = frozenset({"bounds", "uninitialised", "race", "barrier", "duplicate"})
CHECKS = MEMORY_CHECKS | {"unwritten", "overflow"}


class MemoryFault(AssertionError):
    """A kernel did what no GPU forgives."""


class Sanitizer:
    """What is known of the launches in one `sanitize` context."""

    def __init__(self, checks: Set[str], seed: int | None, partial: Set[str]) -> None:
        if unknown := set(checks) - CHECKS:
            raise ValueError(f"checks: got {sorted(unknown)}; takes {sorted(CHECKS)}")
        self.checks, self.seed, self.partial = checks, seed, partial
        self.launches = self.loads = self.stores = 0
        self._fresh: dict[int, tuple[Tensor, set[str]]] = {}  # by address: kept, so never reused
        self._allocations: dict[int, Allocation] = {}
        self._bases = np.zeros(0, np.uint64)
        self._grid = (1, 1, 1)
        self._order: Array = np.zeros(1, np.int64)
        self._program = self._barriers = 0

    # ------------------------------------------------------------------------ the launch's course

    def note_empty(self, tensor: Any) -> None:
        if type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.numel():
            poison(tensor)
            self._fresh[tensor.untyped_storage().data_ptr()] = (tensor, set())

    def begin(self, arguments: list[tuple[str, Tensor]]) -> None:
        self.launches += 1
        shared = defaultdict(list)
        for name, tensor in arguments:
            if tensor.numel():
                shared[tensor.untyped_storage().data_ptr()].append((name, tensor))
        for base, views in shared.items():
            if base in self._fresh:
                self._fresh[base][1].update(name for name, _ in views)
        if self.checks & MEMORY_CHECKS:
            self._allocations = {base: Allocation(views) for base, views in shared.items()}
            self._bases = np.array(sorted(shared), np.uint64)

    def set_grid(self, grid: tuple[int, int, int]) -> None:
        programs = int(np.prod(grid))
        self._grid, self._order = grid, np.arange(programs)
        if self.seed is not None:
            self._order = np.random.default_rng((self.seed, self.launches)).permutation(programs)

    def next_program(self, x: int, y: int, z: int) -> tuple[int, ...]:
        """The program that runs at this one's turn."""
        turn = np.ravel_multi_index((x, y, z), self._grid)
        self._program = int(self._order[turn]) + 1
        self.barrier()
        return tuple(int(i) for i in np.unravel_index(self._order[turn], self._grid))

    def barrier(self) -> None:
        self._barriers += 1

    def unwritten(self) -> list[str]:
        """Arguments made by `torch.empty` that are not full, and how much is missing."""
        found = []
        for tensor, names in self._fresh.values():
            if names and not names & self.partial and (missing := poisoned(tensor)):
                found.append(f"{' = '.join(sorted(names))}: {missing} of {tensor.numel()}")
        return found

    # -------------------------------------------------------------------------- single operations

    def load(self, ptrs: TensorHandle, mask: Array) -> None:
        self.loads += 1
        access = self._locate("load of", ptrs, mask)
        if access is None:
            return
        where, offsets, at = access
        for by in (where.stored_by[at], where.atomic_by[at]):
            self._check("race", (by != 0) & (by != self._program), "load of", where, offsets)
        own = (where.stored_by[at] == self._program) & (where.stored_at[at] == self._barriers)
        self._check("barrier", own, "load of its own store to", where, offsets)
        by = where.loaded_by[at]
        first = (by == 0) | (by == self._program)
        where.loaded_by[at] = np.where(first, self._program, SEVERAL)

    def loaded(self, ptrs: TensorHandle, values: Array, mask: Array) -> None:
        bad = mask & is_poison(values, ptrs.get_element_ty().is_floating())
        if bad.any() and (access := self._locate("load of", ptrs, bad)):
            self._check("uninitialised", np.ones(1, bool), "load of", access[0], access[1])

    def store(self, ptrs: TensorHandle, mask: Array, values: Array | None) -> None:
        """A store of values, or an atomic where they are None."""
        self.stores += 1
        what = "atomic on" if values is None else "store to"
        access = self._locate(what, ptrs, mask)
        if access is None:
            return
        where, offsets, at = access
        others = [where.stored_by[at], where.loaded_by[at]]
        if values is not None:
            others.append(where.atomic_by[at])
        for by in others:
            self._check("race", (by != 0) & (by != self._program), what, where, offsets)
        if values is None:
            where.atomic_by[at] = self._program
            return
        first = where.units(offsets, where.unit)
        lost = where.conflicting(first, np.broadcast_to(values, mask.shape)[mask])
        self._check("duplicate", lost, "different values stored to", where, offsets)
        where.stored_by[at], where.stored_at[at] = self._program, self._barriers

    def arithmetic(self, lhs: Array, rhs: Array, out: Array, op: Callable[..., Array]) -> None:
        if "overflow" not in self.checks:
            return
        exact = op(lhs.astype(np.int64), rhs.astype(np.int64))
        if (exact != out).any():
            value = exact[exact != out].flat[0]
            self._fault("overflow", f"int32 {op.__name__} wraps: {value} does not fit")

    # ---------------------------------------------------------------------------------- reporting

    def _locate(
        self, what: str, ptrs: TensorHandle, mask: Array
    ) -> tuple[Allocation, Array, Array] | None:
        """The memory that live lanes point into, their offsets in bytes, the units they touch."""
        address = ptrs.data[mask]
        if not (self.checks & MEMORY_CHECKS and len(address)):
            return None
        below = int(np.searchsorted(self._bases, address.min(), side="right")) - 1
        if below < 0:
            self._fault("bounds", f"{what} memory of no argument")
            return None
        where = self._allocations[int(self._bases[below])]
        offsets = (address - np.uint64(where.base)).astype(np.int64)
        size = max(ptrs.get_element_ty().primitive_bitwidth // 8, 1)
        if (bad := where.outside(offsets, size)).any():
            self._check("bounds", bad, what, where, offsets)
            return None
        return where, offsets, where.units(offsets, size)

    def _check(self, kind: str, bad: Array, what: str, where: Allocation, offsets: Array) -> None:
        if kind in self.checks and bad.any():
            lane = int(np.flatnonzero(bad)[0]) * len(offsets) // len(bad)
            place = f"byte {offsets[lane]} of {where.bytes}"
            self._fault(kind, f"{what} {where.name}, {place}, {bad.sum()} of {len(bad)} lanes")

    def _fault(self, kind: str, message: str) -> None:
        if kind in self.checks:
            program = np.unravel_index(self._program - 1, self._grid)
            place = f"program {tuple(map(int, program))} of {self._grid}"
            raise MemoryFault(f"[{kind}] launch {self.launches}, {place}: {message}")


class _WatchedBuilder(DeviceBuilder):
    """The interpreter's operations, with a sanitizer looking on."""

    watch: Sanitizer

    def set_grid_dim(self, nx, ny, nz):
        super().set_grid_dim(nx, ny, nz)
        self.watch.set_grid((nx, ny, nz))

    def set_grid_idx(self, x, y, z):
        super().set_grid_idx(*self.watch.next_program(x, y, z))

    def create_barrier(self):
        self.watch.barrier()

    def create_masked_load(self, ptrs, mask, other, *policy):
        live = _lanes(ptrs, mask)
        self.watch.load(ptrs, live)
        out = super().create_masked_load(ptrs, mask, other, *policy)
        self.watch.loaded(ptrs, out.data, live)
        # A scalar's `other` of zero arrives as None too: the interpreter takes it for false.
        if other is None and live.size > 1 and out.dtype.scalar.is_floating():
            out.data[~live] = QUIET_NAN if out.data.dtype == np.uint16 else np.nan
        return out

    def create_masked_store(self, ptrs, value, mask, *policy):
        self.watch.store(ptrs, _lanes(ptrs, mask), value.data)
        return super().create_masked_store(ptrs, value, mask, *policy)

    def create_atomic_rmw(self, op, ptr, val, mask, *order):
        self.watch.store(ptr, _lanes(ptr, mask), None)
        return super().create_atomic_rmw(op, ptr, val, mask, *order)

    def create_atomic_cas(self, ptr, cmp, val, *order):
        self.watch.store(ptr, np.ones(ptr.data.shape, bool), None)
        return super().create_atomic_cas(ptr, cmp, val, *order)

    def binary_op(self, lhs, rhs, op):
        out = super().binary_op(lhs, rhs, op)
        int32 = lhs.data.dtype == np.int32 and rhs.data.dtype == np.int32
        if int32 and op in (np.add, np.subtract, np.multiply):
            self.watch.arithmetic(lhs.data, rhs.data, out.data, op)
        return out


def _lanes(ptrs: TensorHandle, mask: Any) -> Array:
    """Which lanes are live; Triton 3.6 masks a descriptor's loads with a bare array."""
    return np.broadcast_to(np.asarray(mask.data), ptrs.data.shape)


def _tensors(name: str, argument: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in an argument of a kernel, and what to call them."""
    argument = stock._unwrap_tensor(argument)
    if isinstance(argument, TensorDescriptor):
        yield from _tensors(name, argument.base)
    elif isinstance(argument, tuple | list):
        fields = getattr(argument, "_fields", None)  # a record's
        for i, part in enumerate(argument):
            yield from _tensors(f"{name}.{fields[i]}" if fields else f"{name}[{i}]", part)
    elif isinstance(argument, Tensor):
        yield name, argument


@contextmanager
def sanitize(
    *, checks: Set[str] = CHECKS, seed: int | None = None, partial: Set[str] = frozenset()
) -> Iterator[Sanitizer]:
    """Watch every launch inside. See the module's page for what is checked.

    Args:
        checks (set of str): kinds of faults to raise for; {"overflow"} alone keeps no shadow
            memory and so serves tensors of any size. Default: all.
        seed (int or None): of the order that programs run in; None is the natural one.
        partial (set of str): arguments of kernels that need not be full at the end: scratch.
    """
    install()
    watch = Sanitizer(checks, seed, partial)
    initialise = stock.GridExecutor._init_args_hst

    def begin(self, positional, keyword):
        arguments, keywords = initialise(self, positional, keyword)
        named = [*zip(self.arg_names, arguments, strict=False), *keywords.items()]
        watch.begin([pair for name, value in named for pair in _tensors(name, value)])
        return arguments, keywords

    def noting(create: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def empty(*args, **kwargs):
            tensor = create(*args, **kwargs)
            watch.note_empty(tensor)
            return tensor

        return empty

    makers = [(torch, name) for name in ("empty", "empty_like", "empty_strided")]
    makers += [(Tensor, name) for name in ("new_empty", "new_empty_strided")]
    builder = stock.interpreter_builder
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(stock.GridExecutor, "_init_args_hst", begin))
        if checks & {"uninitialised", "unwritten"}:
            for owner, name in makers:
                made = noting(getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, made))
        builder.__class__, builder.watch = _WatchedBuilder, watch
        try:
            yield watch
        finally:
            builder.__class__ = DeviceBuilder
            del builder.watch
    if "unwritten" in checks and (missing := watch.unwritten()):
        raise MemoryFault(f"[unwritten] {'; '.join(missing)}")

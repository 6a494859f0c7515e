"""The package's launches, executed and judged against the reference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import accumulate, pairwise
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from torch.utils import _pytree as pytree
from yardstick import assert_within_yardstick, flat, gradients, piece, rounded, rounded_inputs

import reference
from titans_kernels import backends, neural_memory, retrieve
from titans_kernels.kernels.tiles import Blocks, Tile, tile, using

from .cases import Case
from .launches import executing
from .program import Found, unwritten

# How asynchronous operands land, and whether a load that races reads NaN: three runs, same bits.
MODES = ({"late": True}, {"late": False}, {"late": True, "poison": True})


@dataclass
class Row:
    """One case, dtype, architecture and Triton: errors relative to the bound, and counts."""

    case: str
    arch: str
    triton: str
    dtype: str
    tile: str
    launches: int
    rms: float  # the worst tensor's RMS error over the yardstick's; float32: the torch backend's
    error: float  # the worst tensor's, relative, in the Frobenius norm
    instructions: float  # of warps, a token and head
    products: float  # of tensor cores, likewise
    faults: dict[str, int] = field(default_factory=dict)
    kernels: dict[str, list[float]] = field(default_factory=dict)  # the two counts of each

    def record(self) -> dict:
        return asdict(self)


@contextmanager
def _poisoned() -> Iterator[None]:
    """Uninitialised memory is a NaN that the emulator knows."""

    def filled(make):
        def empty(*args, **kwargs):
            x = make(*args, **kwargs)
            return unwritten(x) if x.is_floating_point() and x.is_contiguous() else x

        return empty

    with ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            stack.enter_context(mock.patch.object(owner, name, filled(getattr(owner, name))))
        yield


def _in_pieces(op, pieces, **inputs):
    """The operator called piece after piece, each with the state of the one before."""
    ends, outputs, state = [0, *accumulate(pieces)], [], None
    for start, stop in pairwise(ends):
        o, state = op(**piece(inputs, start, stop), initial_state=state, output_final_state=True)
        outputs.append(o)
    return torch.cat(outputs, 1), state


def _packed_yardstick(lengths, cu_seqlens, **inputs):
    """The yardstick of each sequence by itself."""
    del cu_seqlens
    parts = [rounded(**piece(inputs, a, b)) for a, b in pairwise([0, *accumulate(lengths)])]
    states = {
        name: tuple(torch.cat(x) for x in zip(*(getattr(s, name) for _, s in parts), strict=True))
        for name in ("weights", "momentum")
    }
    return torch.cat([o for o, _ in parts], 1), SimpleNamespace(**states)


def _values(op, inputs, backward):
    """o, the state's matrices and the gradients of all inputs, by name."""
    inputs = pytree.tree_map(lambda x: x.detach().requires_grad_() if _floating(x) else x, inputs)
    o, state = op(**inputs)
    named = flat({"o": o, "weights'": state.weights, "momentum'": state.momentum})
    if backward:
        named |= {f"d{n}": x for n, x in gradients(named, flat(inputs)).items()}
    return {name: x.detach() for name, x in named.items()}


def _floating(x) -> bool:
    return torch.is_tensor(x) and x.is_floating_point()


def _operators(case: Case, dtype: torch.dtype, size: Tile):
    """The kernels' operator, the definition, and what rounding alone costs."""
    final = {"chunk_size": case.chunk, "output_final_state": True}
    kernels = partial(neural_memory, backend="triton", **final)
    definition = partial(reference.neural_memory, **final)
    if dtype == torch.float32:
        yard = partial(neural_memory, backend="torch", **final)
    else:
        size = size.fitting(max(case.lengths or (case.T,)), case.chunk)
        block = min(case.chunk, Blocks.of(case.chunk, size).tokens)
        yard = partial(rounded, dtype=dtype, chunk_size=case.chunk, block=block)
        if case.lengths:
            yard = partial(
                _packed_yardstick, case.lengths, dtype=dtype, chunk_size=case.chunk, block=block
            )
    if case.pieces:
        # The definition and the yardstick see the whole: a cut changes nothing.
        kernels = partial(
            _in_pieces,
            partial(neural_memory, backend="triton", chunk_size=case.chunk),
            case.pieces,
        )
    return kernels, definition, yard


def _tile(case: Case, dtype: torch.dtype, arch: str) -> Tile:
    if case.tile:
        return Tile(*case.tile)
    return tile(case.D, case.hidden, dtype, arch, case.chunk, case.backward)


def _executed(kernels, inputs, case: Case, size: Tile, arch: str, **mode):
    """The values that the launches make, reading the first weights among them, and the launches."""
    # The kernels take tensors of the CPU here, and are compiled all the same.
    covered = mock.patch.object(backends, "_uncovered", lambda *_: None)
    with covered, using(size), _poisoned(), executing(arch, **mode) as found:
        with torch.set_grad_enabled(case.backward):
            values = _values(kernels, inputs, case.backward)
        if case.lengths is None:
            with torch.no_grad():
                q, weights, norm = (inputs[name] for name in ("q", "weights", "norm"))
                values["read"] = retrieve(q, weights, norm=norm, backend="triton")
    return values, found


def _reading(exact, dtype: torch.dtype):
    """Of the definition and of the yardstick: a query that reads the initial weights."""
    want = reference.retrieve(exact["q"], exact["weights"], norm=exact["norm"]).detach()
    still = {name: torch.zeros_like(exact[name]) for name in ("theta", "alpha", "eta")}
    if dtype == torch.float32:
        q, weights, norm = (
            pytree.tree_map(lambda x: x.detach().float() if _floating(x) else x, exact[name])
            for name in ("q", "weights", "norm")
        )
        return want, retrieve(q, weights, norm=norm, backend="torch")
    yard, _ = rounded(**exact | still, dtype=dtype, chunk_size=exact["q"].shape[1])
    return want, yard.detach()


def run(case: Case, dtype: torch.dtype, arch: str) -> Row:
    """Execute a case in all modes; the row of the table.

    Raises:
        AssertionError: at other bits in another mode, a fault, an error beyond the yardstick.
        program.Fault: where a launch stopped.
    """
    size = _tile(case, dtype, arch)
    operators = _operators(case, dtype, size)
    pool: dict[str, list] = {}
    launches: list[Found] = []
    for seed in range(case.seeds):
        sizes = {"T": case.T, "H": case.H, "D": case.D, "hidden": case.hidden}
        sizes |= {"depth": case.depth, "norm": case.norm, "B": 1}
        inputs, exact = rounded_inputs(dtype, seed=seed, **sizes)
        if case.lengths:
            ends = torch.tensor([0, *accumulate(case.lengths)], dtype=torch.int32)
            inputs["cu_seqlens"] = exact["cu_seqlens"] = ends
        kernels, definition, yardstick = operators
        runs = [_executed(kernels, inputs, case, size, arch, seed=seed, **mode) for mode in MODES]
        got, found = runs[0]
        launches += found
        for values, more in runs[1:]:
            _check_launches(more)
            for name, x in values.items():
                assert torch.equal(x, got[name]), f"{case.name}: {name} has other bits"
        _check_launches(found)
        want = _values(definition, exact, case.backward)
        yard = _values(yardstick, inputs if dtype == torch.float32 else exact, case.backward)
        if "read" in got:
            want["read"], yard["read"] = _reading(exact, dtype)
        for name in got:
            pool.setdefault(name, []).append((got[name], want[name], yard[name]))
    rms, error = _judge(case, dtype, pool)
    return _row(case, dtype, arch, size, launches, rms, error)


def _check_launches(found: list[Found]) -> None:
    for launch in found:
        assert not launch.faults, f"{launch.kernel}: {launch.faults}\n{launch.notes}"


def _judge(case: Case, dtype: torch.dtype, pool: dict[str, list]) -> tuple[float, float]:
    """The worst RMS ratio and relative error; every tensor within the bounds."""
    bounds = (4.0, 4.0) if dtype == torch.float32 else (1.25, 2.0)
    worst, relative = 0.0, 0.0
    for name, runs in pool.items():
        if not runs[0][0].numel():
            continue
        got, want, yard = (
            torch.cat([x.double().flatten() for x in column]) for column in zip(*runs, strict=True)
        )
        assert_within_yardstick(f"{case.name}: {name}", got, want, yard, *bounds)
        cost = (yard - want).norm().item()
        worst = max(worst, (got - want).norm().item() / cost if cost else 0.0)
        relative = max(relative, ((got - want).norm() / want.norm().clamp_min(1e-30)).item())
    return worst, relative


def _row(case, dtype, arch, size, launches, rms, error) -> Row:
    faults: Counter[str] = Counter()
    for launch in launches:
        faults.update(launch.faults)
    tokens = case.T * case.H * case.seeds
    kernels: dict[str, list[float]] = {}
    for launch in launches:
        counts = kernels.setdefault(launch.kernel.removesuffix("_kernel"), [0.0, 0.0])
        counts[0] += launch.counts["instr"] / tokens
        counts[1] += launch.counts["mma"] / tokens
    return Row(
        case=case.name,
        arch=arch,
        triton=triton.__version__,
        dtype=str(dtype).removeprefix("torch."),
        tile=f"{size.block}x{size.slice}x{size.queries}x{size.rows}",
        launches=len(launches),
        rms=rms,
        error=error,
        instructions=sum(x.counts["instr"] for x in launches) / tokens,
        products=sum(x.counts["mma"] for x in launches) / tokens,
        faults=dict(faults),
        kernels=kernels,
    )

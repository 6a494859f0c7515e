"""Does this installation compute what the definition says? `python -m titans_kernels.verify`

Every operator is run in every dtype on every backend that works on this machine, outputs, final
states and gradients, and compared with the float64 reference, which goes token by token and takes
its inner gradients by autograd. Both get the same inputs, rounded to the dtype. An error is
||x - reference|| / ||reference||, of the worst tensor. The exit code is 1 if one is over its bound.
"""

import argparse
import importlib
import math
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_kernels import neural_memory, retrieve

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BATCH, HEADS, HEAD_DIM, EXPANSION = 2, 2, 16, 4
LENGTH, QUICK_LENGTH = 100, 40  # tokens; both leave the last chunk of 16 open
PER_TOKEN = ("q", "k", "v", "theta", "alpha", "eta")
STATE = ("weights", "momentum", "k", "v", "theta", "alpha", "eta", "length")

# The keyword arguments of `neural_memory`: tensors, tuples of tensors and None, by name.
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Operators:
    """The two functions of one implementation, with its own options bound."""

    neural_memory: Callable[..., tuple[Tensor, Any]]
    retrieve: Callable[..., Tensor]


# Runs operators on arguments and returns (output, final state or None).
Run = Callable[[Operators, Arguments], tuple[Tensor, Any]]


def _learn(ops: Operators, x: Arguments) -> tuple[Tensor, Any]:
    """Outputs and final state of whole sequences."""
    return ops.neural_memory(**x, output_final_state=True)


def _stream(ops: Operators, x: Arguments) -> tuple[Tensor, Any]:
    """The same in four pieces, cut inside chunks, each going on from the last one's state."""
    length = x["q"].shape[1]
    outputs, state = [], None
    for start, end in pairwise([0, length // 4, length // 4 + 1, length - 5, length]):
        piece = x | {name: x[name][:, start:end] for name in PER_TOKEN}
        o, state = ops.neural_memory(**piece, initial_state=state, output_final_state=True)
        outputs.append(o)
    return torch.cat(outputs, dim=1), state


def _retrieve(ops: Operators, x: Arguments) -> tuple[Tensor, Any]:
    """Read the memory that sequences start with."""
    return ops.retrieve(x["q"], x["weights"], norm=x["norm"]), None


def _retrieve_state(ops: Operators, x: Arguments) -> tuple[Tensor, Any]:
    """Read what the memory has become after all tokens, its open chunk included."""
    _, state = _learn(ops, x)
    return ops.retrieve(x["q"], state, norm=x["norm"], cu_seqlens=x["cu_seqlens"]), state


@dataclass(frozen=True)
class Case:
    """One operator in one setting. The reference does `run` too, or else `definition`."""

    operator: str
    setting: str
    run: Run
    definition: Run | None = None
    depth: int = 2
    norm: bool = True
    packed: bool = False


CASES = (
    Case("neural_memory", "depth 1", _learn, depth=1, norm=False),
    Case("neural_memory", "depth 2", _learn, norm=False),
    Case("neural_memory", "depth 2, norm", _learn),
    Case("neural_memory", "depth 2, norm, varlen", _learn, packed=True),
    Case("neural_memory", "depth 2, norm, streamed", _stream, definition=_learn),
    Case("retrieve", "depth 2, norm", _retrieve),
    Case("retrieve", "depth 2, norm, state", _retrieve_state),
    Case("retrieve", "depth 2, norm, varlen state", _retrieve_state, packed=True),
)


def make_inputs(case: Case, length: int, dtype: torch.dtype, device: str) -> Arguments:
    """Seeded leaves for which the inner loop is stable, so that rounding stays what it is.

    Unit q, k and v, small gates, and a LayerNorm whose output has v's norm: with larger values
    the memory's dynamics amplify any difference without limit, and a comparison says nothing.
    q, k and v have `dtype`; gates, weights and norm are parameters, float32 or float64.
    """
    generator = torch.Generator().manual_seed(0)
    rows = 1 if case.packed else BATCH

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def gate(largest: float) -> Tensor:
        return largest * randn(rows, length, HEADS).div(2**0.5).erf().abs()  # uniform

    vectors = {n: F.normalize(randn(rows, length, HEADS, HEAD_DIM), dim=-1) for n in "qkv"}
    gates = {"theta": gate(0.02), "alpha": gate(0.004), "eta": gate(0.9)}
    widths = [HEAD_DIM, *[EXPANSION * HEAD_DIM] * (case.depth - 1), HEAD_DIM]
    weights = tuple(randn(HEADS, m, n) / m**0.5 for m, n in pairwise(widths))
    norm = (1 + 0.1 * randn(HEADS, HEAD_DIM), 0.1 * randn(HEADS, HEAD_DIM))
    parameters = {
        "weights": weights,
        "norm": tuple(x / HEAD_DIM**0.5 for x in norm) if case.norm else None,
    }
    ends = [0, length // 3, length // 3, length - 1, length]  # one sequence empty, one of a token
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=device) if case.packed else None
    return {
        **_leaves(vectors, dtype, device),
        **_leaves(gates | parameters, torch.promote_types(dtype, torch.float32), device),
        "cu_seqlens": cu_seqlens,
    }


def _leaves(x: Arguments, dtype: torch.dtype, device: str) -> Arguments:
    """The same values as new tensors that take gradients; integer tensors are only moved."""

    def leaf(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(leaf, value))
        if value is None or not value.is_floating_point():
            return value if value is None else value.to(device)
        # Rounded before it is moved: not every device has float64.
        return value.detach().cpu().to(dtype).to(device).requires_grad_()

    return {name: leaf(value) for name, value in x.items()}


def _named_tensors(x: Arguments) -> dict[str, Tensor]:
    """Every tensor in x by a name of its own: the members of a tuple are `name[0]`, ..."""
    named: dict[str, Tensor] = {}
    for name, value in x.items():
        if isinstance(value, tuple):
            named |= {f"{name}[{i}]": tensor for i, tensor in enumerate(value)}
        elif value is not None:
            named[name] = value
    return named


@dataclass(frozen=True)
class Measured:
    """What a case produces, by name, in float64 on the CPU."""

    output: dict[str, Tensor]
    state: dict[str, Tensor]
    gradient: dict[str, Tensor]


def measure(run: Run, ops: Operators, x: Arguments, dtype: torch.dtype) -> Measured:
    """Run forward, then backward from seeded cotangents of output and state, in `dtype`."""
    generator = torch.Generator().manual_seed(1)
    o, state = run(ops, x)
    fields = {} if state is None else {name: getattr(state, name) for name in STATE}
    learned = _named_tensors({n: fields[n] for n in ("weights", "momentum") if n in fields})
    leaves = {n: t for n, t in _named_tensors(x).items() if t.requires_grad}
    results = [o, *learned.values()]
    cotangents = [
        torch.randn(r.shape, generator=generator, dtype=torch.float64).to(dtype).to(r)
        for r in results
    ]
    gradients = torch.autograd.grad(
        results, list(leaves.values()), cotangents, allow_unused=True, materialize_grads=True
    )

    def plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.detach().cpu().double() for name, tensor in tensors.items()}

    return Measured(
        plain({"o": o}),
        plain(_named_tensors(fields)),
        plain(dict(zip(leaves, gradients, strict=True))),
    )


@dataclass(frozen=True)
class Bounds:
    """The largest relative error allowed: in outputs and final state, and in gradients."""

    forward: float
    gradient: float


def bounds(dtype: torch.dtype, length: int) -> Bounds:
    """What rounding alone may cost, where nothing in the inner loop amplifies it.

    float64: 1e-11 and 1e-10, what the project promises for every size and setting.

    float32: the update of each token rounds the memory once, by eps / 2, and so does its
    read; if all pointed the same way they would add up to length * eps. The gradient goes that
    way four times: reads and writes, and the adjoints of both.

    bfloat16, float16: the reference gets the same q, k and v, and sums are float32 on every
    backend, so the dtype's eps enters once a stored tensor, and once an operand of a matrix
    product where a backend rounds those. The longest way to an output, two layers written and
    two layers read, has 4 products with 2 operands of eps / 2 each: 4 eps. The gradient goes
    there and back: 8 eps.
    """
    eps = torch.finfo(dtype).eps
    if dtype == torch.float64:
        return Bounds(1e-11, 1e-10)
    if dtype == torch.float32:
        return Bounds(length * eps, 4 * length * eps)
    return Bounds(4 * eps, 8 * eps)


@dataclass(frozen=True)
class Worst:
    """The worst relative error among some tensors, and which one has it."""

    value: float
    name: str


def worst_error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> Worst | None:
    """The worst of ||found - wanted|| / ||wanted||; nan, the worst of all, stays nan."""
    errors = []
    for name, reference in wanted.items():
        difference = float((found[name] - reference).norm())
        scale = float(reference.norm())
        value = difference / scale if scale else (math.inf if difference else 0.0)
        errors.append(Worst(value, name))
    return max(errors, key=lambda e: (math.isnan(e.value), e.value), default=None)


@dataclass(frozen=True)
class Result:
    """One row of the table. `problem` says why a row has no errors; `skipped`, that it may."""

    case: Case
    dtype: torch.dtype
    backend: str
    bounds: Bounds
    output: Worst | None = None
    state: Worst | None = None
    gradient: Worst | None = None
    problem: str = ""
    skipped: bool = False

    @property
    def ok(self) -> bool:
        checks = (
            (self.output, self.bounds.forward),
            (self.state, self.bounds.forward),
            (self.gradient, self.bounds.gradient),
        )
        return self.skipped or (
            not self.problem and all(error.value <= bound for error, bound in checks if error)
        )


def run_checks(
    device: str = "cpu",
    backends: Sequence[str] = ("torch",),
    dtypes: Sequence[torch.dtype] = DTYPES,
    length: int = LENGTH,
    on_result: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Compare every case with the reference; `on_result` sees each row as soon as it is there."""
    reference = _import_reference()
    definition = Operators(reference.neural_memory, reference.retrieve)
    results = []
    for case in CASES:
        for dtype in dtypes:
            inputs = make_inputs(case, length, dtype, device)
            wanted = measure(
                case.definition or case.run,
                definition,
                _leaves(inputs, torch.float64, "cpu"),
                dtype,
            )
            for backend in backends:
                results.append(_check(case, dtype, backend, inputs, wanted, length))
                on_result(results[-1])
    return results


def _check(
    case: Case, dtype: torch.dtype, backend: str, x: Arguments, wanted: Measured, length: int
) -> Result:
    """One row. An operator that raises is a row too: the table goes on."""
    row = partial(Result, case, dtype, backend, bounds(dtype, length))
    ops = Operators(partial(neural_memory, backend=backend), partial(retrieve, backend=backend))
    try:
        found = measure(case.run, ops, x, dtype)
    except NotImplementedError as error:
        return row(problem=_one_line(error), skipped=True)
    except Exception as error:
        return row(problem=f"{type(error).__name__}: {_one_line(error)}")
    return row(
        output=worst_error(found.output, wanted.output),
        state=worst_error(found.state, wanted.state),
        gradient=worst_error(found.gradient, wanted.gradient),
    )


def _one_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _import_reference() -> ModuleType:
    """The reference: part of an installed package, a folder beside it in a plain checkout."""
    try:
        return importlib.import_module("titans_kernels.reference")
    except ModuleNotFoundError as error:
        if error.name != "titans_kernels.reference":
            raise
        return importlib.import_module("reference")


def _triton_version() -> str | None:
    try:
        return str(importlib.import_module("triton").__version__)
    except ImportError:
        return None


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_backends(device: str) -> tuple[str, ...]:
    """PyTorch runs everywhere; Triton where there is a GPU for it."""
    gpu = torch.device(device).type == "cuda"
    return ("torch", "triton") if gpu and _triton_version() else ("torch",)


def environment(device: str | None = None) -> str:
    """One line: what a report about a wrong or slow result has to begin with."""
    try:
        package = version("titans_kernels")
    except PackageNotFoundError:
        package = "(checkout)"
    kind = torch.device(device or default_device())
    if kind.type == "cuda":
        major, minor = torch.cuda.get_device_capability(kind)
        runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        name = f"{torch.cuda.get_device_name(kind)} ({major}.{minor}, {runtime})"
    elif kind.type == "cpu":
        threads = f"{torch.get_num_threads()} of {os.cpu_count()} threads"
        name = f"CPU {platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {threads}"
    else:
        name = str(kind)
    return " | ".join(
        (
            f"titans_kernels {package}",
            f"Python {platform.python_version()}",
            f"torch {torch.__version__}",
            f"triton {_triton_version() or 'not installed'}",
            name,
        )
    )


START = "{:<13}  {:<26}  {:<8}  {:<7}"
ROW = START + "  {:>7}  {:>7}  {:>7}  {:<18}  {:>7}  {}"
HEADER = ROW.format(
    *("operator", "setting", "dtype", "backend"),
    *("output", "state", "bound", "worst gradient", "bound", "verdict"),
)


def format_row(result: Result) -> str:
    """The row of a result, aligned under HEADER."""

    def number(error: Worst | None) -> str:
        return "-" if error is None else f"{error.value:.1e}"

    dtype = str(result.dtype).removeprefix("torch.")
    start = (result.case.operator, result.case.setting, dtype, result.backend)
    if result.problem:
        verdict = "not covered" if result.skipped else "FAIL"
        return f"{START.format(*start)}  {verdict}: {result.problem}"
    return ROW.format(
        *start,
        number(result.output),
        number(result.state),
        f"{result.bounds.forward:.1e}",
        f"{number(result.gradient)} {result.gradient.name if result.gradient else ''}",
        f"{result.bounds.gradient:.1e}",
        "ok" if result.ok else "FAIL",
    )


def summary(results: Sequence[Result]) -> str:
    """The closing line."""
    compared = [r for r in results if not r.skipped]
    failed = sum(not r.ok for r in compared)
    skipped = (
        f", {len(results) - len(compared)} not covered" if len(compared) < len(results) else ""
    )
    verdict = f"{failed} FAIL" if failed else "all ok" if compared else "nothing was compared: FAIL"
    return f"{len(compared)} checks against the float64 reference{skipped}: {verdict}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m titans_kernels.verify",
        description="Compare every operator, dtype and backend with the float64 reference.",
    )
    parser.add_argument("--device", help="where to run; a GPU where there is one, else cpu")
    parser.add_argument(
        "--backend",
        action="append",
        choices=("torch", "triton"),
        help="run this one only; may be repeated; all that work here if not given",
    )
    parser.add_argument("--quick", action="store_true", help="shorter sequences")
    parser.add_argument("--env", action="store_true", help="describe the environment and stop")
    options = parser.parse_args(argv)
    device = options.device or default_device()
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {device}: {_one_line(error)}")

    # The tensors are too small to split: threads would wait for each other most of the time.
    print(environment(device), flush=True)
    torch.set_num_threads(1)
    if options.env:
        return 0
    print(f"\n{HEADER}", flush=True)
    results = run_checks(
        device,
        options.backend or default_backends(device),
        # Apple's GPUs have no float64.
        [d for d in DTYPES if d != torch.float64 or torch.device(device).type != "mps"],
        QUICK_LENGTH if options.quick else LENGTH,
        on_result=lambda result: print(format_row(result), flush=True),
    )
    print(f"\n{summary(results)}")
    compared = [r for r in results if not r.skipped]
    return 0 if compared and all(r.ok for r in compared) else 1


if __name__ == "__main__":
    sys.exit(main())

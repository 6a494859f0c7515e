"""Does this installation agree with the definition? `python -m titans_kernels.verify`

Every operator is run in every dtype on every backend that works on this machine, outputs, final
states and gradients, and compared with the float64 reference, which goes token by token and takes
its inner gradients by autograd. Both get the same inputs, rounded to the dtype. An error is
||x - reference|| / ||reference||, of the worst tensor. The exit code is 1 if one is over its bound.

Where Triton runs, the kernels are then checked for `backend="auto"` at the sizes of models, and
remembered if they pass, which saves the first call from doing it. If one fails the exit code is 1.

Under torchrun it compares sharded layers with one process instead: `titans_kernels.distributed`.
"""

import argparse
import importlib
import logging
import os
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_kernels import __version__, neural_memory, retrieve, warmup
from titans_kernels.comparison import Bounds, Worst, bounds, worst_error, worst_factor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHORT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # those of Triton on a GPU
HEAD_DIMS = (64, 128)  # of models
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
    """The same in four pieces, cut inside chunks, each continuing from the last one's state."""
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
    """Read the memory after all tokens, its open chunk included."""
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
    Case("neural_memory", "depth 1, no norm", _learn, depth=1, norm=False),
    Case("neural_memory", "depth 2, no norm", _learn, norm=False),
    Case("neural_memory", "depth 2", _learn),
    Case("neural_memory", "varlen", _learn, packed=True),
    Case("neural_memory", "streamed", _stream, definition=_learn),
    Case("retrieve", "weights", _retrieve),
    Case("retrieve", "state", _retrieve_state),
    Case("retrieve", "varlen state", _retrieve_state, packed=True),
)


def make_inputs(case: Case, length: int, dtype: torch.dtype, device: str) -> Arguments:
    """Seeded leaves: q, k and v in `dtype`, gates, weights and norm in float32 or float64.

    Unit q, k and v, small gates, and a LayerNorm whose output has v's norm: with larger values
    the memory's dynamics amplify any difference without limit, and a comparison says nothing.
    """
    generator = torch.Generator().manual_seed(0)
    rows, H, D = 1 if case.packed else BATCH, HEADS, HEAD_DIM

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def gate(largest: float) -> Tensor:
        return largest * torch.rand(rows, length, H, generator=generator, dtype=torch.float64)

    vectors = {name: F.normalize(randn(rows, length, H, D), dim=-1) for name in ("q", "k", "v")}
    gates = {"theta": gate(0.02), "alpha": gate(0.004), "eta": gate(0.9)}
    widths = [D, *[EXPANSION * D] * (case.depth - 1), D]
    weights = tuple(randn(H, d_in, d_out) / d_in**0.5 for d_in, d_out in pairwise(widths))
    norm = ((1 + 0.1 * randn(H, D)) / D**0.5, 0.1 * randn(H, D) / D**0.5) if case.norm else None
    ends = [0, length // 3, length // 3, length - 1, length]  # one sequence empty, one of a token
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=device) if case.packed else None
    others = {**gates, "weights": weights, "norm": norm, "cu_seqlens": cu_seqlens}
    wide = torch.promote_types(dtype, torch.float32)
    return _leaves(vectors, dtype, device) | _leaves(others, wide, device)


def _leaves(x: Arguments, dtype: torch.dtype, device: str) -> Arguments:
    """The same values, rounded to `dtype`, as tensors that take gradients."""

    def leaf(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(leaf, value))
        if value is None or not value.is_floating_point():
            return value
        return value.detach().cpu().to(dtype).to(device).requires_grad_()

    return {name: leaf(value) for name, value in x.items()}


def _flat(x: Arguments) -> dict[str, Tensor]:
    """Every tensor in x by a name of its own: the members of a tuple are `name[0]`, ..."""
    flat: dict[str, Tensor] = {}
    for name, value in x.items():
        if isinstance(value, tuple):
            flat |= {f"{name}[{i}]": tensor for i, tensor in enumerate(value)}
        elif value is not None:
            flat[name] = value
    return flat


# The tensors of a run, in float64 on the CPU, by kind ("output", "state", "gradient") and name.
Measured = dict[str, dict[str, Tensor]]


def measure(run: Run, ops: Operators, x: Arguments, dtype: torch.dtype) -> Measured:
    """Run forward, then backward from seeded cotangents of output and state, in `dtype`."""
    o, state = run(ops, x)
    fields = {} if state is None else {name: getattr(state, name) for name in STATE}
    results = _flat({"o": o} | {name: fields.get(name) for name in ("weights", "momentum")})
    leaves = {name: tensor for name, tensor in _flat(x).items() if tensor.requires_grad}
    generator = torch.Generator().manual_seed(1)
    cotangents = [
        torch.randn(r.shape, generator=generator, dtype=torch.float64).to(dtype).to(r)
        for r in results.values()
    ]
    gradients = torch.autograd.grad(
        [*results.values()], [*leaves.values()], cotangents, materialize_grads=True
    )
    kinds = {
        "output": {"o": o},
        "state": _flat(fields),
        "gradient": dict(zip(leaves, gradients, strict=True)),
    }
    return {
        kind: {name: tensor.detach().cpu().double() for name, tensor in tensors.items()}
        for kind, tensors in kinds.items()
    }


@dataclass(frozen=True)
class Result:
    """One row of the table. Instead of errors it may have a `problem`, why there are none."""

    case: Case
    dtype: torch.dtype
    backend: str
    bounds: Bounds
    output: Worst | None = None
    state: Worst | None = None  # None where a case has no state
    gradient: Worst | None = None
    factor: Worst | None = None  # of all of these
    problem: str = ""
    covered: bool = True  # False: the backend refuses this case

    @property
    def ok(self) -> bool:
        limits = (self.bounds.forward, *self.bounds)
        errors = (self.output, self.state, self.gradient, self.factor)
        return not self.problem and all(
            worst is None or worst.error <= limit
            for worst, limit in zip(errors, limits, strict=True)
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
            x = make_inputs(case, length, dtype, device)
            exact = _leaves(x, torch.float64, "cpu")
            wanted = measure(case.definition or case.run, definition, exact, dtype)
            for backend in backends:
                row = partial(Result, case, dtype, backend, bounds(dtype, length))
                results.append(row(**_compare(case.run, backend, x, dtype, wanted)))
                on_result(results[-1])
    return results


def _compare(
    run: Run, backend: str, x: Arguments, dtype: torch.dtype, wanted: Measured
) -> dict[str, Any]:
    """The errors of a row, or its problem: an operator that raises does not end the table."""
    how: Any = {"backend": backend}
    ops = Operators(partial(neural_memory, **how), partial(retrieve, **how))
    try:
        found = measure(run, ops, x, dtype)
    except NotImplementedError as error:
        return {"problem": str(error), "covered": backend == "torch"}  # PyTorch does every case
    except Exception as error:
        message, *_ = str(error).splitlines() or [""]
        return {"problem": f"{type(error).__name__}: {message}"}
    errors: dict[str, Any] = {kind: worst_error(found[kind], wanted[kind]) for kind in wanted}
    factors = [worst_factor(found[kind], wanted[kind]) for kind in wanted]
    return errors | {"factor": max(filter(None, factors), default=None)}


def _import_reference() -> ModuleType:
    """The reference: part of an installed package, a folder next to it in a plain checkout."""
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
    """A GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_backends(device: str) -> tuple[str, ...]:
    """PyTorch runs everywhere; Triton where there is a GPU for it."""
    gpu = torch.device(device).type == "cuda"
    return ("torch", "triton") if gpu and _triton_version() else ("torch",)


def environment(device: str | None = None) -> str:
    """One line: what a report about a wrong or slow result has to begin with."""
    where = torch.device(device or default_device())
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else str(where)
    if where.type == "cpu":
        threads = f"{torch.get_num_threads()} of {os.cpu_count()} threads"
        name = f"CPU {platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {threads}"
    versions = {
        "titans_kernels": __version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version() or "not installed",
    }
    return " | ".join([*(f"{what} {which}" for what, which in versions.items()), name])


START = "{:<13}  {:<16}  {:<8}  {:<7}"
ROW = START + "  {:>7}  {:>7}  {:>7}  {:<18}  {:>7}  {}"
COLUMNS = "operator|setting|dtype|backend|output|state|bound|worst gradient|bound|verdict"
HEADER = ROW.format(*COLUMNS.split("|"))


def format_row(result: Result) -> str:
    """The row of a result, aligned under HEADER."""
    dtype = str(result.dtype).removeprefix("torch.")
    start = (result.case.operator, result.case.setting, dtype, result.backend)
    if result.problem:
        verdict = "FAIL" if result.covered else "not covered"
        return f"{START.format(*start)}  {verdict}: {result.problem}"

    output, state, gradient = (
        "-" if worst is None else f"{worst.error:.1e}"
        for worst in (result.output, result.state, result.gradient)
    )
    forward_bound, gradient_bound = (f"{bound:.1e}" for bound in result.bounds[:2])
    gradient += f" {result.gradient.name}" if result.gradient else ""
    verdict = "ok" if result.ok else "FAIL"
    if result.factor and result.factor.error > result.bounds.factor:
        verdict += f": {result.factor.name} is wrong by a factor, {result.factor.error:.1e} from 1"
    return ROW.format(*start, output, state, forward_bound, gradient, gradient_bound, verdict)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m titans_kernels.verify",
        description="Compare every operator, dtype and backend with the float64 reference.",
    )
    parser.add_argument("--device", help="where to run; a GPU where there is one, else cpu")
    help_ = "run this one only; may be repeated; all that work here if not given"
    parser.add_argument("--backend", action="append", choices=("torch", "triton"), help=help_)
    parser.add_argument("--quick", action="store_true", help="shorter sequences")
    help_ = "head dimension to check for backend 'auto'; may be repeated; 64 and 128 if not given"
    parser.add_argument("--head-dim", action="append", type=int, help=help_)
    parser.add_argument("--env", action="store_true", help="describe the environment and stop")
    options = parser.parse_args(argv)
    device = options.device or default_device()
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {device}: {error}")

    if os.environ.get("RANK", "0") == "0":
        print(environment(device), flush=True)
    if options.env:
        return 0
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return _together(device, options.backend)
    print(f"\n{HEADER}", flush=True)
    # The tensors are too small to split: threads would wait for each other most of the time.
    torch.set_num_threads(1)
    backends = options.backend or default_backends(device)
    results = run_checks(
        device,
        backends,
        # Apple's GPUs have no float64.
        DTYPES[1:] if torch.device(device).type == "mps" else DTYPES,
        QUICK_LENGTH if options.quick else LENGTH,
        on_result=lambda result: print(format_row(result), flush=True),
    )
    compared = [result for result in results if result.covered]
    failed = sum(not result.ok for result in compared)
    verdict = f"{failed} FAIL" if failed else "all ok" if compared else "FAIL, nothing was compared"
    print(f"\n{len(compared)} comparisons with the float64 reference: {verdict}", flush=True)
    if not compared or failed:
        return 1
    ahead = [] if "triton" not in backends else options.head_dim or HEAD_DIMS
    return 0 if check_ahead(device, ahead) else 1


def check_ahead(device: str, head_dims: Sequence[int]) -> bool:
    """Check for `backend="auto"` what layers with such heads run; whether all has passed."""
    log, handler = logging.getLogger("titans_kernels"), logging.StreamHandler(sys.stdout)
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RuntimeWarning)
            for head_dim, dtype, backward in product(head_dims, SHORT_DTYPES, (False, True)):
                warmup(HEADS, head_dim, dtype=dtype, backward=backward, device=device)
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    failures = [str(x.message) for x in caught if "failed their check" in str(x.message)]
    for failure in failures:
        print(f"FAIL: {failure}")
    return not failures


def _together(device: str, backends: list[str] | None) -> int:
    """On all processes that torchrun has started."""
    from titans_kernels.distributed import verify

    if torch.device(device).type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.set_num_threads(1)
    kind = torch.device(device).type
    return verify.main(kind, tuple(backends or default_backends(device)))


if __name__ == "__main__":
    sys.exit(main())

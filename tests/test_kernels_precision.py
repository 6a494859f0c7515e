"""The Triton kernels in float32 and shorter dtypes: they lose what rounding alone costs.

One body serves the interpreter and a GPU. Every run is on poisoned memory: what `torch.empty` makes
is NaN, so an entry that no kernel writes, or that one reads too early, is seen.
"""

import subprocess
import sys
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from unittest import mock

import pytest
import torch
import triton
from kernel_cases import CASES, forced, inputs_of
from torch.utils import _pytree as pytree
from yardstick import assert_within_yardstick, flat, gradients, rounded, rounded_inputs

import reference
from titans_kernels import neural_memory, retrieve
from titans_kernels.kernels import operator
from titans_kernels.kernels.tiles import Blocks, Tile, architecture, tile

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
if INTERPRETED or DEVICE == "cpu":
    from triton_support.interpreter import install

    install()

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def _poisoned():
    """Uninitialised memory is NaN."""

    def filled(make):
        def empty(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return empty

    with ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch = mock.patch.object(owner, name, filled(getattr(owner, name)))
            stack.enter_context(patch)
        yield


def _to(x, place):
    """The same nest of tensors on a device or of a dtype."""
    if isinstance(x, dict):
        return {name: _to(part, place) for name, part in x.items()}
    if isinstance(x, tuple):
        return tuple(_to(part, place) for part in x)
    if hasattr(x, "momentum"):
        return x.map(lambda part: _to(part, place))
    if not torch.is_tensor(x) or (isinstance(place, torch.dtype) and not x.is_floating_point()):
        return x
    return x.detach().to(place)


def _kernels(inputs, **options):
    """o and the final state of the kernels, by name, on the CPU."""
    with torch.no_grad(), _poisoned():
        o, state = neural_memory(
            **_to(inputs, DEVICE), **options, backend="triton", output_final_state=True
        )
    return flat({"o": o.cpu(), "state": _to(state, "cpu")})


def _trained(op, inputs, backward=True, **options):
    """o, the state's matrices and the gradients of all inputs, by name, on the CPU."""
    o, state = op(**inputs, **options)
    named = flat({"o": o, "weights'": state.weights, "momentum'": state.momentum})
    if backward:
        named |= {f"d{name}": x for name, x in gradients(named, flat(inputs)).items()}
    return {name: x.detach().cpu() for name, x in named.items()}


def _trained_kernels(inputs, backward=True, **options):
    def leaf(x):
        return x.detach().to(DEVICE).requires_grad_(backward) if torch.is_tensor(x) else x

    with _poisoned():
        options |= {"backend": "triton", "output_final_state": True}
        return _trained(neural_memory, pytree.tree_map(leaf, inputs), backward, **options)


def _read(inputs):
    """The outputs of the queries at the weights that a sequence starts with, on the CPU."""
    q, weights, norm = (_to(inputs[name], DEVICE) for name in ("q", "weights", "norm"))
    with torch.no_grad(), _poisoned():
        return retrieve(q, weights, norm=norm, backend="triton").cpu()


def _read_exactly(exact, dtype):
    """The same of the definition, and of the yardstick where no token updates the memory."""
    still = {name: torch.zeros_like(exact[name]) for name in ("theta", "alpha", "eta")}
    yard, _ = rounded(**exact | still, dtype=dtype, chunk_size=exact["q"].shape[1])
    want = reference.retrieve(exact["q"], exact["weights"], norm=exact["norm"])
    return want.detach(), yard.detach()


def _values(op, inputs, **options):
    o, state = op(**inputs, **options)
    return {name: x.detach() for name, x in flat({"o": o, "state": state}).items()}


def _with(sizes):
    """Patch the operator's tile, unless it is the one that ships."""
    if sizes is None:
        return mock.patch.object(operator, "tile", tile)
    return mock.patch.object(operator, "tile", lambda *_: Tile(*sizes))


# ----------------------------------------------------------------------------- half precision

SMALL = {"T": 80, "D": 16, "hidden": 32}
ROWS = {
    "chunks of 16": {"tile": (32, 32)},
    "shipped tile": {"tile": None},
    "blocks of 128": {"tile": (128, 32, 64), "T": 300},
    "short chunks": {"tile": (16, 16), "chunk": 4},
    "one chunk over blocks": {"tile": (16, 16), "chunk": 40},
    "padded head dimension": {"tile": (32, 32), "D": 48, "hidden": 64},
    "no norm": {"tile": (32, 32), "norm": False},
    "linear": {"tile": (32, 32), "depth": 1, "norm": False},
    "linear with norm": {"tile": (32, 32), "depth": 1},
}
LARGE = {
    f"D {D}, chunk {chunk}, depth {depth}": {
        "tile": None,
        "T": 300,
        "D": D,
        "hidden": 4 * D,
        "chunk": chunk,
        "depth": depth,
    }
    for D in (16, 48, 64, 128, 256)
    for chunk, depth in ((16, 2), (100, 2), (16, 1))
}
ALL = {name: SMALL | {"chunk": 16, "depth": 2} | row for name, row in (ROWS | LARGE).items()}


def _pool(runs):
    """Of several runs, by tensor: what each of the three operators gives."""
    return {
        name: [torch.cat([run[i][name].double().flatten() for run in runs]) for i in range(3)]
        for name in runs[0][2]
    }


def _pooled(dtype, name, backward=True):
    """Of several seeds, by tensor: what kernels, definition and yardstick give."""
    row = dict(ALL[name])
    sizes, chunk, runs = row.pop("tile"), row.pop("chunk"), []
    arch = architecture(torch.device(DEVICE))
    size = tile(row["D"], row["hidden"], dtype, arch, chunk, backward)
    size = Tile(*sizes) if sizes else size
    block = min(chunk, Blocks.of(chunk, size).tokens)
    for seed in range(6):
        inputs, exact = rounded_inputs(dtype, seed=seed, B=1, H=2, **row)
        with _with(sizes):
            got = _trained_kernels(inputs, backward, chunk_size=chunk)
        definition = partial(reference.neural_memory, output_final_state=True)
        want = _trained(definition, exact, backward, chunk_size=chunk)
        yard = _trained(rounded, exact, backward, dtype=dtype, chunk_size=chunk, block=block)
        runs.append((got, want, yard))
    got = runs[0][0]
    assert got["o"].dtype == dtype and got["weights'[0]"].dtype == torch.float32
    if backward:
        assert got["dk"].dtype == dtype and got["dalpha"].dtype == torch.float32
    return _pool(runs)


# In the interpreter fp16 differs from bf16 in what is rounded alone: it need not have every row.
FP16 = ("chunks of 16", "one chunk over blocks", "linear")


def _rows(names):
    for name, kind in product(names, HALVES):
        marks = [pytest.mark.gpu] if name in LARGE else []
        marks += [pytest.mark.wide] if kind == "fp16" and name in ROWS and name not in FP16 else []
        yield pytest.param(HALVES[kind], name, id=f"{kind}-{name}", marks=marks)


@pytest.mark.parametrize("dtype, name", [*_rows(ROWS | LARGE)])
def test_half_precision_by_the_yardstick(dtype, name):
    pooled = _pooled(dtype, name)
    for tensor, values in pooled.items():
        assert_within_yardstick(tensor, *values)


@pytest.mark.parametrize("dtype, name", [*_rows(["shipped tile", "blocks of 128", *LARGE])])
def test_without_gradients_by_the_yardstick(dtype, name):
    """Where no backward pass follows, the tile may be another."""
    pooled = _pooled(dtype, name, backward=False)
    assert "o" in pooled and "do" not in pooled
    for tensor, values in pooled.items():
        assert_within_yardstick(tensor, *values)


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("depth", [1, 2])
def test_reading_by_the_yardstick(depth, dtype):
    inputs, exact = rounded_inputs(dtype, B=1, T=70, H=2, D=48, hidden=64, depth=depth)
    o = _read(inputs)
    assert o.dtype == dtype
    assert_within_yardstick("o", o, *_read_exactly(exact, dtype))


# ------------------------------------------------------------------------------------- float32

# What a sum in another order may cost, by experience with plain autograd in float32.
ANOTHER_ORDER = {"rms": 4.0, "largest": 4.0}


@pytest.mark.parametrize("case", CASES[::15], ids=str)  # an odd step: depths take turns
def test_float32_of_every_kind_of_case(case):
    inputs = _to(inputs_of(case), torch.float32)
    with forced(case):
        got = _kernels(inputs)
    want = _values(reference.neural_memory, _to(inputs, torch.float64), output_final_state=True)
    for name, exact in want.items():
        if exact.numel():
            error, limit = (got[name].double() - exact).abs().max(), 2e-6 * exact.abs().max()
            assert error <= limit, f"{name}: error {error:.1e}, bound {limit:.1e}"


def _float32(depth):
    """What kernels, definition and the PyTorch backend make of float32, pooled over seeds."""
    runs = []
    for seed in range(3):
        inputs, exact = rounded_inputs(
            torch.float32, seed=seed, B=1, T=80, H=2, D=16, hidden=32, depth=depth
        )
        with _with((32, 32)):
            got = _trained_kernels(inputs)
        options = {"output_final_state": True}
        want = _trained(reference.neural_memory, exact, **options)
        other = _trained(neural_memory, inputs, backend="torch", **options)
        runs.append((got, want, other))
    return _pool(runs)


@pytest.mark.parametrize("depth", [1, 2])
def test_float32_loses_what_the_torch_backend_loses(depth):
    for name, values in _float32(depth).items():
        assert_within_yardstick(name, *values, **ANOTHER_ORDER)


@contextmanager
def _tf32(allowed):
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def test_tf32_only_when_torch_says_so():
    """tf32 has fp16's ten bits of fraction; cut off, not rounded, they cost twice as much."""
    inputs, exact = rounded_inputs(torch.float16, B=1, T=80, H=2, D=16, hidden=32, depth=2)
    inputs = _to(inputs, torch.float32)
    learned = (
        _values(reference.neural_memory, exact)["o"],
        _values(rounded, exact, dtype=torch.float16)["o"],
    )
    judges = {"learned": learned, "read": _read_exactly(exact, torch.float16)}
    with _tf32(False):
        ieee = {"learned": _kernels(inputs)["o"], "read": _read(inputs)}
    with _tf32(True):
        tf32 = {"learned": _kernels(inputs)["o"], "read": _read(inputs)}
    for name, (want, yard) in judges.items():
        assert_within_yardstick(name, tf32[name], want, yard, 2.5, 4.0)
        error, coarse = ((x[name].double() - want).norm() for x in (ieee, tf32))
        assert error < coarse / 50


NEW_SETTINGS = """
import torch
from titans_kernels.kernels.launch import precision
def settled(value):
    assert precision() == value, (precision(), value)
settled("ieee")
torch.backends.cuda.matmul.fp32_precision = "tf32"
settled("tf32")
torch.backends.cuda.matmul.fp32_precision = "ieee"
settled("ieee")
torch.backends.cuda.matmul.fp32_precision = "none"
torch.backends.fp32_precision = "tf32"
settled("tf32")
"""


def test_tf32_by_fp32_precision():
    """In a process of its own: a setting once made by name cannot be mixed with `allow_tf32`."""
    done = subprocess.run([sys.executable, "-c", NEW_SETTINGS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------ the same bits


REPEATS = [pytest.param(64, 16, 2, id="small")] + [
    pytest.param(D, chunk, 250, id=f"D {D} chunk {chunk}", marks=pytest.mark.gpu)
    for D in (16, 48, 64, 128, 256)
    for chunk in (16, 100)
]


@pytest.mark.parametrize("D, chunk, runs", REPEATS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=("bf16", "fp32"))
def test_runs_agree_to_the_bit(D, chunk, runs, dtype):
    """With the tile that ships; what races would differ, where programs run concurrently."""
    T = 40 if runs < 10 else 500
    inputs, _ = rounded_inputs(dtype, B=2, T=T, H=2, D=D, hidden=2 * D, depth=2)

    def run():
        trained, alone = (_trained_kernels(inputs, x, chunk_size=chunk) for x in (True, False))
        alone = {f"{name} alone": x for name, x in alone.items()}
        return trained | alone | {"read": _read(inputs)}

    first = run()
    assert all(x.isfinite().all() for x in first.values())
    for _ in range(runs - 1):
        again = run()
        assert all(torch.equal(again[name], x) for name, x in first.items())

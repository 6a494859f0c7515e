"""Anything the operator takes, in any layout and cut anywhere, against the definition.

A few examples run by default; FUZZ=2000 is `make fuzz`. What it has ever found stays in `FOUND`.
"""

import os
from dataclasses import dataclass
from itertools import cycle

import pytest
import torch
import triton
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from inputs import make_inputs
from torch import Tensor
from torch.utils import _pytree as pytree
from triton_support.sanitizer import CHECKS, sanitize
from yardstick import TOKENS, assert_gradients, assert_values, flat, gradients

import reference
from titans_kernels import neural_memory

EXAMPLES = int(os.environ.get("FUZZ", "24"))
ACTIVATIONS = ("gelu_tanh", "gelu", "silu", "relu", "identity")
GATES = ("theta", "alpha", "eta")
LIMITS = {"theta": (0.0, 1e-310, 1.0, 1e4), "alpha": (0.0, 1e-310, 1.0), "eta": (0.0, 1e-310, 1.0)}
STEADY = 100  # how often over a perturbation may grow where values are compared


@dataclass(frozen=True)
class Example:
    lengths: tuple[int, ...] = (9, 9)
    packed: bool = False
    chunk: int = 4
    depth: int = 2
    H: int = 1
    D: int = 4
    hidden: int = 6
    norm: bool = True
    residual: bool = True
    activation: str = "gelu_tanh"
    per_layer: bool = False
    dtype: torch.dtype = torch.float64
    limits: tuple[tuple[str, float, float], ...] = ()  # gate, value, share of tokens
    layouts: tuple[str, ...] = ("dense",)  # of the tensors, in turn
    cuts: tuple[float, ...] = ()  # shares of each sequence
    train: bool = False
    seed: int = 0


def _dense(x):
    return x


def _reversed(x):
    back = tuple(range(x.dim()))[::-1]
    return x.permute(back).contiguous().permute(back)


def _every_other(x):
    return torch.stack([x, torch.full_like(x, 7)], -1)[..., 0]


def _offset(x):
    return torch.cat([x.new_full((1,), 7), x.flatten()])[1:].view(x.shape)


def _one_for_all(x):
    return x[:, :1].expand_as(x) if x.shape[1] else x


LAYOUTS = {f.__name__[1:]: f for f in (_dense, _reversed, _every_other, _offset, _one_for_all)}


@st.composite
def examples(draw, triton=False):
    packed = draw(st.booleans())
    lengths = st.lists(st.integers(0, 30) | st.just(1), min_size=1, max_size=4)
    if not packed:
        lengths = st.tuples(st.integers(0, 40), st.integers(1, 3)).map(lambda x: x[:1] * x[1])
    norm = draw(st.booleans())
    limits = st.sampled_from([(name, x) for name, values in LIMITS.items() for x in values])
    share = st.sampled_from((0.1, 0.5, 1.0))
    floats = (torch.float64,) * 3 + (torch.float32, torch.bfloat16, torch.float16)
    return Example(
        tuple(draw(lengths)),
        packed,
        draw(st.integers(1, 40)),
        draw(st.integers(1, 2 if triton else 3)),
        draw(st.integers(1, 3)),
        # A norm takes away all slope over 2 entries, and that of what only scales its input.
        16 if triton else draw(st.integers(4 if norm else 1, 8)),
        draw(st.sampled_from((16, 32))) if triton else draw(st.integers(3 if norm else 1, 9)),
        norm,
        draw(st.booleans()),
        draw(st.sampled_from(ACTIVATIONS)),
        draw(st.booleans()),
        torch.float64 if triton else draw(st.sampled_from(floats)),
        tuple((*gate, draw(share)) for gate in draw(st.lists(limits, max_size=2))),
        tuple(draw(st.lists(st.sampled_from(sorted(LAYOUTS)), min_size=1, max_size=4))),
        tuple(sorted(draw(st.lists(st.floats(0, 1), max_size=3)))),
        draw(st.booleans()),
        draw(st.integers(0, 1000)),
    )


def _inputs(case):
    """Leaves, and the arguments made of them."""
    rows, total = (1, sum(case.lengths)) if case.packed else (len(case.lengths), None)
    T = total if case.packed else max(case.lengths, default=0)
    leaves = make_inputs(
        *(rows, T, case.H, case.D, case.hidden, case.depth),
        norm=case.norm,
        per_layer_gates=case.per_layer,
        dtype=case.dtype,
        seed=case.seed,
        requires_grad=False,
    )
    generator = torch.Generator().manual_seed(case.seed)
    for name, value, share in case.limits:
        leaves[name].masked_fill_(
            torch.rand(leaves[name].shape, generator=generator) < share, value
        )
    leaves = pytree.tree_map_only(Tensor, lambda x: x.requires_grad_(case.train), leaves)
    places = cycle(case.layouts)

    def laid(x):
        return LAYOUTS[next(places)](x)

    arguments = pytree.tree_map_only(Tensor, laid, leaves)
    options = {"activation": case.activation, "residual": case.residual, "chunk_size": case.chunk}
    return leaves, arguments | options


def _ends(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def _run(op, case, arguments, cuts=(), **options):
    """Output and final state of the pieces, as of one call: in each some tokens of every row."""
    if case.packed:
        options["cu_seqlens"] = _ends(case.lengths)
    if not cuts:
        return op(**arguments, **options, output_final_state=True)
    state, pieces = None, []
    edges = [[round(x * n) for x in (0, *cuts, 1)] for n in case.lengths]
    for i in range(len(cuts) + 1):
        spans = [(edge[i], edge[i + 1]) for edge in edges]
        if case.packed:
            starts = _ends(case.lengths).tolist()
            chosen = [torch.arange(s + a, s + b) for s, (a, b) in zip(starts, spans, strict=False)]
            part = {name: arguments[name][:, torch.cat(chosen)] for name in TOKENS}
            options["cu_seqlens"] = _ends([b - a for a, b in spans])
        else:
            a, b = spans[0] if spans else (0, 0)
            part = {name: arguments[name][:, a:b] for name in TOKENS}
        o, state = op(**arguments | part, **options, initial_state=state, output_final_state=True)
        sizes = [b - a for a, b in spans]
        pieces.append(o.split(sizes, 1) if case.packed else [o])
    return torch.cat([x for row in zip(*pieces, strict=True) for x in row], 1), state


def _growth(case, arguments, o):
    """By how much a change of k has grown, at most, up to each token and head: [B, T, H]."""
    moved = arguments | {"k": arguments["k"] + 1e-10 * torch.randn_like(arguments["k"])}
    change = (_run(reference.neural_memory, case, moved)[0] - o).abs().amax(-1) / 1e-10
    theta = arguments["theta"].flatten(3).amax(-1) if case.per_layer else arguments["theta"]
    change = change.masked_fill(theta > 10, torch.inf)  # weights so large that sums lose all digits
    rows = change.split(case.lengths, 1) if case.packed else [change]
    return torch.cat([x.cummax(1).values for x in rows], 1)


def check(case, backend="torch"):
    generator = torch.Generator().manual_seed(case.seed)
    torch.manual_seed(int(torch.randint(1000, (), generator=generator)))
    leaves, arguments = _inputs(case)
    exact = pytree.tree_map_only(Tensor, Tensor.double, arguments)
    o, state = _run(neural_memory, case, arguments, case.cuts, backend=backend)
    want, final = _run(reference.neural_memory, case, exact)

    assert o.dtype == case.dtype and o.shape == want.shape
    assert torch.equal(state.length, final.length)
    with torch.no_grad():
        if not want.numel() or not want.isfinite().all():
            return
        growth = _growth(case, exact, want)
        # What is stored is rounded once; all else in float32 at least, and grows as k's change.
        stored = torch.finfo(case.dtype)
        inner = torch.finfo(torch.promote_types(case.dtype, torch.float32)).eps
        steady, scale = growth < STEADY, want.abs().amax(-1).cummax(1).values
        bound = (stored.eps + 50 * STEADY * max(inner, 1e-15)) * scale + stored.tiny * stored.eps
        error = (o - want).abs().amax(-1)
        assert (error <= bound)[steady].all(), f"o: {(error - bound)[steady].max():.1e} too much"
        if not steady.all() or case.dtype != torch.float64:
            return
        assert_values(flat({"state": state}), flat({"state": final}), 1e-10)
    if case.train:
        leaves = {name: x for name, x in flat(leaves).items()}
        results = gradients({"o": o} | flat({"state": state}), leaves)
        assert_gradients(results, gradients({"o": want} | flat({"state": final}), leaves), 1e-8)


FOUND = [
    Example(lengths=(0, 1, 0), packed=True),
    Example(lengths=(0, 0)),
]


def _with_found(test):
    for case in FOUND:
        test = example(case)(test)
    return test


_settings = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="FUZZ" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)


@_settings
@_with_found
@given(examples())
def test_it_is_the_definition(case):
    check(case)


@pytest.mark.skipif(
    torch.cuda.is_available() and not triton.knobs.runtime.interpret,
    reason="float64 runs in the interpreter only",
)
@settings(_settings, max_examples=max(2, EXAMPLES // 8))
@given(examples(triton=True))
def test_kernels_are_too(case):
    with sanitize(checks=CHECKS - {"unwritten"}, seed=case.seed):
        check(case, "triton")

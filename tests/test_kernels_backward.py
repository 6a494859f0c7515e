"""Gradients of the Triton kernels against autograd through the definition, in float64.

Every run is watched by the sanitizer, the programs of each launch in an order of their own.
"""

import dataclasses
import os
import re
from functools import partial
from itertools import pairwise

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import ACTIVATIONS, CASES, Case, forced, leaves_of
from torch.utils import _pytree as pytree
from triton_support.interpreter import install
from triton_support.sanitizer import CHECKS, sanitize
from yardstick import (
    FIELDS,
    assert_gradients,
    assert_values,
    cotangents,
    flat,
    gradients,
    measure,
    piece,
)

import reference
from titans_kernels import neural_memory
from titans_kernels.kernels import operator
from titans_kernels.packing import Options, pack

if torch.cuda.is_available() and not triton.knobs.runtime.interpret:
    pytest.skip("float64 runs in the interpreter only", allow_module_level=True)
install()

# Scratch of tokens that are not there is never written, and never read.
CHECKED = CHECKS - {"unwritten"}


def _measure(case, inputs, op=neural_memory):
    """Values and gradients of kernels that are watched and run in an order of theirs."""
    with forced(case), sanitize(checks=CHECKED, seed=case.seed) as watch:
        got = measure(op, inputs, backend="triton")
        assert not [name for name in watch.unwritten() if name.startswith("query.o:")]
    return got


def _assert_equal(got, want, bound=None):
    assert_values(got.values, want.values, *([] if bound is None else [bound]))
    assert_gradients(got.gradients, want.gradients, *([] if bound is None else [bound]))


def check(case):
    inputs = leaves_of(case)
    before = {name: x.detach().clone() for name, x in flat(inputs).items()}
    _assert_equal(_measure(case, inputs), measure(reference.neural_memory, inputs))
    for name, x in flat(inputs).items():
        assert torch.equal(x, before[name]), f"{name} was written to"


def _essential(i, case):
    """Every edge of its own, and a sixth of the products of settings, in which those take turns."""
    return i % 6 == 0 or not re.search(r"depth \d tile", case.edge)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if _essential(i, case) else pytest.mark.wide)
        for i, case in enumerate(CASES)
    ],
    ids=str,
)
def test_values_and_gradients_equal_the_reference(case):
    check(case)


@st.composite
def _cases(draw):
    lengths = draw(st.none() | st.lists(st.integers(0, 25), min_size=1, max_size=3).map(tuple))
    B = 1 if lengths else draw(st.integers(1, 2))
    rows = len(lengths) if lengths else B
    return Case(
        "",
        T=sum(lengths) if lengths else draw(st.integers(0, 45)),
        chunk=draw(st.integers(2, 45)),
        depth=draw(st.integers(1, 2)),
        D=draw(st.sampled_from((16, 32, 48))),
        hidden=draw(st.sampled_from((16, 32, 48))),
        H=draw(st.integers(1, 2)),
        B=B,
        norm=draw(st.booleans()),
        residual=draw(st.booleans()),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        per_layer=draw(st.booleans()),
        tile=(draw(st.sampled_from((16, 32))), draw(st.sampled_from((16, 32)))),
        group=draw(st.none() | st.integers(1, 3)),
        lengths=lengths,
        past=draw(st.none() | st.tuples(*[st.integers(0, 20)] * rows)),
        gates={"alpha": (draw(st.sampled_from((0.0, 1.0))), draw(st.floats(0, 1)))},
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=15, deadline=None, derandomize="CI" in os.environ)
@given(_cases())
def test_values_and_gradients_equal_the_reference_anywhere(case):
    check(case)


# ------------------------------------------------------------------------------------- streaming


def _in_pieces(edges, between=lambda state: state):
    """The operator that runs the pieces between these edges, one after the other."""

    def run(initial_state=None, op=neural_memory, **inputs):
        outputs, state = [], initial_state
        for start, stop in pairwise(edges):
            part = piece(inputs, start, stop)
            o, state = op(**part, initial_state=None if state is None else between(state))
            outputs.append(o)
        return torch.cat(outputs, 1), state

    return run


@pytest.mark.parametrize("cuts", [(0, 40), (1,), (5, 15), (16, 33), (20, 21, 39)], ids=str)
@pytest.mark.parametrize("chunk", [16, 20])
def test_gradients_flow_through_cuts(cuts, chunk):
    case = Case("", 40, chunk, group=1, seed=chunk)
    inputs = leaves_of(case)
    got = _measure(case, inputs, _in_pieces((0, *cuts, 40)))
    _assert_equal(got, measure(reference.neural_memory, inputs))


@pytest.mark.parametrize("depth, chunk", [(1, 3), (2, 3), (2, 1), (2, 40)])
def test_gradients_flow_through_every_token(depth, chunk):
    case = Case("", 6, chunk, depth, past=(2,))
    inputs = leaves_of(case)
    got = _measure(case, inputs, _in_pieces(range(7)))
    _assert_equal(got, measure(reference.neural_memory, inputs))


def test_detach_truncates():
    """In the open chunk too: its tokens are learned later, yet have no gradient from there."""
    case, edges = Case("", 30, 8), (0, 13, 30)
    inputs, cut = leaves_of(case), _in_pieces(edges, partial(pytree.tree_map, torch.Tensor.detach))
    want = measure(lambda **x: cut(op=reference.neural_memory, **x), inputs)
    _assert_equal(_measure(case, inputs, cut), want)
    whole = measure(reference.neural_memory, inputs).gradients["k"]
    assert not torch.allclose(want.gradients["k"][:, :13], whole[:, :13])


# ------------------------------------------------------------------------------- what is requested

SMALL = Case("", 11, 4, past=(6,), per_layer=True)
SUBSETS = {
    "queries": ("q",),
    "keys": ("k",),
    "values": ("v",),
    "one gate": ("alpha",),
    "norm bias": ("norm[1]",),
    "weights": ("weights[0]", "weights[1]"),
    "a state's weights": ("initial_state.weights[1]",),
    "a state's tail": ("initial_state.v", "initial_state.eta"),
    "momentum and gates": ("theta", "initial_state.momentum[0]"),
    "nothing": (),
}


@pytest.mark.parametrize("names", SUBSETS.values(), ids=SUBSETS)
def test_a_subset_of_gradients_is_part_of_all(names):
    case = SMALL if names != SUBSETS["weights"] else Case("", 11, 4)
    inputs = leaves_of(case)
    want = _measure(case, inputs)
    for name, leaf in flat(inputs).items():
        leaf.requires_grad_(name in names)
    with forced(case):
        o, state = neural_memory(**inputs, backend="triton", output_final_state=True)
        values, leaves = flat({"o": o, "state": state}), {n: flat(inputs)[n] for n in names}
        assert_values(values, want.values, 0.0)
        assert o.requires_grad == bool(names)
        if names:
            got = gradients(values, leaves)
            assert_gradients(got, {n: want.gradients[n] for n in names}, 0.0)


@pytest.mark.parametrize("depth, chunk", [(1, 4), (2, 4), (2, 40)])
def test_cotangents_may_be_of_any_kind(depth, chunk):
    """Expanded, transposed, of one result alone; what they and the graph hold is not written to."""
    case = Case("", 7, chunk, depth, H=2, past=(6,))
    inputs = leaves_of(case)
    with forced(case):
        o, state = neural_memory(**inputs, backend="triton", output_final_state=True)
    want_o, want = reference.neural_memory(**inputs, output_final_state=True)
    W, S, want_W, want_S = (x[-1] for y in (state, want) for x in (y.weights, y.momentum))
    for x, want_x, kind in (
        (o, want_o, lambda dx: dx[:, :1, :1, :1].expand_as(dx)),  # as of o.sum()
        (o, want_o, lambda dx: dx.mT.contiguous().mT),
        (W, want_W, lambda dx: dx[:, :, :1].expand_as(dx)),
        (S, want_S, lambda dx: dx.mT.contiguous().mT),
    ):
        dx = kind(*cotangents([x]))
        before, found = dx.clone(), []
        for y in (x, want_x):
            with forced(case):
                found.append(
                    torch.autograd.grad(
                        y,
                        list(flat(inputs).values()),
                        dx,
                        retain_graph=True,
                        materialize_grads=True,
                    )
                )
        assert_gradients(*(dict(zip(flat(inputs), x, strict=True)) for x in found))
        assert torch.equal(dx, before)


def test_runs_agree_to_the_bit():
    """Whatever the order of programs, and again from one graph."""
    case = Case("", 20, 20, B=2, group=1)
    inputs, runs = leaves_of(case), []
    for seed in range(2):
        with forced(case), sanitize(checks=CHECKED, seed=seed):
            o, state = neural_memory(**inputs, backend="triton", output_final_state=True)
            values = flat({"o": o, "state": state})
            runs += [gradients(values, flat(inputs), retain_graph=True) for _ in range(2 - seed)]
    for again in runs[1:]:
        assert_gradients(again, runs[0], 0.0)


def test_a_second_derivative_says_what_gives_it():
    inputs = leaves_of(SMALL)
    with forced(SMALL):
        o, _ = neural_memory(**inputs, backend="triton")
        (dk,) = torch.autograd.grad(o.sum(), inputs["k"], create_graph=True)
        with pytest.raises(RuntimeError, match="second derivatives take backend='torch'"):
            dk.sum().backward()


# ---------------------------------------------------------------------------- who has no gradient


@pytest.mark.parametrize("chunk", [5, 20])
def test_a_sequence_without_tokens_only_hands_on(chunk):
    case = Case("", 21, chunk, lengths=(0, 21, 0), past=(7, 0, 3))
    inputs = leaves_of(case)
    with forced(case):
        o, state = neural_memory(**inputs, backend="triton", output_final_state=True)
        values = flat({"o": o, "state": state})
        of_o = gradients({"o": o}, flat(inputs), retain_graph=True)
        of_all = gradients(values, flat(inputs))
    # A cotangent's own place decides its value: those of all results, by name.
    given = dict(zip(values, cotangents(values.values()), strict=True))
    for name in of_all:
        if name.startswith("initial_state."):
            field = name.removeprefix("initial_")
            for n, length in ((0, 7 % chunk), (2, 3)):
                assert not of_o[name][n].any(), name
                want = given[field][n]
                if of_all[name].dim() < 5 and "[" not in name:
                    want = want.clone()
                    want[length:] = 0  # what fills the tail up
                assert torch.equal(of_all[name][n], want), name


@pytest.mark.parametrize("depth", [1, 2])
def test_no_token_no_gradient(depth):
    case = Case("", 0, 5, depth, B=2, past=(7, 5))
    inputs = leaves_of(case)
    got = _measure(case, inputs)
    _assert_equal(got, measure(reference.neural_memory, inputs), 0.0)
    assert all(not got.gradients[name].any() for name in ("weights[0]", "norm[0]", "norm[1]"))


@pytest.mark.parametrize("chunk", [5, 20])
def test_rows_behind_the_last_sequence_contribute_nothing(chunk):
    case = Case("", 33, chunk, lengths=(20, 13))
    x = leaves_of(case)
    gates, options = (x["theta"], x["alpha"], x["eta"]), Options("gelu_tanh", True)
    packed, longest = pack(
        x["q"], x["k"], x["v"], gates, x["weights"], x["norm"], None, x["cu_seqlens"]
    )

    def run(packed):
        """Gradients with cotangents of one, of every sequence's tokens and state."""
        final = [torch.ones_like(w) for w in (*packed.weights, *packed.momentum)]
        with torch.no_grad(), forced(case), sanitize(checks=CHECKED, seed=1):
            kept = [final[0].new_zeros(x) for x in operator.kept_shapes(packed, chunk)]
            operator.forward(packed, options, chunk, longest, kept)
            do = torch.ones_like(packed.q)
            return operator.backward(packed, options, chunk, longest, kept, do, final)

    junk = [
        torch.cat([x, torch.full((9, *x.shape[1:]), torch.nan, dtype=x.dtype)]) for x in packed[1:6]
    ]
    want, got = (
        run(packed),
        run(packed._replace(**dict(zip(packed._fields[1:6], junk, strict=True)))),
    )
    assert torch.equal(got[0], want[0])
    for g, w in zip(got[1:6], want[1:6], strict=True):
        assert torch.equal(g[:33], w) and not g[33:].any()
    assert all(map(torch.equal, got[6:], want[6:]))


# ---------------------------------------------------------------------------- finite differences


@pytest.mark.parametrize("depth, chunk", [(1, 2), (2, 2), (2, 20)])
def test_gradcheck(depth, chunk):
    case = Case("", 3, chunk, depth, hidden=16, past=(1,), per_layer=depth == 2)
    inputs = leaves_of(case)
    named = [name for name in flat(inputs) if not name.startswith("weights")]  # a state's are read

    def run(*tensors):
        given = dict(zip(named, tensors, strict=True))
        o, state = neural_memory(
            **{name: _with(x, name, given) for name, x in inputs.items()},
            backend="triton",
            output_final_state=True,
        )
        return torch.cat([x.flatten() for x in (o, *state.weights, *state.momentum)])

    leaves = [flat(inputs)[name] for name in named]
    with forced(case):
        assert torch.autograd.gradcheck(run, leaves, fast_mode=True, check_undefined_grad=False)


def _with(x, name, given):
    """An argument of `flat`'s names with other tensors in place of its own."""
    if isinstance(x, tuple):
        return tuple(_with(part, f"{name}[{i}]", given) for i, part in enumerate(x))
    if hasattr(x, "momentum"):
        fields = {field: _with(getattr(x, field), f"{name}.{field}", given) for field in FIELDS}
        return dataclasses.replace(x, **fields)
    return given.get(name, x)

"""NaN and infinities are causal: which outputs, states and gradients they reach is defined."""

import itertools
from unittest import mock

import pytest
import torch
from inputs import make_inputs
from torch.utils import _pytree as pytree
from yardstick import piece

import reference
from titans_kernels import neural_memory, nonfinite, retrieve

NAN, INF = float("nan"), float("inf")
PLACES = ("q", "k", "v", "theta", "alpha", "eta")
SIZES = {"B": 2, "H": 2, "D": 16, "hidden": 16, "depth": 2, "requires_grad": False}
T, AT = 21, 13  # a token in the middle of a block, and of a chunk of 5


def _inputs(place, value, *, at=AT, row=0, **sizes):
    """Inputs in which one number of head 1 is not finite."""
    inputs = make_inputs(**SIZES | {"T": T} | sizes)
    x = inputs[place]
    x[row, at, 1].view(-1)[-1] = value
    return inputs


def _finite(tree):
    """Which tokens and heads are finite: the trailing dimensions of every tensor as one."""
    leaves = [x for x in pytree.tree_leaves(tree) if torch.is_tensor(x) and x.is_floating_point()]
    return [x.isfinite().flatten(min(3, x.dim() - 1)).all(-1) for x in leaves]


def _assert_same(got, want):
    """The same tokens are finite, and those have the same values."""
    for is_finite, expected in zip(_finite(got), _finite(want), strict=True):
        assert torch.equal(is_finite, expected)
    leaves = (pytree.tree_leaves(tuple(vars(x).values()) if hasattr(x, "map") else x) for x in got)
    found = [x for x in itertools.chain(*leaves) if x is not None]  # what has no resets counts none
    wanted = pytree.tree_leaves([tuple(x) for x in want])
    for x, y in zip(found, wanted, strict=True):
        where = x.isfinite() & y.isfinite()
        torch.testing.assert_close(x[where], y[where], atol=1e-11, rtol=1e-11)


def _both(inputs, backend, **options):
    options |= {"output_final_state": True}
    o, state = neural_memory(**inputs, **options, backend=backend)
    expected, final = reference.neural_memory(**inputs, **options)
    _assert_same((o, state), ((expected,), final))
    return o, expected


ON_TORCH = [(place, value, "torch") for place in PLACES for value in (NAN, INF, -INF)]
ON_TRITON = [("q", NAN, "triton"), ("k", INF, "triton"), ("eta", NAN, "triton")]


@pytest.mark.parametrize("place, value, backend", ON_TORCH + ON_TRITON)
def test_it_reaches_what_the_definition_says(place, value, backend):
    o, _ = _both(_inputs(place, value), backend, chunk_size=5)
    reached = torch.zeros(2, T, 2, dtype=torch.bool)
    reached[0, AT : AT + 1 if place == "q" else None, 1] = True
    assert torch.equal(~o.isfinite().all(-1), reached)


CASES = {
    "its first token": ({"at": 0}, {}),
    "its last token, in an open chunk": ({"at": T - 1}, {}),
    "one layer": ({"depth": 1, "norm": False}, {"residual": False}),
    "a gate of one layer": ({"per_layer_gates": True}, {}),
    "a chunk over blocks": ({"T": 90, "at": 70, "B": 1}, {"chunk_size": 80}),
    "packed": ({"B": 1, "T": 21, "lengths": [6, 0, 1, 14], "at": 10}, {}),
    "the only token of a packed sequence": ({"B": 1, "lengths": [6, 1, 14], "at": 6}, {}),
}


@pytest.mark.parametrize("place", ["v", "eta"])
@pytest.mark.parametrize("sizes, options", CASES.values(), ids=CASES)
def test_wherever_it_is(sizes, options, place):
    _both(_inputs(place, NAN, **sizes), "torch", **{"chunk_size": 5} | options)


@pytest.mark.parametrize("sizes, options", [CASES["a chunk over blocks"], CASES["packed"]])
def test_wherever_it_is_on_triton(sizes, options):
    _both(_inputs("k", INF, **sizes), "triton", **{"chunk_size": 5} | options)


@pytest.mark.parametrize("cut", [5, AT, AT + 1, 18, T - 1])
@pytest.mark.parametrize("step", [None, 1])
def test_it_is_carried_through_the_state(cut, step):
    inputs = _inputs("k", NAN)
    want, final = reference.neural_memory(**inputs, chunk_size=5, output_final_state=True)
    outputs, state = [], None
    cuts = [0, cut, T] if step is None else [0, cut, *range(cut + 1, T + 1)]
    for start, stop in itertools.pairwise(cuts):
        o, state = neural_memory(
            **piece(inputs, start, stop),
            **{"chunk_size": 5, "initial_state": state, "output_final_state": True},
        )
        outputs.append(o)
    _assert_same((torch.cat(outputs, 1), state), ((want,), final))
    q = inputs["q"][:, :3]
    network = {"norm": inputs["norm"]}
    read, expected = retrieve(q, state, **network), reference.retrieve(q, final, **network)
    _assert_same((read,), ((expected,),))


@pytest.mark.parametrize(
    "place, backend", [("k", "torch"), ("alpha", "torch"), ("alpha", "triton")]
)
def test_gradients(place, backend):
    """Those of its sequence and head are not finite, whatever they come from; others are exact."""

    def gradients(op, loss, **options):
        inputs = pytree.tree_map(
            lambda x: x.clone().requires_grad_(), _inputs(place, NAN, T=12, at=7)
        )
        o, state = op(**inputs, chunk_size=5, output_final_state=True, **options)
        leaves = pytree.tree_leaves(inputs)
        return torch.autograd.grad(loss(o, state), leaves, materialize_grads=True)

    losses = [lambda o, s: o.sum(), lambda o, s: o.sum() + sum(x.sum() for x in s.momentum)]
    for loss in losses[: 2 if backend == "torch" else 1]:
        got = gradients(neural_memory, loss, backend=backend)
        want = gradients(reference.neural_memory, loss)
        for is_finite, expected in zip(_finite(got), _finite(want), strict=True):
            assert torch.equal(is_finite, expected)
        for x, y in zip(got, want, strict=True):
            where = x.isfinite() & y.isfinite()
            torch.testing.assert_close(x[where], y[where], atol=1e-10, rtol=1e-10)


def test_numbers_whose_sum_overflows_are_finite():
    inputs = make_inputs(**SIZES | {"T": T, "dtype": torch.float16})
    inputs["v"] = torch.full_like(inputs["v"], 60_000.0)
    assert inputs["v"].sum().isinf()
    assert neural_memory(**inputs)[0].isfinite().all()


@pytest.mark.parametrize("lengths", [None, [6, 0, 1, 14], [0, 0]])
def test_a_gpu_does_not_look_first(lengths):
    """There finite inputs too are cleaned and marked, to the same bits."""
    sizes = {"T": T, "per_layer_gates": True, "requires_grad": True}
    if lengths is not None:
        sizes |= {"B": 1, "T": sum(lengths), "lengths": lengths}

    def run():
        inputs = make_inputs(**SIZES | sizes)
        o, state = neural_memory(**inputs, chunk_size=5, output_final_state=True)
        leaves = [x for x in pytree.tree_leaves(inputs) if x.is_floating_point()]
        loss = o.sum() + sum(x.sum() for x in state.weights)
        return [o, *state.weights, *torch.autograd.grad(loss, leaves, materialize_grads=True)]

    with mock.patch.object(nonfinite, "_finite", lambda *_: False):
        marked = run()
    assert all(map(torch.equal, marked, run()))


def test_gradients_of_cuts():
    """Rows of packed tokens that belong to no sequence hand no NaN to the tokens they copy."""
    inputs = _inputs("k", NAN, at=15, row=1)
    inputs["k"].requires_grad_()
    _, state = neural_memory(**piece(inputs, 0, 12), chunk_size=5, output_final_state=True)
    o, _ = neural_memory(**piece(inputs, 12, T), chunk_size=5, initial_state=state)
    (grad,) = torch.autograd.grad(o.sum(), inputs["k"])
    finite = torch.ones(2, T, 2, dtype=torch.bool)
    finite[1, :, 1] = False
    assert torch.equal(grad.isfinite().all(-1), finite)

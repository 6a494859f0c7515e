"""A state as an object: what reads it, what copies and chooses from it, what it does not show."""

import copy
import dataclasses
import io

import pytest
import torch
from inputs import make_inputs
from torch.utils import _pytree as pytree
from yardstick import TOKENS, assert_gradients, assert_values, flat, gradients, piece

import reference
from titans_kernels import MemoryState, neural_memory, retrieve

# ------------------------------------------------------------------------------------ retrieve


READS = {
    "no tail": ((32, 16), 16),
    "tails of their own": ((21, 47, 0), 16),
    "one sequence": ((21,), 16),
    "a tail over two blocks": ((69, 3), 70),
    "chunks of one": ((5, 0), 1),
}


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("past, chunk", READS.values(), ids=READS)
def test_a_state_is_read_as_its_last_token_left_it(past, chunk, packed):
    inputs = make_inputs(
        1, sum(past), 2, 4, 6, 2, lengths=past, per_layer_gates=True, requires_grad=False
    )
    _, state = neural_memory(**inputs, chunk_size=chunk, output_final_state=True)
    state = state.map(lambda x: x.requires_grad_() if x.is_floating_point() else x)
    query = make_inputs(1 if packed else len(past), 30, 2, 4, 6, 2, seed=1)
    counts = [30, *[0] * (len(past) - 1)] if len(past) < 3 else [0, 13, 17]
    options = {"norm": query["norm"], "activation": "silu", "residual": False}
    if packed:
        options["cu_seqlens"] = torch.tensor([0, *counts]).cumsum(0)
    leaves = flat({"q": query["q"], "norm": query["norm"], "state": state})
    found = [read(query["q"], state, **options) for read in (retrieve, reference.retrieve)]
    assert_values({"o": found[0]}, {"o": found[1]})
    actual, expected = (gradients({"o": o}, leaves) for o in found)
    assert_gradients(actual, expected)


@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 13, 13, 30])])
@pytest.mark.parametrize("depth, activation", [(1, "identity"), (2, "gelu"), (4, "relu")])
def test_weights_are_read_as_they_are(depth, activation, cu_seqlens):
    B = 2 if cu_seqlens is None else 1
    x = make_inputs(B, 30, 2, 4, 6, depth)
    options = {"norm": x["norm"], "activation": activation, "cu_seqlens": cu_seqlens}
    found = [read(x["q"], x["weights"], **options) for read in (retrieve, reference.retrieve)]
    leaves = flat({name: x[name] for name in ("q", "weights", "norm")})
    assert_values({"o": found[0]}, {"o": found[1]})
    assert_gradients(*(gradients({"o": o}, leaves) for o in found))


# --------------------------------------------------------------------------- states as objects


def _state():
    inputs = make_inputs(3, 21, 2, 4, 6, 2, requires_grad=False)
    return neural_memory(**inputs, output_final_state=True)[1]


def test_a_state_is_a_pytree():
    state = _state()
    parts, spec = pytree.tree_flatten(state)
    assert len(parts) == 2 * 2 + 6 and all(map(torch.is_tensor, parts))
    doubled = pytree.tree_map(lambda x: 2 * x, state)
    assert isinstance(doubled, MemoryState) and torch.equal(
        doubled.momentum[1], 2 * state.momentum[1]
    )
    assert torch.equal(pytree.tree_unflatten(parts, spec).length, state.length)


@pytest.mark.parametrize("how", ["saved and loaded", "copied"])
def test_a_state_is(how):
    state, file = _state(), io.BytesIO()
    if how == "copied":
        other = copy.deepcopy(state)
    else:
        torch.save(state, file)
        file.seek(0)
        other = torch.load(file, weights_only=True)
    assert isinstance(other, MemoryState) and torch.equal(other.length, state.length)
    assert_values(flat({"s": other}), flat({"s": state}), 0.0)


def test_rows_of_a_state_may_be_chosen():
    inputs, state = make_inputs(3, 9, 2, 4, 6, 2, requires_grad=False), _state()
    want, _ = neural_memory(**inputs, initial_state=state)
    order = torch.tensor([2, 0, 2])
    rows = inputs | {name: inputs[name][order] for name in TOKENS}
    o, _ = neural_memory(**rows, initial_state=state.index_select(order))
    assert_values({"o": o}, {"o": want[order]}, 1e-14)


def test_what_lies_behind_an_open_chunk_has_no_effect():
    """A state may lie in memory of the user's own, its padding never written."""
    inputs, state = make_inputs(3, 9, 2, 4, 6, 2, requires_grad=False), _state()
    options = {"norm": inputs["norm"]}
    dirty = copy.deepcopy(state)
    for x in (dirty.k, dirty.v, dirty.theta, dirty.alpha, dirty.eta):
        x[:, 5:] = torch.nan
    runs = [
        neural_memory(**inputs, initial_state=s, output_final_state=True) for s in (state, dirty)
    ]
    clean, unclean = (flat({"o": o, "state": after}) for o, after in runs)
    assert_values(unclean, clean, 0.0)
    reads = [{"o": retrieve(inputs["q"], s, **options)} for s in (state, dirty)]
    assert_values(reads[1], reads[0], 0.0)


def test_weights_behind_a_state_are_not_read():
    """They may be anything, NaN too: the state is in their place, and their gradient is zero."""
    inputs = make_inputs(2, 20, 2, 4, 6, 2)
    _, state = neural_memory(**inputs, output_final_state=True)
    past = {"initial_state": state.detach()}
    want, _ = neural_memory(**inputs, **past)
    nothing = tuple(torch.full_like(w, torch.nan, requires_grad=True) for w in inputs["weights"])
    got, _ = neural_memory(**inputs | {"weights": nothing}, **past)
    assert torch.equal(got, want)
    for grad in torch.autograd.grad(got.sum(), nothing):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("T", [1, 2])
def test_a_state_takes_the_dtype_of_the_gates_it_goes_on_with(T):
    inputs = make_inputs(1, 5, 1, 4, 6, 2, requires_grad=False)
    _, state = neural_memory(**inputs, output_final_state=True)
    more = piece(inputs, 0, T)
    more |= {name: more[name].to(torch.bfloat16) for name in ("theta", "alpha", "eta")}
    _, after = neural_memory(**more, initial_state=state, output_final_state=True)
    for name in ("theta", "alpha", "eta"):
        gate = getattr(after, name)
        assert gate.dtype == torch.bfloat16
        assert torch.equal(gate[:, :5], getattr(state, name)[:, :5].to(torch.bfloat16))


@pytest.mark.parametrize("T", [1, 2])
def test_what_lies_behind_an_open_chunk_has_no_gradient(T):
    """Nor does it stay: rows of a state that are not tokens are zero, whatever they were."""
    inputs = make_inputs(1, 5, 1, 4, 6, 2, requires_grad=False)
    _, state = neural_memory(**inputs, output_final_state=True)
    k = state.k.clone()
    k[:, 5:] = 7.0
    k.requires_grad_()
    past = {"initial_state": dataclasses.replace(state, k=k)}
    _, after = neural_memory(**piece(inputs, 0, T), **past, output_final_state=True)
    assert not after.k[:, 5 + T :].any()
    (grad,) = torch.autograd.grad(after.k.sum(), k)
    assert torch.equal(grad[:, :5], torch.ones_like(grad[:, :5])) and not grad[:, 5:].any()


def test_a_state_is_read_by_sequences_of_any_length():
    """Long and short ones together, in any order: outputs and gradients are those of each alone."""
    lengths = (3, 600, 0, 40)
    make = {"H": 2, "D": 4, "hidden": 6, "depth": 2}
    _, state = neural_memory(
        **make_inputs(4, 16, **make, requires_grad=False), output_final_state=True
    )
    inputs = make_inputs(1, sum(lengths), **make, lengths=lengths)
    weights = [w.requires_grad_() for w in state.weights]
    leaves = [inputs["q"], *weights, *inputs["norm"]]

    def results(o):
        cotangent = torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o)
        return [o, *torch.autograd.grad((o * cotangent).sum(), leaves)]

    q, norm = inputs["q"], {"norm": inputs["norm"]}
    got = results(retrieve(q, state, **norm, cu_seqlens=inputs["cu_seqlens"]))
    alone = [
        reference.retrieve(x, state.index_select(torch.tensor([n])), **norm)
        for n, x in enumerate(q.split(lengths, 1))
    ]
    for x, y in zip(got, results(torch.cat(alone, 1)), strict=True):
        torch.testing.assert_close(x, y, atol=1e-11, rtol=1e-11)

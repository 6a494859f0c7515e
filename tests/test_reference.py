"""The reference against oracles that share nothing with it."""

import doctest
import math
from types import SimpleNamespace

import pytest
import torch
from inputs import make_inputs

from reference import State, memory, neural_memory, retrieve

TOLERANCE = 1e-10


def _assert_close(name, actual, expected, tolerance=TOLERANCE):
    assert actual.shape == expected.shape, f"{name}: {actual.shape} is not {expected.shape}"
    if actual.numel():
        error = (actual - expected).abs().max().item()
        bound = tolerance * expected.abs().max().item() + 1e-300
        assert error <= bound, f"{name}: error {error:.1e}, bound {bound:.1e}"


def _leaves(inputs):
    """Names and tensors of the inputs that have gradients."""
    leaves = {}
    for name, x in inputs.items():
        if isinstance(x, tuple):
            leaves |= {f"{name}[{i}]": part for i, part in enumerate(x)}
        elif torch.is_tensor(x) and x.is_floating_point():
            leaves[name] = x
    return leaves


def _state_tensors(state):
    return [*state.weights, *state.momentum, *state[2:7]]


def _cotangent(tensors, seed=1):
    """A scalar that weighs every entry of the tensors differently."""
    generator = torch.Generator().manual_seed(seed)
    return sum(
        (x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in tensors
    )


def _gradients(inputs, tensors):
    leaves = _leaves(inputs)
    values = torch.autograd.grad(
        _cotangent(tensors), list(leaves.values()), allow_unused=True, retain_graph=True
    )
    return {
        name: torch.zeros_like(leaf) if value is None else value
        for (name, leaf), value in zip(leaves.items(), values, strict=True)
    }


def _assert_same_gradients(inputs, actual, expected, tolerance=TOLERANCE):
    expected = _gradients(inputs, expected)
    for name, value in _gradients(inputs, actual).items():
        _assert_close(f"d{name}", value, expected[name], tolerance)


# Oracle 1: a linear memory without momentum, gradient per token, is the gated delta rule.


@pytest.mark.parametrize("largest_alpha", [0.0, 0.004, 1.0])
def test_linear_memory_is_the_gated_delta_rule(largest_alpha):
    inputs = make_inputs(2, 12, 2, 4, None, 1, norm=False, requires_grad=False)
    inputs["eta"].zero_()
    inputs["alpha"].uniform_(0, largest_alpha)
    o, state = neural_memory(
        **inputs, activation="identity", residual=False, chunk_size=1, output_final_state=True
    )

    expected, final = torch.empty_like(o), torch.empty(2, 2, 4, 4, dtype=o.dtype)
    for b in range(2):
        for h in range(2):
            W = inputs["weights"][0][h]
            for t in range(12):
                q, k, v = (inputs[name][b, t, h] for name in ("q", "k", "v"))
                beta = 2 * inputs["theta"][b, t, h]
                W = (1 - inputs["alpha"][b, t, h]) * W - beta * torch.outer(k, k @ W - v)
                expected[b, t, h] = q @ W
            final[b, h] = W
    _assert_close("o", o, expected)
    _assert_close("weights", state.weights[0], final)


# Oracle 2: two layers, tanh-GELU, LayerNorm and residual, with the gradient written by hand.


def _hand_written_gradient(k, v, W1, W2, weight, bias):
    """dl/dW1, dl/dW2 of l = ||k + LN(gelu(k W1) W2) - v||^2 for one token of one head."""
    z = k @ W1
    u = math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)
    h = 0.5 * z * (1 + torch.tanh(u))
    slope = 0.5 * (1 + torch.tanh(u)) + 0.5 * z * (1 - torch.tanh(u) ** 2) * math.sqrt(
        2 / math.pi
    ) * (1 + 3 * 0.044715 * z**2)
    y = h @ W2
    r = 1 / torch.sqrt(((y - y.mean()) ** 2).mean() + 1e-6)
    xh = (y - y.mean()) * r
    d = 2 * (k + xh * weight + bias - v) * weight
    d = r * (d - d.mean() - xh * (d * xh).mean())
    return torch.outer(k, (W2 @ d) * slope), torch.outer(h, d), z


def _hand_written(q, k, v, theta, alpha, eta, weights, norm, chunk_size):
    B, T, H, _ = q.shape
    o = torch.empty_like(q)
    last = [torch.empty(B, *w.shape, dtype=w.dtype) for w in (*weights, *weights)]
    for b in range(B):
        for h in range(H):
            W = [w[h] for w in weights]
            S = [torch.zeros_like(w) for w in W]
            for t in range(T):
                if t % chunk_size == 0:
                    anchor = list(W)
                *g, _ = _hand_written_gradient(
                    k[b, t, h], v[b, t, h], *anchor, norm[0][h], norm[1][h]
                )
                for layer in range(2):
                    S[layer] = eta[b, t, h, layer] * S[layer] - theta[b, t, h, layer] * g[layer]
                    W[layer] = (1 - alpha[b, t, h, layer]) * W[layer] + S[layer]
                x = q[b, t, h]
                z = x @ W[0]
                act = 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
                y = act @ W[1]
                variance = ((y - y.mean()) ** 2).mean()
                o[b, t, h] = (
                    x + (y - y.mean()) / torch.sqrt(variance + 1e-6) * norm[0][h] + norm[1][h]
                )
            for slot, x in zip(last, (*W, *S), strict=True):
                slot[b, h] = x
    return o, last


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_two_layers_with_a_hand_written_gradient(chunk_size):
    inputs = make_inputs(2, 8, 2, 4, 6, 2, per_layer_gates=True, requires_grad=False)
    o, state = neural_memory(**inputs, chunk_size=chunk_size, output_final_state=True)
    expected, last = _hand_written(**inputs, chunk_size=chunk_size)
    _assert_close("o", o, expected)
    for i, (actual, want) in enumerate(zip((*state.weights, *state.momentum), last, strict=True)):
        _assert_close(f"state {i}", actual, want)


# Oracle 3: titans-pytorch.


@pytest.mark.parametrize(
    "B, T, chunk_size, depth",
    [
        pytest.param(2, 12, 1, 2, id="chunk 1"),
        pytest.param(1, 24, 4, 1, id="linear memory"),
        pytest.param(2, 24, 8, 2, id="chunk 8"),
        pytest.param(1, 18, 6, 3, id="three layers"),
        pytest.param(1, 21, 8, 2, id="open chunk at the end"),
        pytest.param(1, 9, 16, 2, id="chunk longer than the sequence"),
    ],
)
def test_titans_pytorch_agrees(B, T, chunk_size, depth):
    from peer import titans_pytorch_outputs

    inputs = make_inputs(B, T, 2, 4, 16, depth, norm=False)
    del inputs["norm"]
    o, state = neural_memory(
        **inputs, activation="gelu", residual=False, chunk_size=chunk_size, output_final_state=True
    )
    expected, weights, momentum = titans_pytorch_outputs(**inputs, chunk_size=chunk_size)
    actual, wanted = [o], [expected]
    if T % chunk_size == 0:  # the peer's last weights lie past the open chunk, ours before it
        actual += [*state.weights, *state.momentum]
        wanted += [*weights, *momentum]
    for i, (ours, theirs) in enumerate(zip(actual, wanted, strict=True)):
        _assert_close(f"tensor {i}", ours, theirs)
    _assert_same_gradients(inputs, actual, wanted)


# Oracle 4: finite differences.


def test_gradients_are_those_of_finite_differences():
    inputs = make_inputs(1, 5, 1, 2, 3, 2)
    norm, weights = inputs.pop("norm"), inputs.pop("weights")

    def op(q, k, v, theta, alpha, eta, *rest):
        weights, norm = rest[:2], rest[2:]
        o, state = neural_memory(
            *(q, k, v, theta, alpha, eta, weights), norm=norm, chunk_size=2, output_final_state=True
        )
        return o, *_state_tensors(state)

    assert torch.autograd.gradcheck(op, (*inputs.values(), *weights, *norm))


def test_gradients_into_the_state_are_those_of_finite_differences():
    past, inputs = make_inputs(1, 3, 1, 2, 3, 2, seed=1), make_inputs(1, 2, 1, 2, 3, 2)
    with torch.no_grad():
        _, state = neural_memory(**past, chunk_size=2, output_final_state=True)

    def op(*tensors):
        parts = State(tensors[:2], tensors[2:4], *tensors[4:], state.length)
        o, final = neural_memory(
            **inputs, chunk_size=2, initial_state=parts, output_final_state=True
        )
        read = retrieve(inputs["q"], parts, norm=inputs["norm"])
        return o, read, *_state_tensors(final)

    leaves = [x.clone().requires_grad_() for x in _state_tensors(state)]
    assert torch.autograd.gradcheck(op, leaves)


# Streaming: every cut gives what the whole gives.

TOKENS = ("q", "k", "v", "theta", "alpha", "eta")


def _part(inputs, start, stop):
    return inputs | {name: inputs[name][:, start:stop] for name in TOKENS}


@pytest.mark.parametrize(
    "cuts",
    [
        pytest.param((4,), id="between chunks"),
        pytest.param((6,), id="inside a chunk"),
        pytest.param((5, 6, 7), id="three times inside a chunk"),
        pytest.param((0, 3, 3, 11), id="empty pieces and the end"),
    ],
)
@pytest.mark.parametrize("per_layer_gates", [False, True])
def test_a_cut_sequence_is_the_whole_sequence(cuts, per_layer_gates):
    inputs = make_inputs(2, 11, 2, 4, 8, 2, per_layer_gates=per_layer_gates)
    options = {"chunk_size": 4, "output_final_state": True}
    whole, final = neural_memory(**inputs, **options)

    pieces, state = [], None
    for start, stop in zip((0, *cuts), (*cuts, 11), strict=True):
        o, state = neural_memory(**_part(inputs, start, stop), **options, initial_state=state)
        pieces.append(o)
        assert (state.length == stop % 4).all() and state.length.dtype == torch.int32

    actual = [torch.cat(pieces, 1), *_state_tensors(state)]
    expected = [whole, *_state_tensors(final)]
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        _assert_close(f"tensor {i}", x, y, 1e-14)
    _assert_same_gradients(inputs, actual, expected, 1e-12)


def test_packed_sequences_are_separate_sequences():
    lengths = [5, 0, 9, 1]
    inputs = make_inputs(1, 15, 2, 4, 8, 2, lengths=lengths)
    cu_seqlens = inputs.pop("cu_seqlens")
    options = {"chunk_size": 4, "output_final_state": True}
    packed, state = neural_memory(**inputs, **options, cu_seqlens=cu_seqlens)
    assert state.length.tolist() == [1, 0, 1, 1]

    # The same sequences again, now as one step after the packed run: rows of different lengths.
    again, after = neural_memory(**inputs, **options, cu_seqlens=cu_seqlens, initial_state=state)
    outputs, states, outputs_again, states_after = [], [], [], []
    for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        part = _part(inputs, start, stop)
        for o, s, initial in ((outputs, states, None), (outputs_again, states_after, True)):
            initial = states[-1] if initial else None
            piece, row = neural_memory(**part, **options, initial_state=initial)
            o.append(piece)
            s.append(row)
    actual = [packed, again, *_state_tensors(state), *_state_tensors(after)]
    rows = [zip(*map(_state_tensors, s), strict=True) for s in (states, states_after)]
    expected = [torch.cat(o, 1) for o in (outputs, outputs_again)]
    expected += [torch.cat(xs) for row in rows for xs in row]
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        _assert_close(f"tensor {i}", x, y, 1e-14)
    _assert_same_gradients(inputs, actual, expected, 1e-12)


def test_rows_of_a_batch_may_be_at_different_places():
    inputs = make_inputs(2, 9, 2, 4, 8, 2, requires_grad=False)
    options = {"chunk_size": 4, "output_final_state": True}
    whole, _ = neural_memory(**inputs, **options)
    row = [
        {name: x[b : b + 1] if name in TOKENS else x for name, x in inputs.items()} for b in (0, 1)
    ]
    _, first = neural_memory(**_part(row[0], 0, 3), **options)
    _, second = neural_memory(**_part(row[1], 0, 6), **options)

    def both(x, y):
        return tuple(map(both, x, y)) if isinstance(x, tuple) else torch.cat([x, y])

    state = State(*map(both, first, second))
    assert state.length.tolist() == [3, 2]
    rest = inputs | {
        name: torch.cat([inputs[name][:1, 3:6], inputs[name][1:, 6:9]]) for name in TOKENS
    }
    same = SimpleNamespace(**state._asdict())  # any object with these attributes will do
    o, state = neural_memory(**rest, **options, initial_state=same)
    _assert_close("o", o, torch.cat([whole[:1, 3:6], whole[1:, 6:9]]), 1e-14)
    assert state.length.tolist() == [2, 1]


def test_an_empty_sequence_leaves_the_memory_as_it_was():
    inputs = make_inputs(2, 0, 2, 4, 8, 2)
    o, state = neural_memory(**inputs, chunk_size=4, output_final_state=True)
    assert o.shape == (2, 0, 2, 4)
    assert state.length.tolist() == [0, 0] and state.k.shape == (2, 4, 2, 4)
    for w, s, w_0 in zip(state.weights, state.momentum, inputs["weights"], strict=True):
        assert torch.equal(w, w_0.expand(2, -1, -1, -1)) and not s.any()
    assert neural_memory(**inputs)[1] is None


# Reading.


def test_retrieve_reads_what_the_last_token_left():
    inputs = make_inputs(2, 7, 2, 4, 8, 2)
    form = {"norm": inputs["norm"], "activation": "silu", "residual": False}
    o, state = neural_memory(**(inputs | form), chunk_size=4, output_final_state=True)
    read = retrieve(inputs["q"], state, **form)
    _assert_close("last token", read[:, -1], o[:, -1], 1e-14)
    _assert_same_gradients(inputs, [read[:, -1]], [o[:, -1]], 1e-12)

    packed = inputs["q"][:, :3].flatten(0, 1)[None]
    varlen = retrieve(packed, state, **form, cu_seqlens=torch.tensor([0, 3, 6]))
    _assert_close("packed", varlen, read[:, :3].flatten(0, 1)[None], 1e-14)

    frozen = inputs | form | {"theta": torch.zeros_like(inputs["theta"])}
    frozen |= {"alpha": torch.zeros_like(inputs["alpha"])}
    still, _ = neural_memory(**frozen)
    _assert_close("weights", retrieve(inputs["q"], inputs["weights"], **form), still, 1e-14)


# Edges.


@pytest.mark.parametrize("gate, value", [("alpha", 1.0), ("eta", 0.0), ("theta", 0.0)])
def test_gates_at_their_bounds_have_finite_differences_too(gate, value):
    inputs = make_inputs(1, 3, 1, 2, 3, 1)
    inputs[gate] = torch.full_like(inputs[gate], value)
    norm, weights = inputs.pop("norm"), inputs.pop("weights")
    leaves = [x.detach().requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(
        lambda *x: neural_memory(*x, weights, norm=norm, chunk_size=2)[0], leaves
    )


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "silu", "relu", "identity"])
def test_activations_by_their_formulas(activation):
    formula = {
        "gelu_tanh": lambda z: (
            0.5 * z * (1 + torch.tanh((2 / math.pi) ** 0.5 * (z + 0.044715 * z**3)))
        ),
        "gelu": lambda z: 0.5 * z * (1 + torch.erf(z / 2**0.5)),
        "silu": lambda z: z / (1 + torch.exp(-z)),
        "relu": lambda z: z * (z > 0),
        "identity": lambda z: z,
    }[activation]
    inputs = make_inputs(1, 3, 1, 4, 8, 3, norm=False, requires_grad=False)
    W1, W2, W3 = (w[0] for w in inputs["weights"])
    x = inputs["q"][0, :, 0]
    expected = x + formula(formula(x @ W1) @ W2) @ W3
    actual = retrieve(inputs["q"], inputs["weights"], activation=activation)[0, :, 0]
    _assert_close("f(q)", actual, expected, 1e-14)


def test_without_gradients_and_in_float32():
    inputs = make_inputs(1, 6, 2, 4, 8, 2)
    single = make_inputs(1, 6, 2, 4, 8, 2, dtype=torch.float32)
    with torch.no_grad():
        o, state = neural_memory(**single, chunk_size=4, output_final_state=True)
    assert o.dtype == torch.float32 and not o.requires_grad
    assert {x.dtype for x in _state_tensors(state)} == {torch.float32}
    _assert_close("o", o.double(), neural_memory(**inputs, chunk_size=4)[0].detach(), 1e-5)


def test_the_examples_in_the_docstrings_run():
    assert doctest.testmod(memory).failed == 0

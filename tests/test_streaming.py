"""A state carries all there is: a sequence cut anywhere, packed or branched is the whole one."""

import operator
from itertools import pairwise

import pytest
import torch
from inputs import make_inputs
from torch.utils import _pytree as pytree
from yardstick import (
    TOKENS,
    assert_gradients,
    assert_values,
    blocks_of,
    flat,
    gradients,
    measure,
    piece,
)

from titans_kernels import neural_memory, retrieve

LENGTHS = (17, 0, 1, 32, 20)  # of packed sequences: ragged, none, one token, whole chunks


def _streamed(inputs, cuts, initial_state=None, chunk_size=16):
    """Output and final state of the pieces that the cuts make, as of one operator."""
    outputs, state = [], initial_state
    for start, stop in pairwise((0, *cuts, inputs["q"].shape[1])):
        part = piece(inputs, start, stop) | {"chunk_size": chunk_size, "initial_state": state}
        o, state = neural_memory(**part | {"output_final_state": True})
        assert o.shape[1] == stop - start
        outputs.append(o)
    return torch.cat(outputs, 1), state


def _in_pieces(cuts, chunk_size):
    """The operator that runs them so."""
    return lambda output_final_state, **x: _streamed(x, cuts, chunk_size=chunk_size)


def _values(result):
    o, state = result
    return flat({"o": o, "state": state})


def _without_gradients(inputs):
    detach = lambda x: x.detach() if torch.is_tensor(x) else x  # noqa: E731
    return pytree.tree_map(detach, inputs)


@pytest.fixture(scope="module")
def whole():
    """Inputs of 50 tokens, and what the whole run makes of them, by chunk."""
    inputs = make_inputs(2, 50, 2, 4, 8, 2)
    return inputs, {
        chunk: measure(neural_memory, inputs, chunk_size=chunk) for chunk in (5, 16, 70)
    }


# ---------------------------------------------------------------------------------------- cuts


@pytest.mark.parametrize("cut", range(51))
def test_a_cut_anywhere_changes_nothing(whole, cut):
    inputs, want = _without_gradients(whole[0]), whole[1][16].values
    o, state = _streamed(inputs, (cut,), chunk_size=16)
    assert state.length.tolist() == [2, 2] and state.length.dtype == torch.int32
    assert_values(_values((o, state)), want)


CUTS = {
    "between chunks": (16, (32,)),
    "inside a chunk": (16, (21,)),
    "three times inside a chunk": (16, (17, 18, 30)),
    "at both ends": (16, (0, 50)),
    "empty pieces inside a chunk": (16, (21, 21, 21)),
    "one token at a time": (16, range(1, 50)),
    "small pieces": (16, range(3, 50, 3)),
    "short chunks": (5, (2, 9, 10, 31)),
    "short chunks, one token at a time": (5, range(1, 50)),
    "a chunk that no piece fills": (70, (1, 30, 31)),
    "a chunk that stays open, token by token": (70, range(1, 50)),
}


@pytest.mark.parametrize("block", ["cpu", "cuda", 7])
@pytest.mark.parametrize("chunk, cuts", CUTS.values(), ids=CUTS)
def test_gradients_flow_through_cuts(whole, chunk, cuts, block):
    inputs, want = whole[0], whole[1][chunk]
    with blocks_of(block):
        got = measure(_in_pieces(cuts, chunk), inputs)
    assert_values(got.values, want.values)
    assert_gradients(got.gradients, want.gradients)


@pytest.mark.parametrize("cut", [1, 64, 65, 100, 129])
def test_a_chunk_over_several_blocks_may_be_cut(cut):
    inputs = make_inputs(1, 150, 1, 4, 6, 2, per_layer_gates=True)
    want = measure(neural_memory, inputs, chunk_size=70)
    got = measure(_in_pieces((cut,), 70), inputs)
    assert_values(got.values, want.values)
    assert_gradients(got.gradients, want.gradients)


@pytest.mark.parametrize("lengths", [(3, 0, 15, 8), (0, 0, 0, 0), (7, 7, 7, 7)], ids=str)
@pytest.mark.parametrize("per_layer_gates", [False, True], ids=["gates", "per layer"])
def test_one_token_for_chunks_of_any_length(lengths, per_layer_gates):
    """Of some a chunk ends, of some not; rows are those of a batch that took several tokens."""
    options = {"per_layer_gates": per_layer_gates}
    past = make_inputs(1, sum(lengths), 2, 4, 6, 2, lengths=lengths, **options)
    next_ = make_inputs(4, 2, 2, 4, 6, 2, seed=1, **options)

    def run(inputs, cuts):
        _, state = neural_memory(**inputs["past"], output_final_state=True)
        shared = {name: inputs["past"][name] for name in ("weights", "norm")}
        return _streamed(inputs["next"] | shared, cuts, state)

    inputs = {"past": past, "next": next_}
    leaves = {f"{part} {name}": x for part in inputs for name, x in flat(inputs[part]).items()}
    want, got = (_values(run(inputs, cuts)) for cuts in ((), (1,)))
    assert_values(got, want)
    assert_gradients(gradients(got, leaves), gradients(want, leaves))


def test_the_weights_of_an_open_chunk_stay():
    inputs = _without_gradients(make_inputs(2, 40, 2, 4, 6, 2))
    _, state = _streamed(piece(inputs, 0, 16), ())
    for token in range(16, 31):
        one = piece(inputs, token, token + 1)
        before, (_, state) = (
            state,
            neural_memory(**one, initial_state=state, output_final_state=True),
        )
        assert all(map(operator.is_, state.weights, before.weights))
        assert all(map(operator.is_, state.momentum, before.momentum))
    _, state = neural_memory(**piece(inputs, 31, 32), initial_state=state, output_final_state=True)
    assert not any(map(torch.equal, state.weights, before.weights))
    assert not state.k.any() and not state.length.any()


def test_detach_truncates():
    inputs, past = make_inputs(1, 20, 2, 4, 6, 2), make_inputs(1, 21, 2, 4, 6, 2, seed=1)
    shared = {"weights": past["weights"], "norm": past["norm"]}
    _, state = neural_memory(**past, output_final_state=True)
    o, _ = neural_memory(**inputs | shared, initial_state=state.detach())
    found = gradients({"o": o}, flat(past))
    assert {name for name, x in found.items() if x.any()} == {"norm[0]", "norm[1]"}
    assert not any(x.requires_grad for x in flat({"s": state.detach()}).values())

    o, _ = neural_memory(**inputs | shared, initial_state=state)
    found = gradients({"o": o}, flat(past))
    assert {name for name, x in found.items() if not x.any()} == {"q"}  # not trained on


def test_weights_beside_a_state_give_shapes_only():
    inputs = make_inputs(2, 20, 2, 4, 6, 2)
    _, state = neural_memory(**_without_gradients(inputs), output_final_state=True)
    o, _ = neural_memory(**inputs, initial_state=state)
    other = inputs | {"weights": tuple(torch.full_like(w, torch.nan) for w in inputs["weights"])}
    assert_values({"o": neural_memory(**other, initial_state=state)[0]}, {"o": o}, 0.0)
    found = gradients({"o": o}, flat(inputs))
    assert not found["weights[0]"].any() and not found["weights[1]"].any()


def test_one_state_has_many_futures():
    past, next_ = make_inputs(2, 21, 2, 4, 6, 2), make_inputs(2, 9, 2, 4, 6, 2, seed=1)
    shared = {"weights": past["weights"], "norm": past["norm"]}
    _, state = neural_memory(**past, output_final_state=True)
    before = {name: x.clone() for name, x in flat({"state": state}).items()}
    first, _ = neural_memory(**next_ | shared, initial_state=state, output_final_state=True)
    again, _ = neural_memory(**next_ | shared, initial_state=state, output_final_state=True)
    assert_values({"o": again}, {"o": first}, 0.0)
    assert_values(flat({"state": state}), before, 0.0)

    one = gradients({"o": first}, flat(past), retain_graph=True)
    both = gradients({"o": first + again}, flat(past))
    assert_gradients(both, {name: 2 * x for name, x in one.items()}, 1e-14)


# -------------------------------------------------------------------------------------- varlen


def _rows(lengths, inputs):
    """The inputs of every packed sequence alone."""
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    return [piece(inputs, start, stop) for start, stop in pairwise(ends)]


def _one_by_one(lengths, states=None, **inputs):
    """What a packed run stands for: every sequence alone, states put together."""
    inputs.pop("output_final_state")
    runs = [
        neural_memory(
            **part, initial_state=None if states is None else states[n], output_final_state=True
        )
        for n, part in enumerate(_rows(lengths, inputs))
    ]
    state = pytree.tree_map(lambda *x: torch.cat(x), *(state for _, state in runs))
    return torch.cat([o for o, _ in runs], 1), state


@pytest.mark.parametrize("block", ["cpu", "cuda", 7])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_packed_sequences_are_separate_ones(dtype, block):
    inputs = make_inputs(1, sum(LENGTHS), 2, 4, 6, 2, lengths=LENGTHS, per_layer_gates=True)
    cu_seqlens = inputs.pop("cu_seqlens").to(dtype)
    with blocks_of(block):
        want = measure(lambda **x: _one_by_one(LENGTHS, **x), inputs)
        got = measure(neural_memory, inputs, cu_seqlens=cu_seqlens)
    assert_values(got.values, want.values)
    assert_gradients(got.gradients, want.gradients)


def test_decoding_goes_on_from_a_packed_prefill():
    """A batch of rows, each at its own phase of its chunk, token by token."""
    inputs = make_inputs(1, sum(LENGTHS), 2, 4, 6, 2, lengths=LENGTHS)
    more = make_inputs(len(LENGTHS), 40, 2, 4, 6, 2, seed=1)
    shared = {"weights": inputs["weights"], "norm": inputs["norm"]}

    def packed_then_decoded(**x):
        _, state = neural_memory(**x)
        return _streamed(more | shared, range(1, 40), initial_state=state)

    def alone(cu_seqlens, output_final_state, **x):
        runs = []
        for n, part in enumerate(_rows(LENGTHS, x)):
            tokens = {name: torch.cat([part[name], more[name][n : n + 1]], 1) for name in TOKENS}
            o, state = neural_memory(**part | tokens, output_final_state=True)
            runs.append((o[:, LENGTHS[n] :], state))
        state = pytree.tree_map(lambda *x: torch.cat(x), *(state for _, state in runs))
        return torch.cat([o for o, _ in runs]), state

    want, got = measure(alone, inputs), measure(packed_then_decoded, inputs)
    assert_values(got.values, want.values)
    assert_gradients(got.gradients, want.gradients)


def test_packed_sequences_go_on_packed():
    inputs = make_inputs(1, sum(LENGTHS), 2, 4, 6, 2, lengths=LENGTHS)
    _, state = neural_memory(**inputs, output_final_state=True)
    states = [state.index_select(torch.tensor([n])) for n in range(len(LENGTHS))]
    want = _one_by_one(LENGTHS[::-1], states, **_alone(inputs), output_final_state=True)
    cu_seqlens = torch.tensor([0, *LENGTHS[::-1]]).cumsum(0)
    got = neural_memory(
        **inputs | {"cu_seqlens": cu_seqlens}, initial_state=state, output_final_state=True
    )
    assert_values(_values(got), _values(want))


def _alone(inputs):
    return {name: x for name, x in inputs.items() if name != "cu_seqlens"}


@pytest.mark.parametrize("block", ["cpu", "cuda"])
@pytest.mark.parametrize("chunk", [1, 3, 16, 100])
def test_nan_stays_in_its_sequence(chunk, block):
    lengths = (70, 17, 113)
    clean = make_inputs(1, 200, 1, 4, 6, 2, lengths=lengths, requires_grad=False)
    poisoned = clean | {name: clean[name].clone() for name in TOKENS}
    for name in TOKENS:
        poisoned[name][:, 70:87] = torch.nan
    mine = torch.ones(200, dtype=torch.bool)
    mine[70:87] = False
    results = []
    for inputs in (clean, poisoned):
        leaves = {name: inputs[name].requires_grad_() for name in TOKENS}
        with blocks_of(block):
            o, state = neural_memory(**inputs, chunk_size=chunk, output_final_state=True)
            on, last = neural_memory(**inputs, chunk_size=chunk, initial_state=state)
            read = retrieve(
                inputs["q"], state, norm=inputs["norm"], cu_seqlens=inputs["cu_seqlens"]
            )
            others = state.index_select(torch.tensor([0, 2]))
            values = {"o": o[:, mine], "on": on[:, mine], "read": read[:, mine]}
            values |= flat({"state": others})
            found = gradients(values, leaves)
        results.append((values, {name: x[:, mine] for name, x in found.items()}))
        assert last is None
    assert_values(results[1][0], results[0][0], 0.0)
    assert_gradients(results[1][1], results[0][1], 0.0)


# ---------------------------------------------------------------------------- sizes of nothing


def test_no_token_leaves_a_state_as_it_is():
    inputs = make_inputs(2, 21, 2, 4, 6, 2)
    _, state = neural_memory(**inputs, output_final_state=True)
    o, same = neural_memory(**piece(inputs, 0, 0), initial_state=state, output_final_state=True)
    assert o.shape == (2, 0, 2, 4) and torch.equal(same.length, state.length)
    assert_values(flat({"s": same}), flat({"s": state}), 0.0)
    want = gradients(flat({"s": state}), flat(inputs), retain_graph=True)
    assert_gradients(gradients(flat({"s": same}), flat(inputs)), want, 1e-14)


@pytest.mark.parametrize("packed", [False, True], ids=["batch of 0", "no packed sequence"])
def test_no_sequence_at_all(packed):
    B, T = (1, 0) if packed else (0, 37)
    inputs, cu_seqlens = make_inputs(B, T, 2, 4, 6, 2), torch.tensor([0]) if packed else None
    state = None
    for _ in range(2):
        o, state = neural_memory(
            **inputs, cu_seqlens=cu_seqlens, initial_state=state, output_final_state=True
        )
        assert o.shape == (B, T, 2, 4) and state.length.shape == (0,)
        assert state.weights[0].shape == (0, 2, 4, 6) and state.k.shape == (0, 16, 2, 4)
    read = retrieve(inputs["q"], state, norm=inputs["norm"], cu_seqlens=cu_seqlens)
    assert read.shape == (B, T, 2, 4)
    for grad in gradients(flat({"o": o, "read": read, "state": state}), flat(inputs)).values():
        assert not grad.any()

"""Resets and reading at a chunk's start, against the definition, however the sequence is cut."""

import dataclasses
from itertools import pairwise, product
from unittest import mock

import pytest
import torch
from inputs import make_inputs
from torch.utils import _pytree as pytree

import reference
from titans_kernels import MemoryState, neural_memory, ops

PER_TOKEN = ("q", "k", "v", "theta", "alpha", "eta")


def _leaves(state):
    parts = [*state.weights, *state.momentum, state.k, state.v]
    return [*parts, state.theta, state.alpha, state.eta]


def _close(name, actual, expected, tolerance):
    assert actual.shape == expected.shape, name
    if actual.numel():
        error = (actual - expected).abs().max().item()
        assert error <= tolerance * max(expected.abs().max().item(), 1e-3), f"{name}: {error:.1e}"


def _total(tensors):
    generator = torch.Generator().manual_seed(5)
    return sum(
        (x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in tensors
    )


def _gradients(inputs, state, tensors):
    wanted = pytree.tree_leaves([inputs[n] for n in (*PER_TOKEN, "weights", "norm")])
    wanted = [x for x in wanted if x is not None] + ([] if state is None else _leaves(state))
    return torch.autograd.grad(_total(tensors), wanted, materialize_grads=True)


def _started(options, per_layer_gates, depth, lengths):
    """A state of every sequence, some tokens into it; its floating tensors are leaves."""
    n = 2 if lengths is None else len(lengths)
    inputs = make_inputs(
        n, 5, 2, 16, 32, depth, per_layer_gates=per_layer_gates, seed=7, requires_grad=False
    )
    _, state = neural_memory(**inputs, **options, output_final_state=True, backend="torch")
    return state.map(lambda x: x.detach().clone().requires_grad_(x.is_floating_point()))


# chunk, reset, tokens, options
CASES = {
    "divides": (4, 8, 24, {}),
    "does not divide": (4, 10, 23, {}),
    "a chunk": (4, 4, 18, {}),
    "undercuts the chunk": (8, 3, 17, {}),
    "of one": (4, 1, 5, {}),
    "the sequence": (4, 20, 20, {}),
    "exceeds the sequence": (4, 64, 19, {}),
    "a block": (16, 64, 150, {}),
    "undercuts a block of several chunks": (3, 7, 40, {}),
    "chunk of several blocks": (70, 100, 230, {}),
    "depth 1, gates per layer": (4, 6, 20, {"depth": 1, "per_layer_gates": True}),
    "depth 3, gates per layer": (5, 12, 30, {"depth": 3, "per_layer_gates": True}),
    "packed": (4, 6, 30, {"lengths": [7, 0, 12, 11]}),
}


@pytest.mark.parametrize(
    ("read", "begun"), [("token", False), ("chunk", True)], ids=["token, fresh", "chunk, continued"]
)
@pytest.mark.parametrize("case", CASES)
def test_the_reference_agrees(case, begun, read):
    chunk, reset, T, options = CASES[case]
    _check(chunk, reset, T, read, begun, "torch", **options)


@pytest.mark.parametrize("case", ["does not divide", "depth 1, gates per layer", "packed"])
def test_a_shard_that_had_begun_goes_on(case):
    chunk, reset, T, options = CASES[case]
    _check(chunk, reset, T, "token", True, "torch", **options)


ON_TRITON = [("undercuts the chunk", "chunk"), ("depth 1, gates per layer", "chunk")]
ON_TRITON += [("packed", "token")]
MORE_ON_TRITON = [row for row in product(CASES, ("token", "chunk")) if row not in ON_TRITON]


@pytest.mark.parametrize(
    ("case", "read"),
    ON_TRITON + [pytest.param(*row, marks=pytest.mark.wide) for row in MORE_ON_TRITON],
)
def test_the_reference_agrees_on_triton(case, read):
    """Under the sanitizer, in programs of an order of their own."""
    sanitizer = pytest.importorskip("triton_support.sanitizer")
    chunk, reset, T, options = CASES[case]
    with sanitizer.sanitize(checks=sanitizer.CHECKS - {"unwritten"}, seed=1):
        _check(chunk, reset, T, read, True, "triton", **options)


@pytest.mark.parametrize("chunk", [1, 5, 70])
@pytest.mark.parametrize("begun", [False, True], ids=["fresh", "continued"])
def test_reading_at_the_start_of_a_chunk_without_resets(chunk, begun):
    _check(chunk, None, 150, "chunk", begun, "torch")


def _check(chunk, reset, T, read, begun, backend, depth=2, per_layer_gates=False, lengths=None):
    batch = 2 if lengths is None else 1
    options = {"chunk_size": chunk, "reset_every": reset, "read": read}
    gates = {"per_layer_gates": per_layer_gates}
    inputs = make_inputs(batch, T, 2, 16, 32, depth, **gates, lengths=lengths)
    state = _started(options, per_layer_gates, depth, lengths) if begun else None
    options |= {"output_final_state": True, "initial_state": state}
    o, final = neural_memory(**inputs, **options, backend=backend)
    expected, known = reference.neural_memory(**inputs, **options)

    assert final.reset_every == reset
    assert final.length.tolist() == known.length.tolist()
    if reset is not None:
        assert final.position.tolist() == known.position.tolist()
    actual, expected = [o, *_leaves(final)], [expected, *_leaves(known)]
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        _close(f"tensor {i}", x, y, 1e-11)
    found = zip(_gradients(inputs, state, actual), _gradients(inputs, state, expected), strict=True)
    for i, (x, y) in enumerate(found):
        _close(f"gradient {i}", x, y, 1e-10)


@pytest.mark.parametrize("read", ["token", "chunk"])
@pytest.mark.parametrize(("chunk", "reset"), [(4, 6), (3, 3), (8, 5)])
def test_a_cut_anywhere_changes_nothing(chunk, reset, read):
    inputs = make_inputs(2, 14, 2, 4, 8, 2)
    options = {"chunk_size": chunk, "reset_every": reset, "read": read, "output_final_state": True}
    whole, final = neural_memory(**inputs, **options)
    expected = _gradients(inputs, None, [whole, *_leaves(final)])
    for cuts in [*([i] for i in range(15)), list(range(1, 14)), [5, 6, 7, 12]]:
        outputs, state = [], None
        for a, b in pairwise([0, *cuts, 14]):
            piece = inputs | {name: inputs[name][:, a:b] for name in PER_TOKEN}
            o, state = neural_memory(**piece, **options, initial_state=state)
            outputs.append(o)
        assert state.position.tolist() == final.position.tolist()
        pieces = [torch.cat(outputs, 1), *_leaves(state)]
        for x, y in zip(pieces, [whole, *_leaves(final)], strict=True):
            _close(f"cut at {cuts}", x, y, 1e-12)
        for x, y in zip(_gradients(inputs, None, pieces), expected, strict=True):
            _close(f"gradient, cut at {cuts}", x, y, 1e-10)


@pytest.mark.parametrize("reset", [None, 9])
def test_a_token_within_a_chunk_only_reads_its_start(reset):
    """Without gradients, with which the rest of the chunk would have some, of 0."""
    inputs = make_inputs(2, 12, 2, 4, 8, 2, requires_grad=False)
    options = {"chunk_size": 5, "reset_every": reset, "read": "chunk", "output_final_state": True}
    whole, final = neural_memory(**inputs, **options)
    learn, state, calls = ops.neural_memory, None, []
    with (
        torch.no_grad(),
        mock.patch.object(ops, "neural_memory", lambda *args: calls.append(t) or learn(*args)),
    ):
        for t in range(12):
            piece = inputs | {name: inputs[name][:, t : t + 1] for name in PER_TOKEN}
            o, state = neural_memory(**piece, **options, initial_state=state)
            _close(f"token {t}", o, whole[:, t : t + 1], 1e-12)
    for x, y in zip(_leaves(state), _leaves(final), strict=True):
        _close("state", x, y, 1e-12)
    ends = [4, 9] if reset is None else [4]
    assert calls == [0, *ends]  # the first has no state yet


def test_rows_may_be_at_different_places_of_their_shards():
    inputs = make_inputs(2, 12, 2, 4, 8, 2, requires_grad=False)
    options = {"chunk_size": 4, "reset_every": 5, "output_final_state": True}
    whole, _ = neural_memory(**inputs, **options)
    rows = [
        inputs | {name: inputs[name][b : b + 1, :n] for name in PER_TOKEN}
        for b, n in enumerate((5, 3))
    ]
    states = [neural_memory(**row, **options)[1] for row in rows]
    state = pytree.tree_map(lambda *x: torch.cat(x), *states)
    assert state.position.tolist() == [5, 3]
    rest = {name: torch.cat([inputs[name][:1, 5:12], inputs[name][1:, 3:10]]) for name in PER_TOKEN}
    o, after = neural_memory(**inputs | rest, **options, initial_state=state)
    _close("o", o, torch.cat([whole[:1, 5:12], whole[1:, 3:10]]), 1e-13)
    assert after.position.tolist() == [2, 5]


def test_a_state_keeps_its_place_on_disk(tmp_path):
    inputs = make_inputs(1, 9, 2, 4, 8, 2, requires_grad=False)
    _, state = neural_memory(**inputs, chunk_size=4, reset_every=6, output_final_state=True)
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert loaded.reset_every == 6 and loaded.position.tolist() == [3]
    assert state.index_select(torch.tensor([0])).reset_every == 6


def test_a_state_from_before_there_were_resets_goes_on(tmp_path):
    inputs = make_inputs(1, 9, 2, 4, 8, 2, requires_grad=False)
    options = {"chunk_size": 4, "output_final_state": True}
    _, state = neural_memory(**inputs, **options)
    del state.__dict__["position"], state.__dict__["reset_every"]  # as 0.1 wrote them
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert "position" not in loaded.__dict__
    _, after = neural_memory(**inputs, **options, initial_state=loaded)
    assert after.length.tolist() == [2] and after.position is None


def test_compiled_it_is_the_same():
    inputs = make_inputs(2, 20, 2, 4, 8, 1)
    options = {"chunk_size": 4, "reset_every": 7, "output_final_state": True, "backend": "torch"}
    compiled = torch.compile(neural_memory, fullgraph=True, backend="aot_eager")
    _, state = neural_memory(**inputs, **options)
    for _ in range(2):
        expected, final = neural_memory(**inputs, **options, initial_state=state)
        actual, found = compiled(**inputs, **options, initial_state=state)
        _close("o", actual, expected, 1e-13)
        assert found.position.tolist() == final.position.tolist()
        state = final


_ERRORS = [
    ({"reset_every": 0}, ValueError, "reset_every: got 0, takes an int of at least 1"),
    ({"reset_every": -2}, ValueError, "reset_every: got -2, takes"),
    ({"reset_every": True}, TypeError, "reset_every: got True, takes an int"),
    ({"reset_every": 2.0}, TypeError, "reset_every: got 2.0, takes an int"),
    ({"read": "block"}, ValueError, "read: got 'block', takes one of 'token', 'chunk'"),
]


@pytest.mark.parametrize(("options", "error", "message"), _ERRORS, ids=[x[2] for x in _ERRORS])
def test_what_does_not_fit_is_named(options, error, message):
    with pytest.raises(error, match=message):
        neural_memory(**make_inputs(1, 5, 2, 4, 8, 1), **options)


@pytest.mark.parametrize(("made", "given"), [(4, 8), (4, None), (None, 4)])
def test_a_state_of_other_resets_is_refused(made, given):
    inputs = make_inputs(1, 5, 2, 4, 8, 1)
    _, state = neural_memory(**inputs, reset_every=made, output_final_state=True)
    message = f"made with reset_every = {made}, takes one made with reset_every = {given}"
    with pytest.raises(ValueError, match=message):
        neural_memory(**inputs, reset_every=given, initial_state=state)


def test_a_place_outside_the_shard_is_refused():
    inputs = make_inputs(1, 5, 2, 4, 8, 1)
    _, state = neural_memory(**inputs, reset_every=4, output_final_state=True)
    wrong = dataclasses.replace(state, position=torch.tensor([5], dtype=torch.int32))
    assert isinstance(wrong, MemoryState)
    with pytest.raises(ValueError, match=r"position: got \[5\], takes values from 0 to reset"):
        neural_memory(**inputs, reset_every=4, initial_state=wrong)


def _grids(T, reset_every):
    """Of the launches of the scan over 16 heads in one sequence; nothing is run."""
    launch = pytest.importorskip("titans_kernels.kernels.launch")
    grids = []

    class Scan:
        def __getitem__(self, grid):
            return lambda **_: grids.append(tuple(grid))

    class Others:
        def __getitem__(self, grid):
            return lambda **_: None

    names = [name for name in vars(launch) if name.endswith("_kernel")]
    kernels = {name: Scan() if name == "scan_kernel" else Others() for name in names}
    inputs = make_inputs(1, T, 16, 16, 16, 1, dtype=torch.float32, requires_grad=False)
    with mock.patch.multiple(launch, **kernels):
        neural_memory(**inputs, reset_every=reset_every, backend="triton")
    return grids


def test_shards_are_programs_side_by_side():
    """Without resets one program a head, one after another over the length; with them, as many."""
    assert set(_grids(2**15, None)) == {(1, 16)}
    assert set(_grids(2**15, 2048)) == {(16, 16)}
    assert len(_grids(2**15, 2048)) < len(_grids(2**15, None))

"""`TitansTNT`: the states of its memories, cuts at every border, other chunks, other blocks."""

import dataclasses

import pytest
import torch
from block_cases import (
    assert_all_close,
    assert_close,
    assert_same_gradients,
    gradients,
    make_block,
    randn,
    twin_of_tnt,
)
from torch.utils._pytree import tree_leaves

import reference
from titans_kernels.layers import TitansTNT
from titans_kernels.layers.projection import project

PROJECTIONS = ["shard", "chunk", None]


def _states(state):
    """Of the memories, the global one first: tensors, and where their shards are."""
    found = []
    for memory in (state.memory, *state.local):
        found += [*memory.weights, *memory.momentum, memory.k, memory.v]
        found += [memory.theta, memory.alpha, memory.eta, memory.length]
        found += [] if memory.position is None else [memory.position]
    return found


def _tensors(states):
    """The same of the reference's states."""
    leaves = tree_leaves([tuple(state) for state in states])
    return [x for x in leaves if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("length", [17, 16])  # mid-shard; to the end of one, persistent tokens with
def test_states_and_their_gradients_are_the_definition(length):
    block = make_block("TNT", n_persistent=4)
    x = randn(1, length, block.dim).requires_grad_()
    out, state = block(x)
    want, states = twin_of_tnt(block, x[0])
    actual, expected = [out, *_states(state)], [want[None], *_tensors(states)]
    assert_all_close("out, states", actual, expected, 1e-11)
    found = gradients(block, actual, x), gradients(block, expected, x)
    assert_same_gradients(*found, 1e-10)


@pytest.mark.parametrize("onto", PROJECTIONS)
def test_a_cut_at_every_token_changes_nothing(onto):
    block = make_block("TNT", reset_every=6, n_persistent=0, project=onto)
    x = randn(2, 14, block.dim).requires_grad_()
    whole, final = block(x)
    expected = [whole, *tree_leaves(final)]
    wanted = gradients(block, expected, x)
    for cuts in [*([t] for t in range(15)), list(range(1, 14)), [5, 6, 7, 12]]:
        pieces, state = [], None
        for part in x.tensor_split(cuts, dim=1):
            out, state = block(part, state)
            pieces.append(out)
        actual = [torch.cat(pieces, 1), *tree_leaves(state)]
        assert_all_close(f"cut at {cuts}", actual, expected, 1e-11)
        assert_same_gradients(gradients(block, actual, x), wanted, 1e-10)


@pytest.mark.parametrize("chunk", [None, 7, 70])
@pytest.mark.parametrize("reset", [1, 64, 65, 150, 400])
def test_queries_are_projected_onto_the_keys_since_the_border(reset, chunk):
    """Over several blocks of the products, whole and cut, a token at the cut alone."""
    q, k = randn(2, 2, 200, 2, 3).requires_grad_().unbind()
    want, P = [], None
    for t in range(200):
        if t % reset == 0 or (chunk is not None and t % reset % chunk == 0):
            P = torch.zeros(2, 2, 3, 3, dtype=q.dtype)
        u = k[:, t] / (k[:, t].square().sum(-1, keepdim=True) + 1e-6).sqrt()
        P = P + u[..., :, None] * u[..., None, :]
        want.append((P @ q[:, t, :, :, None])[..., 0])
    want = torch.stack(want, 1)
    for cuts in ([], [63, 65, 66, 130]):
        out, state = [], None
        for a, b in zip(*(x.tensor_split(cuts, 1) for x in (q, k)), strict=True):
            y, state = project(a, b, state, None, reset, chunk)
            out.append(y)
        assert_close("projected", torch.cat(out, 1), want, 1e-12)
        assert_close("sum", state.projection, P, 1e-12)
        assert state.position.tolist() == [(200 - 1) % reset + 1] * 2


def test_what_is_recalled_is_what_all_memories_know():
    block = make_block("TNT", n_persistent=0)
    memory, x = block.memory, randn(1, 13, block.dim)
    _, state = memory(x)
    form = {"activation": memory.activation, "residual": memory.residual}
    q = randn(1, 4, 2, 4)
    want = reference.retrieve(q, state.memory, norm=memory._norm(), **form)
    P = state.projections[0].projection
    projected = torch.einsum("nhij,nthj->nthi", P, q)
    for part, one in zip(memory.local, state.local, strict=True):
        want = want + reference.retrieve(projected, one, norm=part._norm(), **form)
    assert_close("recalled", memory._read_state(q, state, None), want, 1e-11)
    out, after = memory.recall(x, state)
    assert out.shape == x.shape
    assert all(map(torch.equal, _states(after), _states(state)))
    packed, _ = memory.recall(x, state, torch.tensor([0, 13]))
    assert_close("packed", packed, out, 1e-12)


# Other chunks.


@pytest.mark.parametrize("onto", PROJECTIONS)
def test_other_chunks_are_another_model_of_the_same_parameters(onto):
    block = make_block("TNT", project=onto)
    other = make_block("TNT", local_chunks=(1, 2), project=onto)
    other.reset_parameters()
    other.load_state_dict(block.state_dict())
    x = randn(2, 14, block.dim)
    before, state = block(x)
    block.set_local_chunks([1, 2])
    assert "local_chunks=(1, 2)" in repr(block)
    out, _ = block(x)
    assert torch.equal(out, other(x)[0]) and not torch.allclose(out, before)
    with pytest.raises(ValueError, match=r"state.local\[0\]: got chunks of 4 tokens, takes local_"):
        block(x, state)


def test_chunks_for_other_memories_are_refused():
    block = make_block("TNT")
    with pytest.raises(ValueError, match="local_chunks: got 1 chunks, takes one for each of the 2"):
        block.set_local_chunks((4,))
    with pytest.raises(ValueError, match=r"local_chunks\[1\]: got -1, takes an int of at least 1"):
        block.set_local_chunks((4, -1))
    with pytest.raises(RuntimeError, match="local"):
        make_block("TNT", local_chunks=(4,)).load_state_dict(block.state_dict())


# States of others.


def _of(**options):
    return make_block("TNT", **options)(randn(2, 5, 6))[1]


def _with_position(state, value):
    other = dataclasses.replace(state.projections[0], position=value)
    return dataclasses.replace(state, projections=(other,))


STATES = [
    (lambda s: _of(reset_every=11), ValueError, "local[0]: got a state made with reset_every = 11"),
    (
        lambda s: _of(global_chunk=6),
        ValueError,
        "got chunks of 6 tokens, takes global_chunk = 5",
    ),
    (lambda s: _of(local_chunks=(4,)), ValueError, "state.local: got 1, takes a tuple of 2"),
    (lambda s: _of(project=None), ValueError, "state.projections: got 0, takes a tuple of 1"),
    (lambda s: _of(project="chunk"), ValueError, "state.projections: got 2, takes a tuple of 1"),
    (
        lambda s: make_block("LMM")(randn(2, 5, 6))[1],
        TypeError,
        "state: got LayerState, takes a TNTState or None",
    ),
    (
        lambda s: dataclasses.replace(s, projections=(s.memory,)),
        TypeError,
        "state.projections[0]: got MemoryState, takes a ProjectionState",
    ),
    (
        lambda s: _with_position(s, s.projections[0].position + 9),
        ValueError,
        "state.projections[0].position: got [17, 17], takes values from 0 to 10",
    ),
    (
        lambda s: dataclasses.replace(s, projections=(s.projections[0].map(lambda x: x.float()),)),
        TypeError,
        "state.projections[0].projection: got dtype torch.float32, takes torch.float64",
    ),
]


@pytest.mark.parametrize("change, error, message", STATES, ids=[m for *_, m in STATES])
def test_states_that_do_not_fit(change, error, message):
    block = make_block("TNT")
    _, state = block(randn(2, 5, 6))
    with pytest.raises(error) as caught:
        block(randn(2, 5, 6), change(state))
    assert message in str(caught.value)
    with pytest.raises(TypeError, match="state: got TNTState, takes a LayerState or None"):
        make_block("LMM")(randn(2, 5, 6), state)


def test_shards_are_read_side_by_side():
    """The steps of the local memories and of the projection do not grow with their number."""
    block = make_block("TNT", global_chunk=512, reset_every=8, n_persistent=0)

    def operations(length):
        with torch.profiler.profile() as profile, torch.no_grad():
            block(randn(1, length, block.dim))
        return len(profile.events())

    assert operations(8 * 48) < 1.5 * operations(8 * 12)


@pytest.mark.wide  # compiling takes a minute and a half
@pytest.mark.parametrize("onto", ["shard", "chunk"])
def test_compiled_as_one_graph_it_is_the_same(onto):
    block, x = make_block("TNT", project=onto, n_persistent=0), randn(2, 17, 6)
    torch._dynamo.reset()
    options = {"fullgraph": True, "backend": "eager"}
    compiled = torch.compile(block, dynamic=True, **options)
    state = None
    for part in x.split([10, 7], 1):
        (want, after), (found, _) = block(part, state), compiled(part, state)
        assert_close("out", found, want, 1e-13)
        state = after
    found, _ = torch.compile(block.step, **options)(x[:, 0], state)
    assert_close("step", found, block.step(x[:, 0], state)[0], 1e-13)
    torch._dynamo.reset()


# The memory of other blocks.


@pytest.mark.parametrize("name", ["MAC", "MAG", "MAL"])
def test_in_other_blocks(name):
    """The block around it is the same, with a `TNTMemory` where a `NeuralMemory` was."""
    tnt = {"global_chunk": 5, "local_chunks": (4, 3), "reset_every": 7}
    block = make_block(name, **tnt)
    alone = TitansTNT(6, heads=2, dim_head=4, expansion=2, dtype=torch.float64, **tnt)
    assert [*dict(block.memory.named_parameters())] == [*dict(alone.memory.named_parameters())]
    x = randn(2, 17, block.dim).requires_grad_()
    whole, final = block(x)
    state, pieces = None, []
    for part in x.split([6, 1, 2, 8], 1):
        out, state = block(part, state)
        pieces.append(out)
    actual, expected = [torch.cat(pieces, 1), *tree_leaves(state)], [whole, *tree_leaves(final)]
    assert_all_close("out, state", actual, expected, 1e-11)
    found = gradients(block, actual, x), gradients(block, expected, x)
    assert_same_gradients(*found, 1e-10)
    for name, value in found[1].items():
        assert value.any(), name

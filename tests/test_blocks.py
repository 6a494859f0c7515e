"""The Titans blocks against their twins in the reference, their causality, and their streams."""

import pytest
import torch
from block_cases import (
    BLOCKS,
    assert_all_close,
    assert_close,
    assert_same_gradients,
    ends,
    gradients,
    make_block,
    randn,
    twin,
)
from torch.utils._pytree import tree_leaves

# Against the definition.

CASES = {
    "LMM as it comes": ("LMM", {}, [13]),
    "LMM without persistent tokens": ("LMM", {"n_persistent": 0}, [9]),
    "LMM, more persistent tokens than a chunk": ("LMM", {"n_persistent": 6}, [9]),
    "LMM packed": ("LMM", {}, [5, 0, 1, 9]),
    "MAC as it comes": ("MAC", {}, [20]),
    "MAC, segments end with the sequence": ("MAC", {"segment": 4}, [12]),
    "MAC, a segment longer than the sequence": ("MAC", {"segment": 32}, [9]),
    "MAC, a segment of one": ("MAC", {"segment": 1}, [5]),
    "MAC, a segment shorter than the filter": ("MAC", {"segment": 2, "chunk_size": 3}, [7]),
    "MAC without persistent tokens": ("MAC", {"n_persistent": 0}, [13]),
    "MAC without rotation": ("MAC", {"rotary": False}, [13]),
    "MAC, depth 1, nothing around": (
        "MAC",
        {"depth": 1, "norm": False, "residual": False, "conv_size": None},
        [13],
    ),
    "MAC, depth 3, gates per layer, SiLU": (
        "MAC",
        {"depth": 3, "per_layer_gates": True, "activation": "silu"},
        [13],
    ),
    "MAC packed": ("MAC", {}, [5, 0, 1, 6, 14]),
    "MAG as it comes": ("MAG", {}, [13]),
    "MAG, a window longer than the sequence": ("MAG", {"window": 32}, [9]),
    "MAG, a window of one": ("MAG", {"window": 1}, [5]),
    "MAG without persistent tokens": ("MAG", {"n_persistent": 0}, [13]),
    "MAG without rotation, no convolution": ("MAG", {"rotary": False, "conv_size": None}, [13]),
    "MAG, one odd head": ("MAG", {"heads": 1, "dim_head": 3, "rotary": False}, [7]),
    "MAG packed": ("MAG", {}, [5, 0, 1, 13]),
    "MAL as it comes": ("MAL", {}, [13]),
    "MAL, a window of one": ("MAL", {"window": 1}, [5]),
    "MAL, a window that ends among persistent tokens": ("MAL", {"n_persistent": 7}, [9]),
    "MAL without persistent tokens or rotation": ("MAL", {"n_persistent": 0, "rotary": False}, [9]),
    "MAL packed": ("MAL", {}, [5, 0, 1, 13]),
    "TNT as it comes": ("TNT", {}, [22]),
    "TNT, projected onto its chunk": ("TNT", {"project": "chunk"}, [22]),
    "TNT, not projected, gates per layer": (
        "TNT",
        {"project": None, "per_layer_gates": True, "depth": 3, "activation": "silu"},
        [13],
    ),
    "TNT, one memory, a reset for every chunk": (
        "TNT",
        {"local_chunks": (4,), "reset_every": 4, "n_persistent": 0, "depth": 1, "norm": False},
        [13],
    ),
    "TNT, a chunk of everything, no reset": (
        "TNT",
        {"local_chunks": (32,), "reset_every": 40, "global_chunk": 32, "conv_size": None},
        [13],
    ),
    "TNT, several blocks of a projection": ("TNT", {"reset_every": 150}, [160]),
    "TNT packed": ("TNT", {"n_persistent": 0}, [5, 0, 1, 23]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_block_is_what_the_paper_writes(case):
    name, options, lengths = CASES[case]
    block = make_block(name, **options)
    x = randn(1, sum(lengths), block.dim).requires_grad_()
    out, _ = block(x, cu_seqlens=ends(lengths) if len(lengths) > 1 else None)
    parts = [twin(name, block, part) for part in x[0].split(lengths) if len(part)]
    expected = torch.cat(parts)[None]

    assert_close("out", out, expected, 1e-10)
    assert_same_gradients(gradients(block, [out], x), gradients(block, [expected], x), 1e-10)


def test_what_attention_does_not_find_the_context_memory_does_not_learn():
    block = make_block("MAC", conv_size=None)
    with torch.no_grad():
        block.attention.out_proj.weight.zero_()
    memories = [block(randn(1, 13, 6, seed=seed))[1].memory for seed in (1, 2)]
    assert all(map(torch.equal, *map(tree_leaves, memories)))


# Causality.


@pytest.mark.parametrize("name", BLOCKS)
def test_a_token_sees_itself_and_what_came_before(name):
    block = make_block(name)
    x = randn(1, 14, block.dim).requires_grad_()
    out, _ = block(x)
    for t in range(14):
        total = (out[:, t] * randn(block.dim, seed=t)).sum()
        (d,) = torch.autograd.grad(total, x, retain_graph=True)
        assert not d[:, t + 1 :].any(), f"token {t} sees ahead"
        # Memory reaches back without an end.
        assert d[:, : t + 1].any(-1).all(), f"token {t} does not see all it has read"


@pytest.mark.parametrize("name", BLOCKS)
def test_a_change_changes_nothing_before_it(name):
    block, x = make_block(name), randn(1, 14, 6)
    out, _ = block(x)
    for t in range(14):
        other = x.clone()
        other[:, t:] = randn(1, 14 - t, 6, seed=50)
        changed, _ = block(other)
        assert_close("before", changed[:, :t], out[:, :t], 1e-13)
        assert not torch.allclose(changed[:, t], out[:, t])


# Streams.


@pytest.mark.parametrize("cuts", [(0,), (1,), (5, 6), (7, 8, 9), (12,), (2, 17), (20,)], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_cuts_change_nothing(name, cuts):
    block = make_block(name)
    x = randn(2, 20, block.dim).requires_grad_()
    whole, final = block(x)
    pieces, state = [], None
    for part in x.tensor_split(cuts, dim=1):
        out, state = block(part, state)
        pieces.append(out)

    actual = [torch.cat(pieces, 1), *tree_leaves(state)]
    expected = [whole, *tree_leaves(final)]
    assert_all_close("out, state", actual, expected, 1e-11)
    actual, expected = gradients(block, actual, x), gradients(block, expected, x)
    assert_same_gradients(actual, expected, 1e-10)


@pytest.mark.parametrize("name", BLOCKS)
def test_token_by_token_is_forward(name):
    block = make_block(name)
    x = randn(2, 15, block.dim).requires_grad_()
    whole, final = block(x)
    state, outputs = None, []
    for x_t in x.unbind(1):
        out, state = block.step(x_t, state)
        outputs.append(out)

    actual = [torch.stack(outputs, 1), *tree_leaves(state)]
    expected = [whole, *tree_leaves(final)]
    assert_all_close("out, state", actual, expected, 1e-11)
    actual, expected = gradients(block, actual, x), gradients(block, expected, x)
    assert_same_gradients(actual, expected, 1e-10)


@pytest.mark.parametrize("name", BLOCKS)
def test_packed_sequences_are_separate_runs_and_go_on(name):
    block, lengths = make_block(name), [5, 0, 8, 1, 12, 6]
    rows = [randn(1, n, block.dim, seed=n) for n in lengths]
    out, state = block(torch.cat(rows, 1), cu_seqlens=ends(lengths))
    runs = [block(row) for row in rows]
    assert_close("packed", out, torch.cat([y for y, _ in runs], 1), 1e-11)

    # Rows at different places of their chunks and segments: a token each, then some each.
    for t in range(7):
        x_t = randn(len(rows), block.dim, seed=100 + t)
        out, state = block.step(x_t, state)
        runs = [block.step(x_t[n : n + 1], run[1]) for n, run in enumerate(runs)]
        assert_close(f"step {t}", out, torch.cat([y for y, _ in runs]), 1e-11)
    for n in (4, 1, 2, 10):
        x = randn(len(rows), n, block.dim, seed=200 + n)
        out, state = block(x, state)
        runs = [block(x_n[None], run[1]) for x_n, run in zip(x, runs, strict=True)]
        assert_close(f"batch of {n}", out, torch.cat([y for y, _ in runs]), 1e-11)

    lengths = lengths[::-1]
    rows = [randn(1, n, block.dim, seed=300 + n) for n in lengths]
    out, state = block(torch.cat(rows, 1), state, ends(lengths).int())
    runs = [block(row, run[1]) for row, run in zip(rows, runs, strict=True)]
    assert_close("packed again", out, torch.cat([y for y, _ in runs], 1), 1e-11)
    expected = [torch.cat(parts) for parts in zip(*(tree_leaves(s) for _, s in runs), strict=True)]
    assert_all_close("state", tree_leaves(state), expected, 1e-11)


@pytest.mark.parametrize("name", BLOCKS)
def test_packed_sequences_do_not_see_each_other(name):
    block, x = make_block(name), randn(1, 16, 6)
    other = x.clone()
    other[:, 4:9] = 100.0
    (out, _), (changed, _) = (block(y, cu_seqlens=ends([4, 5, 7])) for y in (x, other))
    assert torch.equal(out[:, :4], changed[:, :4]) and torch.equal(out[:, 9:], changed[:, 9:])
    assert not torch.equal(out[:, 4:9], changed[:, 4:9])


@pytest.mark.parametrize("name", BLOCKS)
def test_nothing_is_a_sequence_too(name):
    block = make_block(name)
    out, start = block(randn(3, 0, block.dim))
    assert out.shape == (3, 0, block.dim)
    assert_close("first", block(randn(3, 4, 6), start)[0], block(randn(3, 4, 6))[0], 1e-12)
    _, state = block(randn(3, 7, block.dim))
    out, same = block(randn(3, 0, block.dim), state)
    assert out.shape == (3, 0, block.dim)
    assert all(map(torch.equal, tree_leaves(state), tree_leaves(same)))
    for none in (block(randn(0, 4, 6)), block(randn(1, 0, 6), None, torch.tensor([0]))):
        assert none[0].numel() == 0 and not any(len(y) for y in tree_leaves(none[1]))


@pytest.mark.parametrize("name", BLOCKS)
def test_a_state_stays_the_size_it_is(name):
    block, state, sizes = make_block(name), None, set()
    with torch.no_grad():
        for n in (3, 1, 40, 6):
            _, state = block(randn(1, n, block.dim), state)
            parts = [y.untyped_storage() for y in tree_leaves(state)]
            storages = {part.data_ptr(): part for part in parts}  # states share some
            shapes = tuple(y.shape for y in tree_leaves(state))
            sizes.add((sum(map(len, storages.values())), shapes))
    assert len(sizes) == 1


def test_a_segment_leaves_nothing_but_what_was_learned():
    block = make_block("MAC")
    _, state = block(randn(2, 2 * block.segment, 6).requires_grad_())
    assert not (state.keys.any() or state.values.any() or state.length.any())
    pairs = zip(tree_leaves(state.memory.memory), tree_leaves(state.past.memory), strict=True)
    assert all(torch.equal(now, then) for now, then in pairs)

"""`TitansMAC` reads sequences in parallel, each as if alone, in the rounds of the longest."""

import pytest
import torch
from block_cases import (
    assert_all_close,
    assert_close,
    assert_same_gradients,
    ends,
    gradients,
    make_block,
    randn,
)
from torch.utils._pytree import tree_leaves

from titans_kernels.layers.state import concatenate

SEGMENT = 6
EDGES = [0, 1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 3 * SEGMENT + 2]

BARE = {"depth": 1, "norm": False, "residual": False, "conv_size": None, "n_persistent": 0}

# What sequences have read before, what they read now, packed or as many tokens of each; options.
CASES = {
    "packed": (None, EDGES, {}),
    "packed, the longest first": (None, EDGES[::-1], {}),
    "packed, one of them": (None, [13], {}),
    "packed, all alike": (None, [8, 8, 8], {}),
    "packed, alike, each at another place": ([0, 4, 6, 11], [8, 8, 8, 8], {}),
    "packed, going on": ([7, 3, 5, 13, 5, 1, 6], [7, 0, 1, 20, 6, 5, 12], {}),
    "packed, going on to the end of a segment": ([2, 5, 0, 1], [4, 1, 6, 11], {}),
    "packed, a token of one of them": ([3, 5, 0], [0, 1, 0], {}),
    "packed, nothing": ([3, 5, 0], [0, 0, 0], {}),
    "packed, a segment of one": ([0, 2, 1], [3, 0, 5], {"segment": 1}),
    "packed, nothing around the memory": ([7, 3, 5], [7, 0, 13], BARE | {"rotary": False}),
    "packed, gates per layer": ([7, 3, 5], [7, 0, 13], {"per_layer_gates": True}),
    "a batch": ([1, 7, 13], 14, {}),
    "a batch, each at another place": ([0, 1, 4, 5, 6, 11], 14, {}),
    "a batch, some pass the end of a segment": ([0, 4, 5, 3], 2, {}),
    "a batch, some reach the end of a segment": ([0, 3, 4], 2, {}),
    "a batch, none reaches it": ([0, 3, 1], 2, {}),
    "a batch, a token each": ([0, 3, 5], 1, {}),
    "a batch, nothing": ([0, 3, 5], 0, {}),
    "a batch, nothing around the memory": ([0, 7, 3], 9, BARE),
}


def _past(block, rows):
    """One state of sequences each of which has read its row [n, dim] alone."""
    return concatenate([block(row[None])[1] for row in rows])


def _rows(lengths, dim, seed):
    """Sequences [n, dim], and what they are views of."""
    x = randn(sum(lengths), dim, seed=seed).requires_grad_()
    return x.split(lengths), x


@pytest.mark.parametrize("case", CASES)
def test_sequences_side_by_side_are_each_alone(case):
    before, reads, options = CASES[case]
    block = make_block("MAC", **options)
    packed = isinstance(reads, list)
    lengths = reads if packed else [reads] * len(before)
    rows, x = _rows(lengths, block.dim, 1)
    rows_before, x_before = _rows(before or [0] * len(lengths), block.dim, 2)

    state = _past(block, rows_before) if before else None
    if packed:
        out, state = block(x[None], state, ends(lengths))
    else:
        out, state = block(x.view(len(rows), reads, block.dim), state)
    alone = []
    for row, row_before in zip(rows, rows_before, strict=True):
        alone.append(block(row[None], _past(block, [row_before]) if before else None))

    actual = [out.flatten(0, 1), *tree_leaves(state)]
    expected = [
        torch.cat([y[0] for y, _ in alone]),
        *tree_leaves(concatenate([s for _, s in alone])),
    ]
    assert_all_close("out, state", actual, expected, 1e-12)
    found, wanted = (gradients(block, values, x, x_before) for values in (actual, expected))
    assert_same_gradients(found, wanted, 1e-12)


@pytest.mark.parametrize("packed", [False, True], ids=["a batch", "packed"])
def test_a_token_of_uneven_sequences_sees_what_came_before_in_its_own(packed):
    block, n = make_block("MAC"), 8
    past = _past(block, _rows([0, 4, 1], block.dim, 2)[0])
    lengths = [n, n - 5, n + 2] if packed else [n] * 3
    x = randn(1, sum(lengths), block.dim) if packed else randn(3, n, block.dim)
    x.requires_grad_()
    out, _ = block(x, past, ends(lengths) if packed else None)
    flat, start = out.flatten(0, 1), 0
    for length in lengths:
        for t in range(start, start + length):
            (d,) = torch.autograd.grad(flat[t].sum(), x, retain_graph=True)
            seen = d.flatten(0, 1).any(-1).nonzero().flatten().tolist()
            assert seen == list(range(start, t + 1)), f"token {t}"
        start += length


def test_uneven_sequences_under_autocast():
    block, lengths = make_block("MAC", dim=32, dim_head=16), [3, 17, 0, 20]
    x = randn(1, sum(lengths), 32)
    exact, _ = block(x, cu_seqlens=ends(lengths))
    block, x = block.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        out, state = block(x, cu_seqlens=ends(lengths))
        again, _ = block(x.view(4, 10, 32), state)
    assert out.dtype == again.dtype == torch.bfloat16 and again.isfinite().all()
    assert (out - exact).norm() < 0.05 * exact.norm()


def _calls(block, *args):
    """What its memory was trained on: tokens and cu_seqlens of every call."""
    calls = []

    def note(_, args, named):
        if named.get("learn", True):  # else it is read
            calls.append(args)

    hook = block.memory.register_forward_pre_hook(note, with_kwargs=True)
    block(*args)
    hook.remove()
    return [(x, *rest[1:]) for x, *rest in calls]


@pytest.mark.parametrize("segments", [1, 2, 5])
@pytest.mark.parametrize("sequences", [1, 4, 12])
def test_calls_grow_with_the_longest_and_not_with_the_number(segments, sequences):
    block = make_block("MAC")
    longest = segments * SEGMENT - 1
    lengths = [longest, *(3 * i % longest for i in range(1, sequences))]
    calls = _calls(block, randn(1, sum(lengths), block.dim), None, ends(lengths))
    assert len(calls) == 1 + segments  # one for the state of a sequence that has not begun
    assert sum(x.shape[1] for x, *_ in calls) == sum(lengths)


def test_sequences_that_are_read_drop_out():
    block, lengths = make_block("MAC"), [13, 0, 1, 7, 12]
    _, *calls = _calls(block, randn(1, sum(lengths), block.dim), None, ends(lengths))
    assert [cu.diff().tolist() for _, cu in calls] == [[6, 6, 6, 1], [6, 1, 6], [1]]


@pytest.mark.parametrize("fill", [0, 2])
def test_sequences_that_are_alike_are_a_batch(fill):
    block = make_block("MAC")
    state, x = _past(block, _rows([fill] * 3, block.dim, 2)[0]), randn(3, 10, block.dim)
    for args in ((x, state), (x.view(1, 30, -1), state, torch.tensor([0, 10, 20, 30]))):
        calls = _calls(block, *args)
        assert [x.shape[:2] for x, *_ in calls] == [(3, 6 - fill), (3, 4 + fill)]
        assert all(cu is None for _, cu in calls)


def test_a_step_does_not_look_where_sequences_are():
    block = make_block("MAC")
    state, x = _past(block, _rows([0, 5, 3], block.dim, 2)[0]).detach(), randn(3, block.dim)
    torch._dynamo.reset()
    # Whole graphs cannot: what they compute they do not know.
    out, _ = torch.compile(block.step, backend="eager", fullgraph=True)(x, state)
    torch._dynamo.reset()
    assert_close("out", out, block.step(x, state)[0], 1e-13)

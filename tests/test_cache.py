"""Rows of a cache, and of a padded batch, by hand: order is all that there is to get wrong."""

import pytest
import torch
from inputs import make_inputs

from titans_kernels import neural_memory

pytest.importorskip("transformers")

from titans_kernels.adapt.cache import MemoryLayer
from titans_kernels.adapt.rows import rows_of, rows_once


def _layer():
    inputs = make_inputs(3, 5, 1, 4, 6, 1, requires_grad=False)
    _, state = neural_memory(**inputs, output_final_state=True)
    layer = MemoryLayer()
    layer.store(state, 5)
    return layer, state


CHANGES = {
    "repeated": (lambda layer: layer.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "selected": (lambda layer: layer.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
    "reordered": (lambda layer: layer.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
}


@pytest.mark.parametrize("change, order", CHANGES.values(), ids=CHANGES)
def test_rows_of_a_state(change, order):
    layer, state = _layer()
    change(layer)
    for name in ("k", "eta", "length"):
        assert torch.equal(getattr(layer.state, name), getattr(state, name)[order])
    assert torch.equal(layer.state.weights[0], state.weights[0][order])
    assert layer.get_seq_length() == 5


POSITIONS = {
    "one sequence": ([0, 1, 2, 3], None),
    "one that began before": ([7, 8, 9, 10], None),
    "two, the second from 0": ([0, 1, 0, 1], [0, 2, 4]),
    "two, a gap between them": ([0, 1, 5, 6], [0, 2, 4]),
    "a position again": ([0, 1, 1, 2], [0, 2, 4]),
}


@pytest.mark.parametrize("positions, ends", POSITIONS.values(), ids=POSITIONS)
def test_where_positions_say_that_sequences_begin(positions, ends):
    rows = rows_of(torch.zeros(1, 4, 8), None, torch.tensor([positions]))
    assert (rows and rows.cu_seqlens.tolist()) == ends


def test_a_mask_is_read_again_when_anything_has_changed():
    """Its values in place, the tokens it is for, or whether they go on from earlier ones."""
    x, mask = torch.zeros(2, 4, 8), torch.ones(2, 4, dtype=torch.long)
    assert rows_once(x, mask) is None
    mask[0, 0] = 0
    assert rows_once(x, mask).cu_seqlens.tolist() == [0, 3, 7]
    assert rows_once(x, mask) is rows_once(x, mask)
    assert rows_once(x[:, :2], mask) is None  # the last two columns are theirs
    positions = torch.tensor([[0, 1, 0, 1]])
    assert rows_once(x[:1], None, positions).cu_seqlens.tolist() == [0, 2, 4]
    assert rows_once(x[:1], None, positions, past=True) is None

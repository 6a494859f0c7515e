"""Queries of a layer without an update."""

import copy
import math

import pytest
import torch
from block_cases import SMALL, assert_all_close, assert_close, ends, gradients, randn
from torch.utils._pytree import tree_leaves

from titans_kernels import NeuralMemory


def _layer(**options):
    torch.manual_seed(0)
    return NeuralMemory(6, **(SMALL | options))


def _frozen(layer):
    """The layer that neither learns, nor forgets, nor keeps a direction: its gates are 0."""
    layer = copy.deepcopy(layer)
    with torch.no_grad():
        for bias in (layer.theta_bias, layer.alpha_bias, layer.eta_bias):
            bias.fill_(-math.inf)
    return layer


OPTIONS = {
    "as it comes": {},
    "depth 3, gates per layer": {"depth": 3, "per_layer_gates": True},
    "no convolution, no norm, no residual": {"conv_size": None, "norm": False, "residual": False},
}


@pytest.mark.parametrize("read", [0, 3, 4, 13])
@pytest.mark.parametrize("case", OPTIONS)
def test_recall_is_the_layer_that_does_not_learn(case, read):
    layer = _layer(**OPTIONS[case])
    _, state = layer(randn(2, read, 6, seed=2))
    x = randn(2, 9, 6)
    out, after = layer.recall(x, state)
    assert after.memory is state.memory
    assert_close("out", out, _frozen(layer)(x, state)[0], 1e-12)
    if not read:
        assert_close("M_0", layer.recall(x)[0], out, 1e-12)


def test_recall_in_pieces_and_packed():
    layer = _layer()
    _, state = layer(randn(3, 6, 6, seed=2))
    x = randn(3, 9, 6).requires_grad_()
    whole, final = layer.recall(x, state)
    first, middle = layer.recall(x[:, :2], state)
    second, after = layer.recall(x[:, 2:], middle)
    actual = [torch.cat([first, second], 1), *tree_leaves(after)]
    assert_all_close("pieces", actual, [whole, *tree_leaves(final)], 1e-12)

    rows = whole[0, :4], whole[1, :0], whole[2, :7]
    packed = torch.cat([x[0, :4], x[2, :7]])[None]
    out, after = layer.recall(packed, state, ends([4, 0, 7]))
    assert_close("packed", out, torch.cat(rows)[None], 1e-12)
    assert_close("history", after.convolution[0][2], layer.q_proj(x[2, 4:7]), 1e-12)
    out, _ = layer.recall(packed, cu_seqlens=ends([4, 0, 7]))
    assert_close("M_0, packed", out[:, :4], layer.recall(x[:1, :4])[0], 1e-12)


def test_gradients_reach_the_questions_and_what_was_read():
    layer, text = _layer(), randn(1, 6, 6, seed=2).requires_grad_()
    x = randn(1, 3, 6).requires_grad_()
    found = gradients(layer, [layer.recall(x, layer(text)[1])[0]], x, text)
    assert all(value.any() for value in found.values())
    found = gradients(layer, [layer.recall(x)[0]], x)
    assert found["weights.0"].any() and not found["k_proj.weight"].any()


def test_what_recall_refuses():
    layer, x = _layer(), randn(2, 5, 6)
    with pytest.raises(ValueError, match=r"x: got shape \[5, 6\], takes \[B, T, dim\]"):
        layer.recall(x[0])
    with pytest.raises(TypeError, match="state: got int, takes a LayerState or None"):
        layer.recall(x, 3)
    with pytest.raises(ValueError, match="x: got batch 2, takes 1 together with cu_seqlens"):
        layer.recall(x, None, torch.tensor([0, 5]))

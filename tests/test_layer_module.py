"""The layer as a module among others: parameters, copies, saved states, checkpointing."""

import copy
import doctest
import io

import pytest
import torch
from layer_cases import ends_of, gradients, randn, small_layer
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from titans_kernels import NeuralMemory
from titans_kernels.layers import LayerState
from titans_kernels.layers.convolution import ShortConvolution, convolve


@pytest.mark.parametrize(
    "depth, conv_size, norm, per_layer_gates",
    [(1, 4, True, False), (2, 3, False, True), (4, 0, True, True)],
)
def test_parameter_count_is_the_formula(depth, conv_size, norm, per_layer_gates):
    dim, heads, dim_head, expansion = 24, 3, 5, 2
    layer = NeuralMemory(
        dim,
        heads=heads,
        dim_head=dim_head,
        depth=depth,
        expansion=expansion,
        conv_size=conv_size,
        norm=norm,
        per_layer_gates=per_layer_gates,
    )
    inner, hidden = heads * dim_head, expansion * dim_head
    gates = heads * (depth if per_layer_gates else 1)
    M = dim_head**2 if depth == 1 else 2 * dim_head * hidden + (depth - 2) * hidden**2
    expected = 5 * dim * inner + 3 * inner * conv_size + 3 * gates * (dim + 1) + heads * M
    expected += (3 if norm else 1) * inner
    assert sum(p.numel() for p in layer.parameters()) == expected


def test_state_dict_and_copies_hold_everything():
    layer, x = small_layer(), randn(1, 20, 10)
    out, _ = layer(x)
    other = small_layer(seed=5)
    assert not torch.equal(other(x)[0], out)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(x)[0], out)
    assert torch.equal(copy.deepcopy(layer)(x)[0], out)


def test_a_saved_state_goes_on():
    layer, x = small_layer(), randn(2, 30, 10)
    with torch.no_grad():
        _, state = layer(x[:, :19])
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=True)
        assert isinstance(loaded, LayerState)
        assert torch.equal(layer(x[:, 19:], loaded)[0], layer(x[:, 19:], state)[0])
        swapped = state.index_select(torch.tensor([1, 0]))
        assert torch.equal(layer(x[:, 19:].flip(0), swapped)[0].flip(0), layer(x[:, 19:], state)[0])
    _, state = layer(x)
    assert any(y.requires_grad for y in tree_leaves(state))
    assert not any(y.requires_grad for y in tree_leaves(state.detach()))


def test_meta_device_then_initialised_as_ever():
    options = {"heads": 2, "per_layer_gates": True}
    meta, layer = NeuralMemory(16, **options, device="meta"), NeuralMemory(16, **options)
    assert all(p.is_meta for p in meta.parameters())
    meta.to_empty(device="cpu")
    for module in (meta, layer):
        with torch.no_grad():
            for p in module.parameters():
                p.fill_(float("nan"))
        torch.manual_seed(3)
        module.reset_parameters()
    plain = ("theta_bias", "alpha_bias", "eta_bias", "norm_weight", "norm_bias", "out_norm")
    for (name, p), expected in zip(meta.named_parameters(), layer.parameters(), strict=True):
        assert torch.equal(p, expected), name
        assert getattr(p, "_no_weight_decay", False) == (name in plain), name


def test_checkpointing_changes_nothing():
    layer, x = small_layer(), randn(1, 40, 10).requires_grad_()
    _, start = layer(randn(1, 7, 10, seed=4))
    start = start.detach()
    out, state = layer(x, start)
    expected = gradients(layer, [out, *tree_leaves(state)], x)
    out, state = checkpoint(layer, x, start, use_reentrant=False)
    actual = gradients(layer, [out, *tree_leaves(state)], x)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_docstring_example_runs():
    found = doctest.DocTestFinder().find(NeuralMemory, globs={})
    runner = doctest.DocTestRunner()
    for test in found:
        runner.run(test)
    assert runner.summarize().attempted > 0 and runner.failures == 0


def test_repr_names_the_sizes():
    text = repr(NeuralMemory(16, heads=2))
    assert "16, heads=2, dim_head=8, depth=2, expansion=4, chunk_size=16" in text
    assert "32, size=4" in repr(NeuralMemory(16, heads=2, dim_head=16))


@pytest.mark.parametrize("lengths", [None, [5, 0, 3]])
def test_a_filter_of_one_tap_has_no_history(lengths):
    x, cu_seqlens = randn(1, 8, 6), None
    if lengths is not None:
        cu_seqlens = torch.tensor([0, *ends_of(lengths)])
    convolution = ShortConvolution(6, 1, dtype=torch.float64)
    filters = [convolution()]
    y, (history,) = convolve(filters, [x], None, cu_seqlens)
    assert torch.equal(y[:, 0], x * convolution.weight[:, 0])
    assert history.shape == (len(lengths or [8]), 0, 6)
    again, (history,) = convolve(filters, [x], [history], cu_seqlens)
    assert torch.equal(again, y) and history.shape[1] == 0


def test_parameters_start_at_the_scale_that_is_documented():
    torch.manual_seed(0)
    layer = NeuralMemory(256, heads=2, dim_head=128)
    first, second = layer.weights
    scale = {
        **{"q_proj": 256**-0.5, "v_proj": 256**-0.5, "theta_proj": 0.1 * 256**-0.5},
        **{"alpha_proj": 0.1 * 256**-0.5, "out_proj": 256**-0.5, "gate_proj": 256**-0.5},
    }
    stds = {getattr(layer, name).weight: std for name, std in scale.items()}
    stds |= {first: 1.0, second: 512**-0.5}
    stds |= {NeuralMemory(256, heads=2, dim_head=128, norm=False).weights[0]: 128**-0.5}
    stds |= {NeuralMemory(256, heads=2, dim_head=128, depth=1).weights[0]: 128**-0.5}
    for weight, std in stds.items():
        deviation = 4 * (2 * weight.numel()) ** -0.5  # of a sample's standard deviation
        assert abs(weight.std() / std - 1) < deviation
        assert abs(weight.mean()) < 4 * std * weight.numel() ** -0.5
    for filter_ in layer.convolutions:
        assert abs(filter_.weight.std() / 4**-0.5 - 1) < 4 * (2 * filter_.weight.numel()) ** -0.5
    assert (layer.norm_weight == 128**-0.5).all() and (layer.alpha_bias == -8.0).all()

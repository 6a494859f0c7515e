"""What does not fit a layer: each argument's error names it, what it got and what it takes."""

import dataclasses

import pytest
import torch

from titans_kernels import NeuralMemory


def _layer(**options):
    small = {"heads": 2, "dim_head": 4, "expansion": 2, "dtype": torch.float64}
    return NeuralMemory(10, **(small | options))


OPTIONS = [
    ({"dim": 0}, ValueError, "dim: got 0, takes an int of at least 1"),
    ({"dim": 8.0}, TypeError, "dim: got 8.0, takes an int"),
    ({"heads": 0}, ValueError, "heads: got 0, takes an int of at least 1"),
    ({"heads": True}, TypeError, "heads: got True, takes an int"),
    ({"heads": 3}, ValueError, "heads: got 3, takes a divisor of dim = 8, or an explicit dim_head"),
    ({"dim_head": 0}, ValueError, "dim_head: got 0, takes an int of at least 1"),
    ({"dim_head": "4"}, TypeError, "dim_head: got '4', takes an int"),
    ({"depth": 0}, ValueError, "depth: got 0, takes an int of at least 1"),
    ({"expansion": 0}, ValueError, "expansion: got 0, takes an int of at least 1"),
    ({"expansion": 2.5}, TypeError, "expansion: got 2.5, takes an int"),
    ({"chunk_size": 0}, ValueError, "chunk_size: got 0, takes an int of at least 1"),
    ({"chunk_size": -16}, ValueError, "chunk_size: got -16, takes an int of at least 1"),
    ({"chunk_size": 10**9}, ValueError, "chunk_size: got 1000000000, takes at most 65536 where"),
    ({"conv_size": 10**9}, ValueError, "conv_size: got 1000000000, takes at most 65536 where"),
    ({"activation": "tanh"}, ValueError, "activation: got 'tanh', takes one of 'gelu_tanh'"),
    ({"residual": 1}, TypeError, "residual: got 1, takes True or False"),
    ({"norm": None}, TypeError, "norm: got None, takes True or False"),
    ({"per_layer_gates": "yes"}, TypeError, "per_layer_gates: got 'yes', takes True or False"),
    ({"conv_size": -1}, ValueError, "conv_size: got -1, takes an int of at least 0"),
    ({"conv_size": 4.0}, TypeError, "conv_size: got 4.0, takes an int"),
    ({"max_learning_rate": 0.0}, ValueError, "max_learning_rate: got 0.0, takes a number above 0"),
    ({"max_learning_rate": "1"}, TypeError, "max_learning_rate: got '1', takes a number above 0"),
    ({"backend": "cuda"}, ValueError, "backend: got 'cuda', takes one of 'auto'"),
    ({"dtype": torch.int32}, TypeError, "dtype: got torch.int32, takes None or one of float64"),
    ({"dim_heads": 4}, TypeError, "dim_heads"),
]


@pytest.mark.parametrize("options, error, message", OPTIONS, ids=[m for *_, m in OPTIONS])
def test_options_that_do_not_fit(options, error, message):
    with pytest.raises(error) as caught:
        NeuralMemory(**({"dim": 8, "heads": 2} | options))
    assert message in str(caught.value)


X = torch.zeros(2, 5, 10, dtype=torch.float64)
INPUTS = [
    (lambda _: ([1.0],), TypeError, "x: got list, takes a torch.Tensor"),
    (lambda _: (X.long(),), TypeError, "x: got dtype torch.int64, takes one of float64"),
    (lambda _: (X.to_sparse(),), TypeError, "x: got a tensor of layout sparse_coo, takes a dense"),
    (lambda _: (X.float().to_mkldnn(),), TypeError, "x: got a tensor of layout _mkldnn, takes a"),
    (lambda _: (X[0],), ValueError, "x: got shape [5, 10], takes [B, T, dim] with dim = 10"),
    (lambda _: (X[..., :9],), ValueError, "x: got shape [2, 5, 9], takes [B, T, dim]"),
    (lambda _: (X.float(),), TypeError, "x: got dtype torch.float32, takes that of the layer"),
    (lambda _: (X.to("meta"),), ValueError, "x: got device meta, takes that of the layer, cpu"),
    (lambda _: (X, None, torch.tensor([0, 5])), ValueError, "x: got batch 2, takes 1 together"),
    (lambda _: (X[:1], None, [0, 5]), TypeError, "cu_seqlens: got list"),
    (lambda _: (X[:1], None, torch.tensor([0.0, 5.0])), TypeError, "cu_seqlens: got dtype"),
    (lambda _: (X[:1], None, torch.tensor([[0, 5]])), ValueError, "cu_seqlens: got shape [1, 2]"),
    (lambda _: (X[:1], None, torch.tensor([0, 4])), ValueError, "cu_seqlens: got 0 first and 4"),
    (lambda _: (X[:1], None, torch.tensor([0, 3, 2, 5])), ValueError, "values that never fall"),
    (lambda s: (X, s.memory), TypeError, "state: got MemoryState, takes a LayerState or None"),
    (lambda s: (X[:1], s), ValueError, "state.memory.weights[0]: got shape [2, 2, 4, 8], takes"),
    (lambda s: (X, _without(s, 1)), ValueError, "state.convolution: got 2, takes a tuple of 3"),
    (lambda s: (X, _with(s, lambda x: x[:, 1:])), ValueError, "state.convolution[0]: got shape"),
    (lambda s: (X, _with(s, torch.Tensor.float)), TypeError, "state.convolution[0]: got dtype"),
    (lambda s: (X, _with(s, lambda x: None)), TypeError, "state.convolution[0]: got NoneType"),
    (lambda s: (X, _of(chunk_size=8)), ValueError, "state.memory: got chunks of 8 tokens, takes"),
    (lambda s: (X, _of(depth=3)), ValueError, "state.memory.weights: got 3 layers, takes 2"),
    (lambda s: (X, _of(heads=3)), ValueError, "state.memory.weights[0]: got shape [2, 3, 4, 8]"),
    (lambda s: (X, _of(per_layer_gates=True)), ValueError, "state.memory.theta: got shape"),
    (lambda s: (X, _of(conv_size=0)), ValueError, "state.convolution: got 0, takes a tuple of 3"),
]


def _without(state, count):
    return dataclasses.replace(state, convolution=state.convolution[count:])


def _with(state, function):
    return dataclasses.replace(state, convolution=tuple(map(function, state.convolution)))


def _of(**options):
    return _layer(**options)(X)[1]


@pytest.mark.parametrize("arguments, error, message", INPUTS, ids=[m for *_, m in INPUTS])
def test_inputs_that_do_not_fit(arguments, error, message):
    layer = _layer()
    _, state = layer(X)
    with pytest.raises(error) as caught:
        layer(*arguments(state))
    assert message in str(caught.value)


def test_a_step_takes_one_token():
    layer = _layer()
    with pytest.raises(ValueError, match=r"x: got shape \[2, 5, 10\], takes \[B, dim\]"):
        layer.step(X)
    with pytest.raises(TypeError, match="state: got int, takes a LayerState or None"):
        layer.step(X[:, 0], 3)

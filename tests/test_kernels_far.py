"""The backward pass of tokens whose offsets fit no int32; the forward pass: test_kernels.py."""

from unittest import mock

import pytest
import torch
import triton
from inputs import make_inputs
from triton.runtime import interpreter as stock
from triton_support.interpreter import install
from triton_support.sanitizer import sanitize

from titans_kernels.kernels import launch, launch_backward
from titans_kernels.kernels.records import Queries, TokenGrad, Tokens
from titans_kernels.kernels.tiles import Blocks, Tile

if torch.cuda.is_available() and not triton.knobs.runtime.interpret:
    pytest.skip("tensors of the CPU", allow_module_level=True)
install()

T, D, HIDDEN, CHUNK = 20, 16, 16, 16
M = 2**27 + T  # times D, more than 2^31
TILE = Tile(16, 16)


def _far(x):
    """The same tokens, at the end of a tensor of which little is ever touched."""
    out = torch.empty(M, *x.shape[1:], dtype=x.dtype)
    out[-T:] = x
    return out


def _gradients(q, k, v, gates, do, start):
    """Of the tokens from `start` on and of the state before them."""
    bounds = torch.tensor([[start, start + T]])
    tokens = Tokens(k, v, *gates, bounds, torch.zeros(1, dtype=torch.int64), bounds[0, :1])
    norm = torch.ones(1, 2, D)
    problem = launch.Problem(CHUNK, Blocks.of(CHUNK, TILE), "gelu_tanh", True, "token", norm, TILE)
    W = [torch.ones(1, 1, D, HIDDEN) / 8, torch.ones(1, 1, HIDDEN, D) / 8]
    states = [*W, *map(torch.zeros_like, W)]
    before = [x.to(q.dtype) for x in states]
    dtokens = TokenGrad(*map(torch.empty_like, (q, k, v, *gates)))
    dstates = [torch.full_like(x, 0.1) for x in states]
    scratch = launch.allocate(tokens, W, problem, 2, keep=True)
    grad = launch_backward.allocate(scratch, dtokens, dstates, dstates)
    query, group = Queries(q, do, scratch.parts), scratch.at(states, states)
    launch.coefficients(tokens, group, 0, problem)
    launch.scan(tokens, group, 0, problem)
    launch.retrieve(query, tokens, group, 0, problem)
    group = group.read_from(before)
    at = (query, tokens, group, grad, 0, problem)
    launch_backward.retrieve_backward(*at)
    launch_backward.inputs_backward(*at, keys=False)
    launch_backward.scan_backward(*at)
    launch_backward.inputs_backward(*at, keys=True)
    launch_backward.coefficients_backward(tokens, group, grad, 0, problem)
    return *(x[-T:] for x in dtokens), *dstates, grad.norm, grad.norm_keys


def test_gradients_beyond_int32():
    inputs = make_inputs(1, T, 1, D, HIDDEN, 2, dtype=torch.bfloat16, requires_grad=False)
    q, k, v = (inputs[name][0] for name in "qkv")
    gates = [inputs[name][0, :, :, None].float() for name in ("theta", "alpha", "eta")]
    do = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q)
    want = _gradients(q, k, v, gates, do, 0)
    nothing = mock.patch.object(stock.GridExecutor, "_restore_args_dev", lambda *_: None)
    with nothing, sanitize(checks={"overflow"}):  # nothing to copy back: the tensors are the host's
        got = _gradients(*map(_far, (q, k, v)), [_far(x) for x in gates], _far(do), M - T)
    assert all(x.isfinite().all() and x.any() for x in want[:6])
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))

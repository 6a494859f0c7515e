"""torch.func and forward-mode derivatives: right on the PyTorch backend, refused on Triton's."""

import pytest
import torch
import torch.autograd.forward_ad as fwd
import torch.nn.functional as F
from block_cases import BLOCKS, make_block
from torch.func import functional_call, grad, jvp, vmap

from titans_kernels import neural_memory, ops, retrieve

X = torch.randn(2, 11, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _difference(function, x, v, step=1e-6):
    return (function(x + step * v) - function(x - step * v)) / (2 * step)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_forward_mode_and_functional_gradients_of_blocks(name):
    block = make_block(name)
    parameters = {k: p.detach() for k, p in block.named_parameters()}
    v = torch.randn(X.shape, dtype=X.dtype, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        _, tangent = jvp(lambda x: block(x)[0], (X,), (v,))
        expected = _difference(lambda x: block(x)[0], X, v)
    torch.testing.assert_close(tangent, expected, rtol=1e-5, atol=1e-6)

    def loss(p, row):
        return functional_call(block, p, (row[None],))[0].square().mean()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, X)
    for i, row in enumerate(X):
        wanted = torch.autograd.grad(
            loss(dict(block.named_parameters()), row), list(block.parameters()), allow_unused=True
        )
        for key, expected in zip(parameters, wanted, strict=True):
            if expected is not None:
                torch.testing.assert_close(found[key][i], expected, rtol=1e-9, atol=1e-11)


def _operands(T=11, H=2, D=4, hidden=8):
    generator = torch.Generator().manual_seed(2)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    q, k, v = (F.normalize(randn(1, T, H, D), dim=-1) for _ in range(3))
    gates = [0.05 * randn(1, T, H).sigmoid() for _ in range(3)]
    return q, k, v, *gates, randn(H, D, hidden) / 2, randn(H, hidden, D) / 3


def _memory(*operands):
    o, state = neural_memory(
        *operands[:6], tuple(operands[6:]), chunk_size=4, output_final_state=True
    )
    return o, retrieve(operands[0], state), *state.weights


def test_dual_numbers_through_the_operators():
    operands = _operands()
    tangents = [torch.randn_like(x) for x in operands]
    with fwd.dual_level():
        found = _memory(*map(fwd.make_dual, operands, tangents))
        found = [fwd.unpack_dual(y).tangent for y in found]
    step = 1e-6
    up, down = (
        _memory(*(x + s * t for x, t in zip(operands, tangents, strict=True)))
        for s in (step, -step)
    )
    for got, a, b in zip(found, up, down, strict=True):
        torch.testing.assert_close(got, (a - b) / (2 * step), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["LMM", "MAC"])
def test_gradients_of_several_cotangents_at_once(name):
    """By `is_grads_batched` and by vmap; with a graph of their own, for second derivatives."""
    block, x = make_block(name), X[:1, :7].clone().requires_grad_()
    out = block(x)[0].square().sum(-1).flatten()
    eye = torch.eye(len(out), dtype=out.dtype)

    def gradient(c, **options):
        return torch.autograd.grad(out, x, c, retain_graph=True, **options)[0]

    one_by_one = torch.stack([gradient(c, create_graph=True) for c in eye])
    at_once = gradient(eye, create_graph=True, is_grads_batched=True)
    for found in (at_once, vmap(gradient)(eye)):
        torch.testing.assert_close(found, one_by_one, rtol=1e-12, atol=1e-14)
    second, expected = (
        torch.autograd.grad(g.square().sum(), x, retain_graph=True)[0]
        for g in (at_once, one_by_one)
    )
    torch.testing.assert_close(second, expected, rtol=1e-10, atol=1e-12)


def test_triton_refuses_tangents_by_name():
    x = torch.ones(2)
    assert not ops._transformed([x], "triton")
    refused = r"backend: got 'triton'.*torch.func.*dual numbers"
    with fwd.dual_level(), pytest.raises(RuntimeError, match=refused):
        ops._transformed([fwd.make_dual(x, x)], "triton")
    with pytest.raises(RuntimeError, match=refused):
        grad(lambda y: y.sum() * ops._transformed([y], "triton"))(x)

"""Any layout of the arguments gives the same bits: kernels know no strides."""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import triton
from inputs import make_inputs
from torch.utils import _pytree as pytree
from yardstick import TOKENS

from titans_kernels import ops
from titans_kernels.packing import Options, Packed, Reading

DEVICE = "cuda" if torch.cuda.is_available() and not triton.knobs.runtime.interpret else "cpu"
if DEVICE == "cpu":
    from triton_support.interpreter import install

    install()

OPTIONS = Options("gelu_tanh", True)
LENGTHS = 0, 5, 7  # the ends of two sequences


def _strided(x):
    """Every second element of each dimension of another tensor."""
    wide = torch.full([2 * n for n in x.shape], 77, dtype=x.dtype, device=x.device)
    return wide[(slice(None, None, 2),) * x.ndim].copy_(x)


def _offset(x):
    """One element behind an aligned address."""
    return (
        torch.full((x.numel() + 1,), 77, dtype=x.dtype, device=x.device)[1:].view(x.shape).copy_(x)
    )


def _transposed(x):
    return x.mT.contiguous().mT if x.ndim > 1 else _strided(x)


def _expanded(x):
    """Heads that are one in memory; their values are equal, see `_records`."""
    if not x.is_floating_point():
        return _strided(x)
    is_norm = x.ndim == 3 and len(x) == 2  # [H, 2, D]; all others have heads second
    return (x[:1] if is_norm else x[:, :1]).expand_as(x)


LAYOUTS = (_strided, _offset, _transposed, _expanded)


def _records():
    """What the ops take, float32, two heads of equal values."""
    inputs = make_inputs(1, 7, 1, 16, 16, 2, dtype=torch.float32, requires_grad=False)
    tokens = [inputs[name].reshape(7, 1, -1).repeat(1, 2, 1) for name in TOKENS]
    weights = [w.expand(2, 2, -1, -1).contiguous() for w in inputs["weights"]]
    momentum = [0.01 * w for w in weights]
    norm = torch.stack(inputs["norm"], 1).repeat(2, 1, 1)
    cu = torch.tensor(LENGTHS)
    bounds = torch.stack([cu[:-1], cu[1:]], 1)
    packed = Packed(
        *tokens, weights, momentum, norm, bounds, torch.zeros_like(cu[:-1]), cu[:-1].clone()
    )
    reading = Reading(tokens[0], weights, norm, cu)
    return pytree.tree_map(lambda x: x.to(DEVICE), (packed, reading))


def _values(backend, layout):
    """Outputs, final state and every gradient, their cotangents laid out alike."""
    packed, reading = pytree.tree_map(layout, _records())
    learned = [x.requires_grad_() for x in packed.differentiable()]
    o, state = ops.neural_memory(packed, backend, OPTIONS, 4, 5, True)
    grads = torch.autograd.grad(
        [o, *state], learned, [layout(x.detach().cos()) for x in (o, *state)]
    )
    read = ops.retrieve(reading, backend, OPTIONS, 5)
    return [o, *state, *grads, read]


@pytest.mark.parametrize("backend", ("torch", "triton"))
def test_layouts(backend):
    want = _values(backend, torch.clone)
    for layout in LAYOUTS:
        for i, (x, y) in enumerate(zip(want, _values(backend, layout), strict=True)):
            if backend == "triton":
                assert torch.equal(x, y), (layout.__name__, i)
            else:  # products of another layout may add in another order
                torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-6)


def test_kernels_run_on_the_device_of_their_tensors():
    """The device is made current around all that an op launches, whichever was current before."""
    packed, reading = _records()
    current, seen = [], []

    @contextmanager
    def device_of(x):
        current.append(x.device)
        yield
        current.pop()

    class Backend:
        def forward(packed, *_):
            seen.append(list(current))
            return torch.empty_like(packed.q), []

        def retrieve(reading, *_):
            seen.append(list(current))
            return torch.empty_like(reading.q)

    patches = (
        mock.patch("torch.cuda.device_of", device_of),
        mock.patch.object(ops, "_module", lambda name: Backend),
    )
    with patches[0], patches[1]:
        ops.neural_memory(packed, "triton", OPTIONS, 4, 5, False)
        ops.retrieve(reading, "triton", OPTIONS, 5)
    assert seen == [[packed.q.device], [reading.q.device]]

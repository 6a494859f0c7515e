"""How a result is measured: against the definition, and against what rounding alone would cost."""

import sys
from itertools import pairwise
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from inputs import make_inputs
from torch.autograd import Function

from titans_kernels import ops
from titans_kernels.chunked import operator
from titans_kernels.chunked.layout import BlockSize, block_size

TOKENS = ("q", "k", "v", "theta", "alpha", "eta")
FIELDS = ("weights", "momentum", "k", "v", "theta", "alpha", "eta")  # a state's, but its length


# ------------------------------------------------------------------------------- measuring a run


class Measured(NamedTuple):
    """What an operator makes of some inputs, by name."""

    values: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]


def flat(named):
    """The floating-point tensors in tensors, tuples and states, by a name of their own."""
    found = {}
    for name, value in named.items():
        if hasattr(value, "momentum"):
            fields = {f"{name}.{x}": getattr(value, x) for x in FIELDS if hasattr(value, x)}
            found |= flat(fields)
        elif isinstance(value, tuple):
            found |= flat({f"{name}[{i}]": part for i, part in enumerate(value)})
        elif torch.is_tensor(value) and value.is_floating_point():
            found[name] = value
    return found


def cotangents(values, seed=1):
    """Random ones, a value's own in each of its entries, exact in every dtype: sixteenths."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(x.shape, generator=generator).mul(16).round().clamp(-64, 64).div(16).to(x)
        for x in values
    ]


def gradients(values, leaves, **options):
    """Gradients of values with cotangents of their own; zero where a leaf plays no part."""
    pairs = [
        (x, dx)
        for x, dx in zip(values.values(), cotangents(values.values()), strict=True)
        if x.requires_grad
    ]
    found = torch.autograd.grad(
        [x for x, _ in pairs],
        list(leaves.values()),
        [dx for _, dx in pairs],
        allow_unused=True,
        materialize_grads=True,
        **options,
    )
    return dict(zip(leaves, found, strict=True))


def measure(op, inputs, **options):
    """Output, all of the final state, and the gradient of every input that has one."""
    o, state = op(**inputs, **options, output_final_state=True)
    values = flat({"o": o, "state": state})
    return Measured(
        values, gradients(values, {n: x for n, x in flat(inputs).items() if x.requires_grad})
    )


def assert_values(actual, expected, bound=1e-11):
    """Largest error of each tensor, relative to the tensor's largest entry."""
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        assert actual[name].shape == want.shape, f"{name}: {actual[name].shape} is not {want.shape}"
        if want.numel():
            error, limit = (actual[name] - want).abs().max(), bound * want.abs().max()
            limit = limit + sys.float_info.min  # numbers below it have fewer digits
            assert error <= limit, f"{name}: error {error:.1e}, bound {limit:.1e}"


def assert_gradients(actual, expected, bound=1e-10):
    """Error of each tensor in the Frobenius norm, relative to the tensor's."""
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        assert actual[name].shape == want.shape, f"d{name}: {actual[name].shape}, not {want.shape}"
        error, limit = (actual[name] - want).norm(), bound * want.norm()
        assert error <= limit, f"d{name}: error {error:.1e}, bound {limit:.1e}"


def piece(inputs, start, stop):
    """The inputs of tokens start to stop - 1."""
    return inputs | {name: inputs[name][:, start:stop] for name in TOKENS}


def blocks_of(kind):
    """Patch the block's size: a device's ("cpu", "cuda"), or what fits into so many tokens."""

    def chosen(chunk_size, device):
        if isinstance(kind, str):
            return block_size(chunk_size, torch.device(kind))
        if chunk_size <= kind:
            return BlockSize(kind // chunk_size * chunk_size, kind // chunk_size, 1)
        blocks = -(-chunk_size // kind)
        return BlockSize(-(-chunk_size // blocks), 1, blocks)

    return mock.patch.object(operator, "block_size", chosen)


def plain_autograd():
    """Patch the op: the same algebra on the same layout, its backward left to PyTorch."""

    def run(packed, backend, options, chunk_size, longest, final):
        return operator.forward(packed, options, chunk_size, longest, [], final)

    return mock.patch.object(ops, "neural_memory", run)


# --------------------------------------------------------------------------- what rounding costs


class _Stored(Function):
    """A tensor kept in a dtype, and so is its gradient."""

    @staticmethod
    def forward(ctx, x, dtype):
        ctx.dtype = dtype
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx, dx):
        return _Stored.apply(dx, ctx.dtype), None


class _Matmul(Function):
    """a b of rounded operands; its derivatives are such products again, of any order."""

    @staticmethod
    def forward(ctx, a, b, dtype):
        ctx.save_for_backward(a, b)
        ctx.dtype = dtype
        return a.to(dtype).to(a.dtype) @ b.to(dtype).to(b.dtype)

    @staticmethod
    def backward(ctx, dc):
        a, b = ctx.saved_tensors
        return (
            _Matmul.apply(dc, b.mT, ctx.dtype),
            _Matmul.apply(a.mT, dc, ctx.dtype),
            None,
        )


def _chunk_coefficients(theta, alpha, eta):
    """a, c, p [..., C, 1] and G, P [..., C, C]: shares of W_0, S_0 and surprises, row by row."""
    C = theta.shape[-1]
    unit = torch.eye(C, dtype=theta.dtype)
    a = p = torch.ones_like(theta[..., :1])
    c, G = torch.zeros_like(a), torch.zeros_like(theta)
    P, rows = G, []
    for t in range(C):
        keep, push = 1 - alpha[..., t, None], eta[..., t, None]
        p, P, a = push * p, push * P + theta[..., t, None] * unit[t], keep * a
        c, G = keep * c + p, keep * G + P
        rows.append((a, c, p, G, P))
    return [torch.stack(x, -2) for x in zip(*rows, strict=True)]


def rounded(
    q,
    k,
    v,
    theta,
    alpha,
    eta,
    weights,
    *,
    dtype,
    norm=None,
    residual=True,
    chunk_size=16,
    block=None,
):
    """The memory (tanh-GELU) in float64, chunk by chunk, rounded where a kernel has to.

    Only q, k, v, every operand of a matrix product and the stored output are rounded to `dtype`,
    and in the backward pass the same: gradients that are stored, operands of products. Gates are
    [B, T, H]; the state returned has weights and momentum, as of the last whole chunk. With `block`
    weights are made every so many tokens of a chunk, as where it is too long to be held.
    """

    def mm(a, b):
        return _Matmul.apply(a, b, dtype)

    def head(y, x):
        if norm is not None:
            weight, bias = (p[:, None] for p in norm)
            y = F.layer_norm(y, y.shape[-1:], eps=1e-6) * weight + bias
        return x + y if residual else y

    def act(z):
        return F.gelu(z, approximate="tanh")

    q, k, v = (_Stored.apply(x, dtype).transpose(1, 2) for x in (q, k, v))  # [B, H, T, D]
    theta, alpha, eta = (x.transpose(1, 2) for x in (theta, alpha, eta))
    W = [w.expand(len(q), *w.shape) for w in weights]
    S = [torch.zeros_like(w) for w in W]
    T, out, state = q.shape[2], [], (W, S)
    starts = [t for t in range(T) if t % chunk_size % (block or chunk_size) == 0]
    for start, stop in pairwise([*starts, T]):
        here = slice(start, stop)
        if start % chunk_size == 0:
            anchor = W
        a, c, p, G, P = _chunk_coefficients(*(x[..., here] for x in (theta, alpha, eta)))

        X, Z = [k[:, :, here]], []
        for w in anchor:
            Z.append(mm(X[-1], w))
            X.append(act(Z[-1]))
        loss = (head(Z[-1], X[0]) - v[:, :, here]).square().sum()
        D = torch.autograd.grad(loss, Z, create_graph=True)

        h = q[:, :, here]
        for layer, (w, s, x, d) in enumerate(zip(W, S, X, D, strict=False)):
            h = act(h) if layer else h
            h = a * mm(h, w) + c * mm(h, s) - mm(G * mm(h, x.mT), d)
        out.append(head(h, q[:, :, here]))

        a, c, p, G, P = (x[:, :, -1, :, None] for x in (a, c, p, G, P))
        W, S = (
            [a * w + c * s - mm(x.mT, G * d) for w, s, x, d in zip(W, S, X, D, strict=False)],
            [p * s - mm(x.mT, P * d) for s, x, d in zip(S, X, D, strict=False)],
        )
        if stop % chunk_size == 0:
            state = (W, S)
    o = _Stored.apply(torch.cat(out, 2).transpose(1, 2), dtype)
    return o, SimpleNamespace(weights=tuple(state[0]), momentum=tuple(state[1]))


def rounded_inputs(dtype, **sizes):
    """Inputs whose q, k, v are of `dtype` and the rest float32 or wider; the same in float64."""
    wide = torch.promote_types(dtype, torch.float32)

    def rounded_to(name, x, then=None):
        if isinstance(x, tuple):
            return tuple(rounded_to(name, part, then) for part in x)
        kind = dtype if name in ("q", "k", "v") else wide
        return None if x is None else x.to(kind).to(then or kind).requires_grad_()

    exact = make_inputs(**sizes, requires_grad=False)
    return (
        {name: rounded_to(name, x) for name, x in exact.items()},
        {name: rounded_to(name, x, torch.float64) for name, x in exact.items()},
    )


def assert_within_yardstick(name, actual, expected, yard, rms=1.25, largest=2.0):
    """Errors against float64: `actual`'s at most so many times the yardstick's."""
    error, cost = actual.double() - expected, yard.double() - expected
    for kind, factor, size in (
        ("RMS", rms, lambda x: x.square().mean().sqrt()),
        ("largest", largest, lambda x: x.abs().max()),
    ):
        found, limit = size(error), factor * size(cost)
        assert found <= limit, f"{name}: {kind} error {found:.2e}, bound {limit:.2e}"

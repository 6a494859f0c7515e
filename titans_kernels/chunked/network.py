"""The memory as a network: its activation, its output head, its loss, and their derivatives.

`f(x) = [x +] [LN](act(... act(x W_1) ...) W_L)`. Tensors are [R, n, width]: R is every sequence and
head, n tokens. What the chunked backend differentiates by hand is here once, in closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-6


def _gated(z: Tensor, u: Tensor, du: Tensor | float, ddu: Tensor | float, order: int):
    """z sigmoid(u(z)): SiLU and the tanh form of GELU are two choices of u."""
    s = torch.sigmoid(u)
    out = [z * s]
    if order >= 1:
        zt = out[0] * (1.0 - s)  # z s (1 - s)
        out.append(s + zt * du)
    if order >= 2:
        out.append(zt * ((1.0 - 2.0 * s) * (du * du) + ddu) + 2.0 * (s - s * s) * du)
    return tuple(out)


def _silu(z: Tensor, order: int):
    return _gated(z, z, 1.0, 0.0, order)


def _gelu_tanh(z: Tensor, order: int):
    c, b = 2.0 * math.sqrt(2.0 / math.pi), 0.044715
    zz = z * z
    u = z * (zz * (c * b) + c)
    return _gated(z, u, zz * (3.0 * c * b) + c, z * (6.0 * c * b), order)


def _gelu(z: Tensor, order: int):
    cdf = 0.5 + 0.5 * torch.erf(z * math.sqrt(0.5))
    out = [z * cdf]
    if order >= 1:
        density = torch.exp(-0.5 * z * z) * (1.0 / math.sqrt(2.0 * math.pi))
        out.append(cdf + z * density)
    if order >= 2:
        out.append(density * (2.0 - z * z))
    return tuple(out)


def _relu(z: Tensor, order: int):
    return (z.relu(), (z > 0).to(z), torch.zeros_like(z))[: order + 1]


def _identity(z: Tensor, order: int):
    return (z, torch.ones_like(z), torch.zeros_like(z))[: order + 1]


# name -> function of (z, order) giving the value and its derivatives up to that order
ACTIVATIONS: dict[str, Callable[[Tensor, int], tuple[Tensor, ...]]] = {
    "gelu_tanh": _gelu_tanh,
    "gelu": _gelu,
    "silu": _silu,
    "relu": _relu,
    "identity": _identity,
}


class Network(NamedTuple):
    """What the memory computes besides its matrices."""

    activation: str
    residual: bool
    norm: tuple[Tensor, Tensor] | None  # LayerNorm weight and bias, [R, 1, D] each

    def activate(self, z: Tensor, order: int = 0) -> tuple[Tensor, ...]:
        """The activation at z and its derivatives up to `order`."""
        return ACTIVATIONS[self.activation](z, order)


class NormGrad(NamedTuple):
    """Gradients of the LayerNorm's weight and bias, [R, D] each, added to in place."""

    weight: Tensor
    bias: Tensor


def _standardise(y: Tensor) -> tuple[Tensor, Tensor]:
    """(y - mean) r and r = 1 / std of every token."""
    centred = y - y.mean(-1, keepdim=True)
    r = torch.rsqrt(centred.square().mean(-1, keepdim=True) + EPS)
    return centred * r, r


def _project(u: Tensor, n: Tensor, r: Tensor) -> Tensor:
    """Jacobian of `_standardise`, times u. It is symmetric, so it is its own transpose."""
    return r * (u - u.mean(-1, keepdim=True) - n * (u * n).mean(-1, keepdim=True))


def output(y: Tensor, x: Tensor, network: Network) -> Tensor:
    """f(x) from the last matrix's product y."""
    if network.norm is not None:
        weight, bias = network.norm
        y = torch.addcmul(bias, _standardise(y)[0], weight)
    return x + y if network.residual else y


def output_backward(
    do: Tensor, y: Tensor, network: Network, grad: NormGrad | None
) -> tuple[Tensor, Tensor | None]:
    """`output`'s gradients of y and of x (None without a residual)."""
    dx = do if network.residual else None
    if network.norm is None or grad is None:
        return do, dx
    n, r = _standardise(y)
    grad.weight.add_((do * n).sum(-2))
    grad.bias.add_(do.sum(-2))
    return _project(do * network.norm[0], n, r), dx


def error(y: Tensor, k: Tensor, v: Tensor, network: Network) -> Tensor:
    """Gradient of the loss ||f(k) - v||^2 with respect to the last matrix's product y."""
    miss = output(y, k, network) - v
    if network.norm is None:
        return 2.0 * miss
    n, r = _standardise(y)
    return _project(2.0 * network.norm[0] * miss, n, r)


def error_backward(
    dd: Tensor, y: Tensor, k: Tensor, v: Tensor, network: Network, grad: NormGrad | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`error`'s gradients of y, of k (None without a residual) and of v."""
    if network.norm is None or grad is None:
        dmiss = 2.0 * dd
        return dmiss, dmiss if network.residual else None, -dmiss

    weight = network.norm[0]
    n, r = _standardise(y)
    miss = output(y, k, network) - v
    u = 2.0 * weight * miss
    d = _project(u, n, r)

    du = _project(dd, n, r)  # the Jacobian is symmetric
    dmiss = 2.0 * weight * du
    # d depends on y through n and r as well as through miss
    dn = weight * dmiss - r * (
        dd * (u * n).mean(-1, keepdim=True) + u * (dd * n).mean(-1, keepdim=True)
    )
    log_r = (dd * d).sum(-1, keepdim=True)  # r dL/dr
    dy = _project(dn, n, r) - log_r * r * n / y.shape[-1]
    grad.weight.add_((2.0 * miss * du + n * dmiss).sum(-2))
    grad.bias.add_(dmiss.sum(-2))
    return dy, dmiss if network.residual else None, -dmiss

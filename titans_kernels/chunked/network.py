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

from ..transforms import differentiable

EPS = 1e-6
Values = list[Tensor]  # a function's value and its first derivatives


def _silu(z: Tensor, order: int) -> Values:
    s = torch.sigmoid(z)
    values = [z * s]
    if order >= 1:
        ds = torch.addcmul(s, s, s, value=-1)  # sigmoid'(z)
        values.append(torch.addcmul(s, z, ds))
    if order >= 2:
        values.append(ds * (z * (1.0 - 2.0 * s) + 2.0))
    return values


def _gelu_tanh(z: Tensor, order: int) -> Values:
    """z sigmoid(u), u = c (z + b z^3): the tanh form, for 2 sigmoid(u) = 1 + tanh(u / 2)."""
    c, b = 2.0 * math.sqrt(2.0 / math.pi), 0.044715
    zz = z * z
    s = torch.sigmoid(torch.addcmul(c * z, zz, z, value=c * b))
    values = [z * s]
    if order >= 1:
        ds = torch.addcmul(s, s, s, value=-1)  # sigmoid'(u)
        du = zz * (3.0 * c * b) + c
        zdu = z * du
        values.append(torch.addcmul(s, ds, zdu))
    if order >= 2:  # z u'' = 2 (u' - c)
        values.append(ds * ((zdu * (1.0 - 2.0 * s) + 4.0) * du - 2.0 * c))
    return values


def _gelu(z: Tensor, order: int) -> Values:
    cdf = 0.5 + 0.5 * torch.erf(z * math.sqrt(0.5))
    values = [z * cdf]
    if order >= 1:
        density = torch.exp(-0.5 * z * z) * (1.0 / math.sqrt(2.0 * math.pi))
        values.append(torch.addcmul(cdf, z, density))
    if order >= 2:
        values.append(density * (2.0 - z * z))
    return values


def _relu(z: Tensor, order: int) -> Values:
    return [z.relu(), (z > 0).to(z), torch.zeros_like(z)][: order + 1]


def _identity(z: Tensor, order: int) -> Values:
    return [z, torch.ones_like(z), torch.zeros_like(z)][: order + 1]


# name -> function of (z, order) giving the value and its derivatives up to that order
ACTIVATIONS: dict[str, Callable[[Tensor, int], Values]] = {
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

    def activate(self, z: Tensor, order: int = 0) -> Values:
        """The activation at z and its derivatives up to `order`."""
        return ACTIVATIONS[self.activation](z, order)


class NormGrad(NamedTuple):
    """Gradients of the LayerNorm's weight and bias, [R, D] each, added to in place."""

    weight: Tensor
    bias: Tensor


class Standardised(NamedTuple):
    """LayerNorm's core: n = (y - mean) rstd of every token.

    torch's own kernels are one pass, but cannot be differentiated three times, as the operator's
    second derivatives need; under autograd the same is spelled out.
    """

    y: Tensor  # [R, n, D]
    n: Tensor  # [R, n, D]
    mean: Tensor  # [R, n, 1]
    rstd: Tensor  # [R, n, 1]

    @classmethod
    def of(cls, y: Tensor) -> Standardised:
        if not differentiable():
            return cls(y, *torch.native_layer_norm(y, y.shape[-1:], None, None, EPS))
        mean = y.mean(-1, keepdim=True)
        centred = y - mean
        rstd = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + EPS)
        return cls(y, centred * rstd, mean, rstd)

    def jacobian(self, u: Tensor) -> Tensor:
        """dn/dy times u: rstd (u - mean(u) - n mean(u n)). It is its own transpose."""
        if not differentiable():
            return torch.ops.aten.native_layer_norm_backward(
                u, self.y, u.shape[-1:], self.mean, self.rstd, None, None, (True, False, False)
            )[0]
        along = (u * self.n).mean(-1, keepdim=True)
        return self.rstd * torch.addcmul(u - u.mean(-1, keepdim=True), self.n, along, value=-1)


def output(y: Tensor, x: Tensor, network: Network) -> Tensor:
    """f(x) from the last matrix's product y."""
    return _output(y if network.norm is None else Standardised.of(y).n, x, network)


def _output(n: Tensor, x: Tensor, network: Network) -> Tensor:
    """f(x) from y, standardised where there is a norm."""
    if network.norm is not None:
        weight, bias = network.norm
        n = torch.addcmul(bias, n, weight)
    return x + n if network.residual else n


def output_backward(
    do: Tensor, y: Tensor, network: Network, grad: NormGrad | None
) -> tuple[Tensor, Tensor | None]:
    """`output`'s gradients of y and of x (None without a residual)."""
    dx = do if network.residual else None
    if network.norm is None or grad is None:
        return do, dx
    standard = Standardised.of(y)
    grad.weight.add_((do * standard.n).sum(-2))
    grad.bias.add_(do.sum(-2))
    return standard.jacobian(do * network.norm[0]), dx


def error(y: Tensor, k: Tensor, v: Tensor, network: Network) -> Tensor:
    """Gradient of the loss ||f(k) - v||^2 with respect to the last matrix's product y."""
    if network.norm is None:
        return 2.0 * (_output(y, k, network) - v)
    standard = Standardised.of(y)
    miss = _output(standard.n, k, network) - v
    return standard.jacobian(2.0 * network.norm[0] * miss)


def error_backward(
    dd: Tensor, y: Tensor, k: Tensor, v: Tensor, network: Network, grad: NormGrad | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`error`'s gradients of y, of k (None without a residual) and of v."""
    if network.norm is None or grad is None:
        dmiss = 2.0 * dd
        return dmiss, dmiss if network.residual else None, -dmiss

    standard, weight = Standardised.of(y), 2.0 * network.norm[0]
    n, r = standard.n, standard.rstd
    miss = _output(n, k, network) - v
    u, du = weight * miss, standard.jacobian(dd)
    dmiss = weight * du

    # The Jacobian that made d of u depends on y too, through n and through rstd.
    un, ddn = (u * n).mean(-1, keepdim=True), (dd * n).mean(-1, keepdim=True)
    dn = network.norm[0] * dmiss - r * (dd * un + u * ddn)
    stretch = (dd * standard.jacobian(u)).mean(-1, keepdim=True)  # of rstd, times rstd / D
    dy = standard.jacobian(dn) - stretch * r * n
    grad.weight.add_((2.0 * miss * du + n * dmiss).sum(-2))
    grad.bias.add_(dmiss.sum(-2))
    return dy, dmiss if network.residual else None, -dmiss

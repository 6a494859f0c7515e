"""The gates of a block of tokens as coefficients of the memory's linear recurrence.

Per memory layer, with `g_t` the surprise (the gradient of token t's loss):

    S_t = eta_t S_{t-1} - theta_t g_t            W_t = (1 - alpha_t) W_{t-1} + S_t

Over tokens 1..n this is linear in what the block started with, `(W_0, S_0)`, and in the surprises:

    S_t = M[t, 0] S_0 - sum_i M[t, i] g_i        W_t = a[t] W_0 + Q[t, 0] S_0 - sum_i Q[t, i] g_i

With `E[t, j] = eta_{j+1} ... eta_t` and `A[t, j] = (1 - alpha_{j+1}) ... (1 - alpha_t)`, both
lower triangular over 0..n, `M = E diag(1, theta)`, `a = A[:, 0]` and `Q = A M`, leaving out M's
row 0 (the momentum the block starts with is added to the weights only from token 1 on). Row t
holds the state after t tokens, so row 0 is the identity.

The products are taken as products: no logarithm, no quotient. Gates of exactly 0 and 1 therefore
have exact values and exact gradients. A token that is not `valid` is skipped: its row repeats the
row before it. This is the only code that knows the gates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Coefficients(NamedTuple):
    """What every token's weights and momentum are made of. n tokens, rows and columns 0..n."""

    a: Tensor  # [..., n + 1]         share of the block's first weights in W_t
    Q: Tensor  # [..., n + 1, n + 1]  W_t: column 0 multiplies S_0, column i >= 1 surprise i
    M: Tensor  # [..., n + 1, n + 1]  S_t: likewise


def _running_products(factor: Tensor) -> Tensor:
    """`out[t, j] = factor_{j+1} * ... * factor_t`, lower triangular, of [..., n]."""
    n = factor.shape[-1]
    after = torch.ones(n + 1, n + 1, dtype=torch.bool, device=factor.device).tril(-1)
    rows = torch.nn.functional.pad(factor, (1, 0), value=1.0).unsqueeze(-1)  # [..., n + 1, 1]
    return torch.where(after, rows, 1.0).cumprod(-2).tril()


def _running_products_backward(products: Tensor, d_products: Tensor) -> Tensor:
    """The factors' gradient: factor s splits a product in those before it and those after it."""
    after = products.mT @ d_products
    return (products[..., :-1, :] * after[..., 1:, :]).sum(-1)


def _moving(M: Tensor, valid: Tensor | None) -> Tensor:
    """The rows of M at which the weights move, those of (valid) tokens: [..., n, n + 1]."""
    return M[..., 1:, :] if valid is None else M[..., 1:, :] * valid.to(M).unsqueeze(-1)


def _skipping(
    theta: Tensor, alpha: Tensor, eta: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """E, A and the diagonal (1, theta), [..., 1, n + 1]. Invalid tokens change nothing."""
    factors = torch.stack([eta, 1.0 - alpha])
    if valid is not None:
        theta, factors = theta.masked_fill(~valid, 0.0), factors.masked_fill(~valid, 1.0)
    E, A = _running_products(factors)
    return E, A, torch.nn.functional.pad(theta, (1, 0), value=1.0).unsqueeze(-2)


def coefficients(
    theta: Tensor, alpha: Tensor, eta: Tensor, valid: Tensor | None = None
) -> Coefficients:
    """Gates of blocks of n tokens, [..., n], to the coefficients of every state inside them.

    Args:
        theta (Tensor): [..., n], inner learning rate, at least 0.
        alpha (Tensor): [..., n], forgetting, in [0, 1].
        eta (Tensor): [..., n], momentum, in [0, 1].
        valid (Tensor | None): [..., n] bool, broadcastable; tokens to take. None takes all.
    """
    E, A, rates = _skipping(theta, alpha, eta, valid)
    M = E * rates
    return Coefficients(A[..., 0], A[..., 1:] @ _moving(M, valid), M)


def coefficients_backward(
    theta: Tensor, alpha: Tensor, eta: Tensor, valid: Tensor | None, grad: Coefficients
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `coefficients`: those of (a, Q, M) to those of (theta, alpha, eta)."""
    E, A, rates = _skipping(theta, alpha, eta, valid)
    dA = torch.cat([grad.a.unsqueeze(-1), grad.Q @ _moving(E * rates, valid).mT], -1)
    dM = grad.M.clone()
    dM[..., 1:, :] += _moving(A.mT @ grad.Q, valid)

    dtheta = (dM * E).sum(-2)[..., 1:]
    deta = _running_products_backward(E, (dM * rates).tril())
    dalpha = -_running_products_backward(A, dA.tril())
    if valid is not None:
        dtheta, dalpha, deta = (x.masked_fill(~valid, 0.0) for x in (dtheta, dalpha, deta))
    return dtheta, dalpha, deta

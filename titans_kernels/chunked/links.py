"""The weights of a layer at a run of tokens, without ever making them.

A layer's state is [R, 2, d_in, d_out]: weights W and momentum S where a block starts, R every
sequence and head. With the inputs X and errors D of the block's n tokens so far, the weights at
token t are `a_t W + c_t S - sum_i G[t, i] X_i^T D_i`. So multiplying by them takes two products with
the state and an attention-like pair. `pull` multiplies by them, `push` by their transpose. Both are
halves of one form, linear in each of its arguments,

    F(h, d) = h (a W + c S) d^T - sum_i G_i (h . X_i) (d . D_i)

so each is the other's backward, and `form_backward` has all the gradients that remain.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Coefficients that C tokens read with; C = 1 where all tokens share them."""

    a: Tensor  # [R, C, 1]
    c: Tensor  # [R, C, 1]
    G: Tensor  # [R, C, n]


class Link(NamedTuple):
    """One layer's weights at a run of tokens. No rows: those of the block's start, no history."""

    state: Tensor  # [R, 2, d_in, d_out]
    rows: Rows | None = None
    X: Tensor | None = None  # [R, n, d_in]
    D: Tensor | None = None  # [R, n, d_out]


class LinkGrad(NamedTuple):
    """Where the gradients of a link are added, in place: views of the block's own."""

    state: Tensor  # [R, 2, d_in, d_out]
    X: Tensor  # [R, n, d_in]
    D: Tensor  # [R, n, d_out]
    a: Tensor  # [R, C]
    Q: Tensor  # [R, C, N + 1]: column 0 is c's, the next n are G's


class Pulled(NamedTuple):
    out: Tensor  # [R, C, d_out]
    hX: Tensor | None  # [R, C, n], h X^T


class Pushed(NamedTuple):
    out: Tensor  # [R, C, d_in]
    parts: Tensor | None  # [R, C, 2, d_in], d W^T and d S^T
    dD: Tensor | None  # [R, C, n], d D^T


def pull(h: Tensor, link: Link) -> Pulled:
    """h [R, C, d_in] times the weights."""
    if link.rows is None:
        return Pulled(torch.bmm(h, link.state[:, 0]), None)
    a, c, G = link.rows
    hX = torch.bmm(h, link.X.mT)
    out = torch.bmm(torch.cat([a * h, c * h], -1), link.state.flatten(1, 2))
    return Pulled(out.baddbmm_(G * hX, link.D, alpha=-1), hX)


def push(d: Tensor, link: Link) -> Pushed:
    """d [R, C, d_out] times the transposed weights."""
    if link.rows is None:
        return Pushed(torch.bmm(d, link.state[:, 0].mT), None, None)
    a, c, G = link.rows
    dD = torch.bmm(d, link.D.mT)
    parts = torch.bmm(d, link.state.flatten(1, 2).mT).unflatten(-1, (2, -1))
    out = torch.addcmul(a * parts[..., 0, :], c, parts[..., 1, :])
    return Pushed(out.baddbmm_(G * dD, link.X, alpha=-1), parts, dD)


def form_backward(
    h: Tensor, d: Tensor, link: Link, pulled: Pulled, pushed: Pushed, grad: LinkGrad
) -> None:
    """Add the gradients of F(h, d) but those of h and d, which are `push(d)` and `pull(h)`."""
    if link.rows is None:
        grad.state[:, 0].baddbmm_(h.mT, d)
        return
    a, c, G = link.rows
    n = link.X.shape[1]
    grad.state.flatten(1, 2).baddbmm_(torch.cat([a * h, c * h], -1).mT, d)
    grad.X.baddbmm_((G * pushed.dD).mT, h, alpha=-1)
    grad.D.baddbmm_((G * pulled.hX).mT, d, alpha=-1)
    dac = (pushed.parts * h.unsqueeze(-2)).sum(-1)  # [R, C, 2]
    dG = pulled.hX * pushed.dD
    if a.shape[1] < h.shape[1]:
        dac, dG = dac.sum(1, keepdim=True), dG.sum(1, keepdim=True)
    grad.a.add_(dac[..., 0])
    grad.Q[..., 0].add_(dac[..., 1])
    grad.Q[..., 1 : 1 + n].sub_(dG)

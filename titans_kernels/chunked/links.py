"""The weights of a layer at a run of tokens, without ever making them.

A layer's state is [R, 2, d_in, d_out]: weights W and momentum S where a block starts, R every
sequence and head. With the inputs X and errors D of the block's n tokens so far, the weights at
token t are `a_t W + c_t S - sum_i G[t, i] X_i^T D_i`. So multiplying by them takes two products
with the state and an attention-like pair. `pull` multiplies by them, `push` by their transpose.
Both are halves of one form, linear in each of its arguments,

    F(h, d) = h (a W + c S) d^T - sum_i G_i (h . X_i) (d . D_i)

so each is the other's backward, and `form_backward` has all the gradients that remain.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Coefficients that C tokens read with; C = 1 where all tokens share them."""

    ac: Tensor  # [R, C, 2]
    G: Tensor  # [R, C, n]


class History(NamedTuple):
    """What n tokens of the block did to a layer, and how much of it counts."""

    rows: Rows
    X: Tensor  # [R, n, d_in]
    D: Tensor  # [R, n, d_out]


class Apart(NamedTuple):
    """A state as it came, for one block that only reads it: concatenating would copy."""

    weights: Tensor  # [R, d_in, d_out]
    momentum: Tensor


class Link(NamedTuple):
    """One layer's weights at a run of tokens. No history: those that the block started with."""

    state: Tensor | Apart  # [R, 2, d_in, d_out]
    past: History | None = None


class LinkGrad(NamedTuple):
    """Where the gradients of a link are added, in place: views of the block's own."""

    state: Tensor
    past: History | None = None


class Pulled(NamedTuple):
    out: Tensor  # [R, C, d_out]
    hX: Tensor | None  # [R, C, n], h X^T


class Pushed(NamedTuple):
    out: Tensor  # [R, C, d_in]
    parts: Tensor | None  # [R, C, 2, d_in], d W^T and d S^T
    dD: Tensor | None  # [R, C, n], d D^T


def scaled(x: Tensor, by: Tensor) -> Tensor:
    """x [R, n, width] times two coefficients [R, n or 1, 2], concatenated: [R, n, 2 width]."""
    return (by.unsqueeze(-1) * x.unsqueeze(-2)).flatten(2)


def _weights(state: Tensor | Apart) -> Tensor:
    return state.weights if isinstance(state, Apart) else state[:, 0]


def pull(h: Tensor, link: Link) -> Pulled:
    """h [R, C, d_in] times the weights."""
    if link.past is None:
        return Pulled(torch.bmm(h, _weights(link.state)), None)
    (ac, G), X, D = link.past
    hX = torch.bmm(h, X.mT)
    if isinstance(link.state, Apart):
        a, c = ac.split(1, -1)
        out = torch.bmm(a * h, link.state.weights).baddbmm_(c * h, link.state.momentum)
    else:
        out = torch.bmm(scaled(h, ac), link.state.flatten(1, 2))
    return Pulled(out.baddbmm_(G * hX, D, alpha=-1), hX)


def push(d: Tensor, link: Link) -> Pushed:
    """d [R, C, d_out] times the transposed weights."""
    if link.past is None:
        return Pushed(torch.bmm(d, _weights(link.state).mT), None, None)
    (ac, G), X, D = link.past
    assert not isinstance(link.state, Apart)  # errors have a history behind whole chunks only
    dD = torch.bmm(d, D.mT)
    parts = torch.bmm(d, link.state.flatten(1, 2).mT).unflatten(-1, (2, -1))
    a, c = ac.unsqueeze(-1).unbind(-2)
    out = torch.addcmul(a * parts[..., 0, :], c, parts[..., 1, :])
    return Pushed(out.baddbmm_(G * dD, X, alpha=-1), parts, dD)


def form_backward(
    h: Tensor, d: Tensor, link: Link, pulled: Pulled, pushed: Pushed, grad: LinkGrad
) -> None:
    """Add the gradients of F(h, d) but those of h and d, which are `push(d)` and `pull(h)`."""
    if link.past is None:
        grad.state[:, 0].baddbmm_(h.mT, d)
        return
    (_, hX), (_, parts, dD) = pulled, pushed
    assert hX is not None and parts is not None and dD is not None and grad.past is not None
    ac, G = link.past.rows
    grad.state.flatten(1, 2).baddbmm_(scaled(h, ac).mT, d)
    grad.past.X.baddbmm_((G * dD).mT, h, alpha=-1)
    grad.past.D.baddbmm_((G * hX).mT, d, alpha=-1)
    dac = (parts * h.unsqueeze(-2)).sum(-1)  # [R, C, 2]
    dG = hX * dD
    if ac.shape[1] < h.shape[1]:
        dac, dG = dac.sum(1, keepdim=True), dG.sum(1, keepdim=True)
    grad.past.rows.ac.add_(dac)
    grad.past.rows.G.sub_(dG)

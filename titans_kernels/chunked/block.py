"""The three steps of a block of tokens, each with its derivative right below it.

`errors` learns from the block's keys, chunk after chunk; `read` answers its queries, all at once;
`advance` moves the state to the block's end. Lists are per memory layer, tensors [R, tokens, width]
with R every sequence and head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import network as net
from .links import Link, LinkGrad, Pulled, Pushed, Rows, form_backward, pull, push
from .network import Network, NormGrad


class BlockCoefficients(NamedTuple):
    """A block's coefficients (see coefficients.py), N tokens, of one layer or of all of them."""

    a: Tensor  # [R, N + 1]
    Q: Tensor  # [R, N + 1, N + 1]
    end_a: Tensor  # [R]         a, Q and M at the row of the state that the block hands on
    end_Q: Tensor  # [R, N + 1]
    end_M: Tensor  # [R, N + 1]

    def rows(self, first: int, stop: int, history: int) -> Rows:
        """What the states after `first` to `stop - 1` tokens are made of."""
        Q = self.Q[:, first:stop]
        return Rows(self.a[:, first:stop, None], Q[..., :1], Q[..., 1 : 1 + history])


class BlockGrad(NamedTuple):
    """Gradients of one layer of a block, added to in place. `coefficients` may be shared."""

    X: Tensor  # [R, N, d_in]
    D: Tensor  # [R, N, d_out]
    state: Tensor  # [R, 2, d_in, d_out], of the block's start
    coefficients: BlockCoefficients

    def link(self, first: int, stop: int, history: int, state: Tensor | None = None) -> LinkGrad:
        """The part of it that a link with `coefficients.rows(first, stop, history)` adds to."""
        a, Q = self.coefficients.a[:, first:stop], self.coefficients.Q[:, first:stop]
        state = self.state if state is None else state
        return LinkGrad(state, self.X[:, :history], self.D[:, :history], a, Q)


# ---------------------------------------------------------------------------------------- errors


class Chunk(NamedTuple):
    """What one chunk of keys left behind."""

    links: list[Link]
    k: Tensor  # [R, C, D]
    v: Tensor  # [R, C, D]
    y: Tensor  # [R, C, D], the last matrix's product
    x: list[Tensor]  # [R, C, d_in], inputs
    d: list[Tensor]  # [R, C, d_out], errors
    slopes: list[list[Tensor]]  # the activation's derivatives between the layers
    pulled: list[Pulled]  # of the inputs
    pushed: list[Pushed]  # of the errors, from the second layer on


def _past(chunks: list[Chunk], layer: int) -> tuple[Tensor, Tensor]:
    """Inputs and errors of a layer over the chunks so far: [R, n, d_in], [R, n, d_out]."""
    if len(chunks) == 1:
        return chunks[0].x[layer], chunks[0].d[layer]
    return torch.cat([c.x[layer] for c in chunks], 1), torch.cat([c.d[layer] for c in chunks], 1)


def errors(
    k: Tensor,
    v: Tensor,
    state: list[Tensor],
    coefficients: list[BlockCoefficients],
    count: int,
    network: Network,
    order: int,
) -> list[Chunk]:
    """Inputs and errors of every layer for the keys of a block, chunk after chunk.

    Args:
        k, v (Tensor): [R, N, D], `count` chunks of them.
        state (list): [R, 2, d_in, d_out], where the block's first chunk is anchored.
        order (int): derivatives of the activation to keep: 1, or 2 for `errors_backward`.
    """
    size, depth = k.shape[1] // count, len(state)
    chunks: list[Chunk] = []
    for i, (kc, vc) in enumerate(zip(k.split(size, 1), v.split(size, 1), strict=True)):
        links = [Link(state[layer]) for layer in range(depth)]
        if chunks:  # anchored in mid-block, at the state after i * size tokens
            at = i * size
            links = [
                Link(state[n], coefficients[n].rows(at, at + 1, at), *_past(chunks, n))
                for n in range(depth)
            ]

        x, slopes, pulled = [kc], [], []
        for layer in range(depth):
            pulled.append(pull(x[layer], links[layer]))
            if layer < depth - 1:
                h, *slope = network.activate(pulled[layer].out, order)
                x.append(h)
                slopes.append(slope)

        d, pushed = [net.error(pulled[-1].out, kc, vc, network)], []
        for layer in range(depth - 1, 0, -1):
            pushed.insert(0, push(d[0], links[layer]))
            d.insert(0, pushed[0].out * slopes[layer - 1][0])
        chunks.append(Chunk(links, kc, vc, pulled[-1].out, x, d, slopes, pulled, pushed))
    return chunks


def errors_backward(
    chunks: list[Chunk],
    network: Network,
    grads: list[BlockGrad],
    anchor_grads: list[Tensor],
    norm_grad: NormGrad | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of k and v, from those of X and D in `grads`, the last chunk first.

    `anchor_grads` receives those of the state that the first chunk is anchored at.
    """
    size, depth = chunks[0].k.shape[1], len(grads)
    dks: list[Tensor] = []
    dvs: list[Tensor] = []
    for i in range(len(chunks) - 1, -1, -1):
        chunk, at = chunks[i], i * size
        here = slice(at, at + size)
        link_grads = [
            grads[n].link(at, at + 1, at, None if i else anchor_grads[n]) for n in range(depth)
        ]

        # Up through the errors: the error of a layer was made from that of the layer above.
        curved = []
        dd = grads[0].D[:, here]
        for layer in range(1, depth):
            link, pushed = chunk.links[layer], chunk.pushed[layer - 1]
            slope, curvature = chunk.slopes[layer - 1]
            de = dd * slope
            curved.append(dd * pushed.out * curvature)
            pulled = pull(de, link)
            form_backward(de, chunk.d[layer], link, pulled, pushed, link_grads[layer])
            dd = grads[layer].D[:, here] + pulled.out

        # Down through the inputs, as in any network.
        dz, dk, dv = net.error_backward(dd, chunk.y, chunk.k, chunk.v, network, norm_grad)
        for layer in range(depth - 1, -1, -1):
            link = chunk.links[layer]
            pushed = push(dz, link)
            form_backward(chunk.x[layer], dz, link, chunk.pulled[layer], pushed, link_grads[layer])
            dx = grads[layer].X[:, here] + pushed.out
            if layer:
                dz = torch.addcmul(curved[layer - 1], dx, chunk.slopes[layer - 1][0])
        dks.insert(0, dx if dk is None else dx + dk)
        dvs.insert(0, dv)
    return torch.cat(dks, 1), torch.cat(dvs, 1)


# ------------------------------------------------------------------------------------------ read


def _read_links(
    state: list[Tensor],
    X: list[Tensor],
    D: list[Tensor],
    coefficients: list[BlockCoefficients],
) -> list[Link]:
    N = X[0].shape[1]
    return [
        Link(*parts)
        for parts in zip(state, [c.rows(1, N + 1, N) for c in coefficients], X, D, strict=True)
    ]


def read(
    q: Tensor,
    state: list[Tensor],
    X: list[Tensor],
    D: list[Tensor],
    coefficients: list[BlockCoefficients],
    network: Network,
) -> Tensor:
    """Answers [R, N, D] to queries: each is read with the weights right after its own token."""
    h = q
    for layer, link in enumerate(_read_links(state, X, D, coefficients)):
        y = pull(h, link).out
        if layer < len(state) - 1:
            (h,) = network.activate(y)
    return net.output(y, q, network)


def read_backward(
    do: Tensor,
    q: Tensor,
    state: list[Tensor],
    X: list[Tensor],
    D: list[Tensor],
    coefficients: list[BlockCoefficients],
    network: Network,
    grads: list[BlockGrad],
    norm_grad: NormGrad | None,
) -> Tensor:
    """The gradient of q; those of the rest are added to `grads` and `norm_grad`."""
    links, depth, N = _read_links(state, X, D, coefficients), len(state), q.shape[1]
    x, slopes, pulled = [q], [], []
    for layer, link in enumerate(links):
        pulled.append(pull(x[layer], link))
        if layer < depth - 1:
            h, slope = network.activate(pulled[layer].out, 1)
            x.append(h)
            slopes.append(slope)

    dz, dq = net.output_backward(do, pulled[-1].out, network, norm_grad)
    for layer in range(depth - 1, -1, -1):
        pushed = push(dz, links[layer])
        grad = grads[layer].link(1, N + 1, N)
        form_backward(x[layer], dz, links[layer], pulled[layer], pushed, grad)
        if layer:
            dz = pushed.out * slopes[layer - 1]
    return pushed.out if dq is None else pushed.out + dq


# --------------------------------------------------------------------------------------- advance


def _scaled(x: Tensor, by: BlockCoefficients) -> Tensor:
    """x [R, N, width] weighted for the new weights and for the new momentum, [R, N, 2 width]."""
    return torch.cat([by.end_Q[:, 1:, None] * x, by.end_M[:, 1:, None] * x], -1)


def advance(state: Tensor, X: Tensor, D: Tensor, by: BlockCoefficients) -> Tensor:
    """The state of one layer at the block's end: W' = a W + c S - X^T (G * D), S' = p S - ..."""
    keep = torch.stack([by.end_a, by.end_M[:, 0]], 1)[..., None, None]
    out = state * keep
    out[:, 0].addcmul_(by.end_Q[:, 0, None, None], state[:, 1])
    out.flatten(1, 2).baddbmm_(_scaled(X, by).mT, D, alpha=-1)
    return out


def advance_backward(
    dout: Tensor, state: Tensor, X: Tensor, D: Tensor, by: BlockCoefficients, grad: BlockGrad
) -> None:
    """Add the gradients of `advance` to `grad`."""
    (dW, dS), (W, S) = dout.unbind(1), state.unbind(1)
    to = grad.coefficients
    to.end_a.add_((W * dW).sum((-2, -1)))
    to.end_Q[:, 0].add_((S * dW).sum((-2, -1)))
    to.end_M[:, 0].add_((S * dS).sum((-2, -1)))

    grad.state[:, 0].addcmul_(by.end_a[:, None, None], dW)
    grad.state[:, 1].addcmul_(by.end_Q[:, 0, None, None], dW)
    grad.state[:, 1].addcmul_(by.end_M[:, 0, None, None], dS)

    grad.D.baddbmm_(_scaled(X, by), dout.flatten(1, 2), alpha=-1)
    parts = torch.bmm(D, dout.flatten(1, 2).mT).unflatten(-1, (2, -1))  # [R, N, 2, d_in]
    grad.X.addcmul_(by.end_Q[:, 1:, None], parts[..., 0, :], value=-1)
    grad.X.addcmul_(by.end_M[:, 1:, None], parts[..., 1, :], value=-1)
    dGP = (parts * X.unsqueeze(-2)).sum(-1)
    to.end_Q[:, 1:].sub_(dGP[..., 0])
    to.end_M[:, 1:].sub_(dGP[..., 1])

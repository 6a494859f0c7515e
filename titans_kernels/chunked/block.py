"""The three steps of a block of tokens, each with its derivative right below it.

`errors` goes through the block's keys, chunk after chunk; `read` takes its queries, all at once;
`advance` moves the state to the block's end. Lists are per memory layer, tensors [R, tokens, width]
with R every sequence and head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import network as net
from .links import (
    Apart,
    History,
    Link,
    LinkGrad,
    Pulled,
    Pushed,
    Rows,
    form_backward,
    pull,
    push,
    scaled,
)
from .network import Network, NormGrad


class BlockCoefficients(NamedTuple):
    """A layer's coefficients (see coefficients.py) in a block of N tokens; or their gradients."""

    ac: Tensor  # [R, N + 1, 2]  a and c of the state after 0..N tokens
    G: Tensor  # [R, N + 1, N]
    keep: Tensor  # [R, 2, 2]  what the block hands on: of (W, S) at its start,
    learn: Tensor  # [R, N, 2]  and of its tokens' surprises

    def rows(self, first: int, stop: int, history: int) -> Rows:
        """What the states after `first` to `stop - 1` tokens are made of."""
        return Rows(self.ac[:, first:stop], self.G[:, first:stop, :history])


class BlockGrad(NamedTuple):
    """Gradients of one layer of a block, added to in place. Layers may share coefficients."""

    X: Tensor  # [R, N, d_in]
    D: Tensor  # [R, N, d_out]
    state: Tensor  # [R, 2, d_in, d_out], of the block's start
    coefficients: BlockCoefficients

    def link(self, first: int, stop: int, history: int) -> LinkGrad:
        """The part of it that a link with `coefficients.rows(first, stop, history)` adds to."""
        rows = self.coefficients.rows(first, stop, history)
        return LinkGrad(self.state, History(rows, self.X[:, :history], self.D[:, :history]))


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
    state: Sequence[Tensor | Apart],
    coefficients: list[BlockCoefficients],
    count: int,
    network: Network,
    order: int,
) -> list[Chunk]:
    """Inputs and errors of every layer for the keys of a block, chunk after chunk.

    Args:
        k, v (Tensor): [R, N, D], `count` chunks of them.
        state (Sequence): [R, 2, d_in, d_out], where the block's first chunk is anchored.
        order (int): derivatives of the activation to keep: 1, or 2 for `errors_backward`.
    """
    size, depth = k.shape[1] // count, len(state)
    chunks: list[Chunk] = []
    for i, (kc, vc) in enumerate(zip(k.split(size, 1), v.split(size, 1), strict=True)):
        links = [Link(state[layer]) for layer in range(depth)]
        if chunks:  # anchored in mid-block, at the state after i * size tokens
            at = i * size
            links = [
                Link(state[n], History(by.rows(at, at + 1, at), *_past(chunks, n)))
                for n, by in enumerate(coefficients)
            ]

        x, slopes, pulled = [kc], [], list[Pulled]()
        for layer in range(depth):
            pulled.append(pull(x[layer], links[layer]))
            if layer < depth - 1:
                h, *slope = network.activate(pulled[layer].out, order)
                x.append(h)
                slopes.append(slope)

        d, pushed = [net.error(pulled[-1].out, kc, vc, network)], list[Pushed]()
        for layer in range(depth - 1, 0, -1):
            pushed.insert(0, push(d[0], links[layer]))
            d.insert(0, pushed[0].out * slopes[layer - 1][0])
        chunks.append(Chunk(links, kc, vc, pulled[-1].out, x, d, slopes, pulled, pushed))
    return chunks


def chunk_grads(
    grads: list[BlockGrad], anchor_grads: list[Tensor], chunk: int, size: int
) -> list[LinkGrad]:
    """Of every layer's weights at the start of a chunk of the block; the first one's apart."""
    at = chunk * size
    links = [grad.link(at, at + 1, at) for grad in grads]
    if chunk:
        return links
    return [link._replace(state=x) for link, x in zip(links, anchor_grads, strict=True)]


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
        link_grads = chunk_grads(grads, anchor_grads, i, size)

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


def read_links(
    state: Sequence[Tensor | Apart],
    X: list[Tensor],
    D: list[Tensor],
    coefficients: list[BlockCoefficients],
    first_query: int,
) -> list[Link]:
    """The weights of every layer right after each of the block's tokens from `first_query` on."""
    N = X[0].shape[1]
    return [
        Link(layer, History(by.rows(first_query + 1, N + 1, N), x, d))
        for layer, by, x, d in zip(state, coefficients, X, D, strict=True)
    ]


def read(q: Tensor, links: list[Link], network: Network) -> Tensor:
    """Outputs [R, n, D] of queries."""
    h = q
    for layer, link in enumerate(links):
        y = pull(h, link).out
        if layer < len(links) - 1:
            (h,) = network.activate(y)
    return net.output(y, q, network)


def read_backward(
    do: Tensor,
    q: Tensor,
    links: list[Link],
    network: Network,
    grads: list[LinkGrad],
    norm_grad: NormGrad | None,
) -> Tensor:
    """The gradient of q; those of the rest are added to `grads` and `norm_grad`."""
    depth = len(links)
    x, slopes, pulled = [q], [], list[Pulled]()
    for layer, link in enumerate(links):
        pulled.append(pull(x[layer], link))
        if layer < depth - 1:
            h, slope = network.activate(pulled[layer].out, 1)
            x.append(h)
            slopes.append(slope)

    dz, dq = net.output_backward(do, pulled[-1].out, network, norm_grad)
    for layer in range(depth - 1, -1, -1):
        pushed = push(dz, links[layer])
        form_backward(x[layer], dz, links[layer], pulled[layer], pushed, grads[layer])
        if layer:
            dz = pushed.out * slopes[layer - 1]
    return pushed.out if dq is None else pushed.out + dq


# --------------------------------------------------------------------------------------- advance


def advance(
    state: Tensor, X: Tensor, D: Tensor, by: BlockCoefficients, out: Tensor | None = None
) -> Tensor:
    """The state of one layer at the block's end: (W, S)' = keep (W, S) - (learn * X)^T D."""
    flat = None if out is None else out.flatten(2)
    out = torch.bmm(by.keep, state.flatten(2), out=flat).view(state.shape)
    out.flatten(1, 2).baddbmm_(scaled(X, by.learn).mT, D, alpha=-1)
    return out


def advance_backward(
    dout: Tensor, state: Tensor, X: Tensor, D: Tensor, by: BlockCoefficients, grad: BlockGrad
) -> None:
    """Gradients of `advance`: the first to write to `grad`; coefficients' are added."""
    torch.bmm(by.keep.mT, dout.flatten(2), out=grad.state.flatten(2))
    grad.coefficients.keep.baddbmm_(dout.flatten(2), state.flatten(2).mT)

    torch.baddbmm(grad.D, scaled(X, by.learn), dout.flatten(1, 2), beta=0, alpha=-1, out=grad.D)
    parts = torch.bmm(D, dout.flatten(1, 2).mT).unflatten(-1, (2, -1))  # [R, N, 2, d_in]
    of_W, of_S = by.learn.neg().unsqueeze(-1).unbind(-2)
    torch.mul(parts[..., 0, :], of_W, out=grad.X)
    grad.X.addcmul_(parts[..., 1, :], of_S)
    grad.coefficients.learn.sub_((parts * X.unsqueeze(-2)).sum(-1))

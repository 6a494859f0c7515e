"""Launchers of the backward pass, as in `launch`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .coefficients_backward import coefficients_backward_kernel
from .inputs_backward import inputs_backward_kernel
from .launch import Problem, Scratch, Tokens
from .retrieve_backward import retrieve_backward_kernel
from .scan_backward import scan_backward_kernel


class TokenGrad(NamedTuple):
    """Gradients of tokens, in their dtypes; zero where no sequence has one."""

    q: Tensor
    k: Tensor
    v: Tensor
    theta: Tensor
    alpha: Tensor
    eta: Tensor


class StateGrad(NamedTuple):
    """Gradient of the state, in and out; the anchor's is another's where chunks span blocks."""

    weights: list[Tensor]  # per layer [N, H, d_in, d_out]
    momentum: list[Tensor]
    weights_anchor: list[Tensor]
    momentum_anchor: list[Tensor]


class GroupGrad(NamedTuple):
    """Gradients that passes hand each other, of one group of blocks."""

    a: Tensor  # [slots, H, L, BT]
    c: Tensor
    G: Tensor  # [slots, H, L, BT, BT]
    a_key: Tensor  # [slots, H, BT], of what keys read the first layer with
    c_key: Tensor
    G_key: Tensor  # [slots, H, BT, BT]
    end: Tensor  # [slots, H, L, 4 + 2 BT]
    x: tuple[Tensor, ...]  # per layer [slots, H, BT, d_in]
    d: tuple[Tensor, ...]  # per layer [slots, H, BT, d_out], of errors, then of keys' products
    e: Tensor  # [slots, H, BT, hidden], of errors behind the activation
    norm: Tensor  # [slots, H, 2, D], of queries


def allocate(scratch: Scratch) -> GroupGrad:
    a, c, G, new = scratch.a, scratch.c, scratch.G, torch.empty_like
    return GroupGrad(
        a=new(a),
        c=new(c),
        G=new(G),
        a_key=new(a[:, :, 0]),
        c_key=new(c[:, :, 0]),
        G_key=new(G[:, :, 0]),
        end=new(scratch.end),
        x=(new(scratch.d[-1]), *map(new, scratch.d[:-1])),
        d=tuple(map(new, scratch.d)),
        e=new(scratch.x),
        norm=a.new_empty(*a.shape[:2], 2, scratch.d[-1].shape[-1]),
    )


def _sizes(tokens: Tokens, scratch: Scratch, problem: Problem) -> dict[str, object]:
    hidden = scratch.weights[0].shape[-1]
    sizes = problem.sizes(tokens, hidden)
    return dict(
        hidden=hidden, width=tokens.k.shape[-1], BR=min(sizes["BD"], problem.tile.rows), **sizes
    )


def retrieve_backward(
    do: Tensor,
    tokens: Tokens,
    scratch: Scratch,
    grad: GroupGrad,
    first_block: int,
    problem: Problem,
) -> None:
    trace = scratch.trace
    assert trace is not None
    retrieve_backward_kernel[scratch.a.shape[:2]](
        p_h=trace.query_h,
        p_x=scratch.x,
        p_d2=scratch.d[-1],
        p_W2=scratch.weights[-1],
        p_S2=scratch.momentum[-1],
        p_a=scratch.a,
        p_c=scratch.c,
        p_G=scratch.G,
        p_parts=trace.query_parts,
        p_norm=scratch.a if problem.norm is None else problem.norm,
        p_do=do,
        p_gz=trace.query_z,
        p_gy=trace.query_y,
        p_dx2=grad.x[-1],
        p_dd2=grad.d[-1],
        p_da=grad.a,
        p_dc=grad.c,
        p_dG=grad.G,
        p_dnorm=grad.norm,
        p_bounds=tokens.bounds,
        p_tail=tokens.tail,
        p_ask=tokens.ask,
        group=first_block,
        **_sizes(tokens, scratch, problem),
        **problem.options(len(scratch.d)),
        **problem.tile.retrieve_backward.options(),
    )


def scan_backward(
    q: Tensor,
    tokens: Tokens,
    scratch: Scratch,
    anchor: list[Tensor],
    grad: GroupGrad,
    state: StateGrad,
    dv: Tensor,
    dnorm: Tensor,
    first_block: int,
    problem: Problem,
) -> None:
    """Walk back over one group; `state` and `dnorm` [N, H, 2, D] go on in place.

    `anchor` are the weights, in q's dtype, that a chunk begun in an earlier group began with.
    """
    trace = scratch.trace
    assert trace is not None
    N, H = state.weights[0].shape[:2]
    chunk = problem.chunk_size if problem.blocks.chunks > 1 else problem.tile.block
    scan_backward_kernel[(N, H)](
        p_q=q,
        p_k=tokens.k,
        p_v=tokens.v,
        p_a=scratch.a,
        p_c=scratch.c,
        p_G=scratch.G,
        p_end=scratch.end,
        p_norm=scratch.a if problem.norm is None else problem.norm,
        p_W1_exact=trace.weights[0],
        p_S1_exact=trace.momentum[0],
        p_W2_exact=trace.weights[-1],
        p_S2_exact=trace.momentum[-1],
        p_W2=scratch.weights[-1],
        p_S2=scratch.momentum[-1],
        p_W2_anchor=anchor[-1],
        p_z=scratch.z,
        p_x=scratch.x,
        p_e=trace.e,
        p_y=trace.y,
        p_d1=scratch.d[0],
        p_d2=scratch.d[-1],
        p_h=trace.query_h,
        p_gz=trace.query_z if len(scratch.d) > 1 else trace.query_y,
        p_gy=trace.query_y,
        p_dW1=state.weights[0],
        p_dS1=state.momentum[0],
        p_dW2=state.weights[-1],
        p_dS2=state.momentum[-1],
        p_dW1_anchor=state.weights_anchor[0],
        p_dS1_anchor=state.momentum_anchor[0],
        p_dW2_anchor=state.weights_anchor[-1],
        p_dS2_anchor=state.momentum_anchor[-1],
        p_de=grad.e,
        p_dx1=grad.x[0],
        p_dx2=grad.x[-1],
        p_dd1=grad.d[0],
        p_dd2=grad.d[-1],
        p_dv=dv,
        p_da=grad.a,
        p_dc=grad.c,
        p_dG=grad.G,
        p_dend=grad.end,
        p_dnorm=dnorm,
        p_bounds=tokens.bounds,
        p_tail=tokens.tail,
        p_ask=tokens.ask,
        group=first_block,
        blocks=problem.group,
        BC=max(16, triton.next_power_of_2(chunk)),
        **_sizes(tokens, scratch, problem),
        **problem.options(len(scratch.d)),
        **problem.tile.scan_backward.options(),
    )


def queries_backward(
    q: Tensor,
    do: Tensor,
    tokens: Tokens,
    scratch: Scratch,
    anchor: list[Tensor],
    grad: GroupGrad,
    dq: Tensor,
    first_block: int,
    problem: Problem,
) -> None:
    """After `retrieve_backward`."""
    trace, depth = scratch.trace, len(scratch.d)
    assert trace is not None
    _inputs_backward(
        tokens,
        scratch,
        anchor,
        grad,
        first_block,
        problem,
        p_h=q,
        p_g=trace.query_z if depth > 1 else trace.query_y,
        p_do=do,
        p_dh=dq,
        p_da=grad.a,
        p_dc=grad.c,
        p_dG=grad.G,
        KEYS=False,
        LAST=depth == 1,
        SHARED=depth > 1 and scratch.a.shape[2] == 1,
    )


def keys_backward(
    tokens: Tokens,
    scratch: Scratch,
    anchor: list[Tensor],
    grad: GroupGrad,
    dk: Tensor,
    first_block: int,
    problem: Problem,
) -> None:
    """After `scan_backward`."""
    _inputs_backward(
        tokens,
        scratch,
        anchor,
        grad,
        first_block,
        problem,
        p_h=tokens.k,
        p_g=grad.d[0],
        p_do=tokens.k,
        p_dh=dk,
        p_da=grad.a_key,
        p_dc=grad.c_key,
        p_dG=grad.G_key,
        KEYS=True,
        LAST=False,
        SHARED=False,
    )


def _inputs_backward(
    tokens: Tokens,
    scratch: Scratch,
    anchor: list[Tensor],
    grad: GroupGrad,
    first_block: int,
    problem: Problem,
    **reader: object,
) -> None:
    options = problem.options(len(scratch.d))
    inputs_backward_kernel[scratch.a.shape[:2]](
        p_k=tokens.k,
        p_d1=scratch.d[0],
        p_W1=scratch.weights[0],
        p_S1=scratch.momentum[0],
        p_W1_anchor=anchor[0],
        p_a=scratch.a,
        p_c=scratch.c,
        p_G=scratch.G,
        p_dd1=grad.d[0],
        p_dx1=grad.x[0],
        p_bounds=tokens.bounds,
        p_tail=tokens.tail,
        p_ask=tokens.ask,
        group=first_block,
        **reader,
        **_sizes(tokens, scratch, problem),
        **{name: options[name] for name in ("RESIDUAL", "PRECISION")},
        **problem.tile.inputs_backward.options(),
    )


def coefficients_backward(
    tokens: Tokens,
    scratch: Scratch,
    grad: GroupGrad,
    dgates: tuple[Tensor, Tensor, Tensor],
    first_block: int,
    problem: Problem,
) -> None:
    trace = scratch.trace
    assert trace is not None
    slots, H, L, BT = scratch.a.shape
    coefficients_backward_kernel[(slots, H, L)](
        p_alpha=tokens.alpha,
        p_eta=tokens.eta,
        p_a=scratch.a,
        p_c=scratch.c,
        p_G=scratch.G,
        p_p=trace.p,
        p_P=trace.P,
        p_da=grad.a,
        p_dc=grad.c,
        p_dG=grad.G,
        p_da_key=grad.a_key,
        p_dc_key=grad.c_key,
        p_dG_key=grad.G_key,
        p_dend=grad.end,
        p_dtheta=dgates[0],
        p_dalpha=dgates[1],
        p_deta=dgates[2],
        p_bounds=tokens.bounds,
        group=first_block,
        BLOCKS=problem.group,
        H=H,
        L=L,
        CHUNK=problem.chunk_size,
        TOKENS=problem.blocks.tokens,
        SPAN=problem.blocks.span,
        BT=BT,
        **problem.tile.coefficients.options(),
    )

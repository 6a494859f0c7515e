"""Launchers of the backward pass, as in `launch`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .coefficients_backward import coefficients_backward_kernel
from .inputs_backward import inputs_backward_kernel
from .launch import Problem, Scratch, memory_of, norm_or
from .records import CoefficientGrad, Grad, LayerGrad, Queries, TokenGrad, Tokens
from .retrieve_backward import retrieve_backward_kernel
from .scan_backward import scan_backward_kernel


def allocate(
    scratch: Scratch,
    token: TokenGrad,
    state: Sequence[Tensor],
    anchor: Sequence[Tensor],
    read: str = "token",
) -> Grad:
    """Gradients of a group, with those of tokens and of the running state, updated in place.

    `state` are those of weights, then of momenta, [N, H, d_in, d_out] each; where chunks span
    blocks, `anchor` are those of what an open chunk started with.
    """
    a, c, G, end = scratch.coefficient[:4]
    depth, new = len(scratch.layers), torch.empty_like
    H, D = a.shape[1], scratch.layers[-1].d.shape[-1]
    if read == "token":
        keys = new(a[:, :, 0]), new(c[:, :, 0]), new(G[:, :, 0])
    else:
        keys = new(a), new(c), new(G)
    coefficient = CoefficientGrad(new(a), new(c), new(G), new(end), *keys)
    layers = []
    for i_l, layer in enumerate(scratch.layers):
        layers.append(
            LayerGrad(
                W=state[i_l],
                S=state[depth + i_l],
                W_anchor=anchor[i_l],
                S_anchor=anchor[depth + i_l],
                x=new(layer.e if i_l else scratch.layers[-1].d),
                d=new(layer.d),
                e=new(layer.x),
            )
        )
    norm, norm_keys = a.new_empty(len(a), H, 2, D), a.new_zeros(len(state[0]), H, 2, D)
    return Grad(token, coefficient, tuple(layers), norm, norm_keys)


def _arguments(
    query: Queries, token: Tokens, scratch: Scratch, grad: Grad, first_block: int, problem: Problem
) -> dict[str, Any]:
    """What every backward pass over layers takes."""
    return memory_of(token, scratch, problem) | dict(
        query=query,
        query_layers=scratch.query_layers,
        grad=grad,
        group=first_block,
        width=token.k.shape[2],
    )


def retrieve_backward(
    query: Queries, token: Tokens, scratch: Scratch, grad: Grad, first_block: int, problem: Problem
) -> None:
    N, H = len(token.bounds), token.k.shape[1]
    retrieve_backward_kernel[(N, scratch.blocks, H)](
        **_arguments(query, token, scratch, grad, first_block, problem),
        p_norm=norm_or(problem.norm, scratch.coefficient.a),
        **problem.tile.retrieve_backward.options(),
    )


def scan_backward(
    query: Queries, token: Tokens, scratch: Scratch, grad: Grad, first_block: int, problem: Problem
) -> None:
    """Walk back over one group."""
    N, H = len(token.bounds), token.k.shape[1]
    if problem.read == "chunk":  # else there is what queries give
        for rows in grad.coefficient[:3]:
            rows.zero_()
    scan_backward_kernel[(N, H)](
        **_arguments(query, token, scratch, grad, first_block, problem),
        p_norm=norm_or(problem.norm, scratch.coefficient.a),
        blocks=scratch.blocks,
        **problem.tile.scan_backward.options(),
    )


def inputs_backward(
    query: Queries,
    token: Tokens,
    scratch: Scratch,
    grad: Grad,
    first_block: int,
    problem: Problem,
    keys: bool,
) -> None:
    """Of queries after `retrieve_backward`, of keys after `scan_backward`."""
    N, H = len(token.bounds), token.k.shape[1]
    inputs_backward_kernel[(N, scratch.blocks, H)](
        **_arguments(query, token, scratch, grad, first_block, problem),
        KEYS=keys,
        **problem.tile.inputs_backward.options(),
    )


def coefficients_backward(
    token: Tokens, scratch: Scratch, grad: Grad, first_block: int, problem: Problem
) -> None:
    H, L = token.theta.shape[1:]
    coefficients_backward_kernel[(len(token.bounds), scratch.blocks, H * L)](
        token=token,
        coefficient=scratch.coefficient,
        grad=grad.coefficient,
        token_grad=grad.token,
        group=first_block,
        sizes=problem.block_sizes(token),
        READ=problem.read,
        **problem.tile.coefficients.options(),
    )

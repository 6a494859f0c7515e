"""The walk as an autograd function: first derivatives by hand, higher ones by autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .layout import Layout
from .scan import Options, run, run_backward
from .span import Inputs

INPUTS = len(Inputs._fields)


class ChunkedMemory(torch.autograd.Function):
    """(layout, options, *inputs, *state) -> (o, *final state)."""

    @staticmethod
    def forward(ctx: Any, layout: Layout, options: Options, *tensors: Any) -> Any:
        inputs, state = Inputs(*tensors[:INPUTS]), list(tensors[INPUTS:])
        result = run(inputs, state, layout, options, keep=any(ctx.needs_input_grad))
        ctx.layout, ctx.options, ctx.depth = layout, options, len(state)
        # A checkpoint is two lists of states, most often the same one.
        kept: list[Tensor] = []
        ctx.shared = [anchor is running for anchor, running in result.checkpoints]
        for (anchor, running), one in zip(result.checkpoints, ctx.shared, strict=True):
            kept += anchor if one else [*anchor, *running]
        ctx.save_for_backward(*tensors, *kept)
        ctx.set_materialize_grads(True)
        return result.o, *result.final

    @staticmethod
    def backward(ctx: Any, do: Tensor, *dfinal: Tensor) -> Any:
        if torch.is_autocast_enabled(do.device.type):  # called inside the region
            with torch.autocast(do.device.type, enabled=False):
                return ChunkedMemory.backward(ctx, do, *dfinal)
        count = INPUTS + ctx.depth
        saved = ctx.saved_tensors  # looked up once: activation checkpointing allows no more
        tensors, kept = saved[:count], iter(saved[count:])
        if torch.is_grad_enabled():
            return None, None, *_differentiable_backward(ctx, tensors, (do, *dfinal))

        checkpoints = []
        for one in ctx.shared:
            anchor = [next(kept) for _ in range(ctx.depth)]
            checkpoints.append((anchor, anchor if one else [next(kept) for _ in range(ctx.depth)]))
        grads, dstate = run_backward(
            Inputs(*tensors[:INPUTS]), checkpoints, ctx.layout, ctx.options, do, list(dfinal)
        )
        return None, None, *grads, *dstate


def _differentiable_backward(
    ctx: Any, tensors: tuple[Any, ...], grad_outputs: tuple[Tensor, ...]
) -> list[Tensor | None]:
    """`create_graph=True`: through the forward's own operations, so that autograd can go on."""
    # Views, so that gradients stop here where one input was made from another.
    tensors = tuple(None if x is None else x.view_as(x) for x in tensors)
    wanted = [x for x, need in zip(tensors, ctx.needs_input_grad[2:], strict=True) if need]
    inputs, state = Inputs(*tensors[:INPUTS]), list(tensors[INPUTS:])
    result = run(inputs, state, ctx.layout, ctx.options)
    found = iter(
        torch.autograd.grad(
            (result.o, *result.final), wanted, grad_outputs, create_graph=True, allow_unused=True
        )
    )
    return [next(found) if need else None for need in ctx.needs_input_grad[2:]]


class InPlaceOf(torch.autograd.Function):
    """A state where weights would have been: their gradient is zero, not missing."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(weights)
        return state.view_as(state)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, torch.zeros_like(ctx.saved_tensors[0])

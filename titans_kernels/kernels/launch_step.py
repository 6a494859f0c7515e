"""The launchers around a decoded token."""

from __future__ import annotations

from math import sqrt

import torch
import triton
from torch import Tensor

from ..packing import Packed, accumulator
from ..stepping import Step
from .records import StepSizes, Tokens, fixed
from .step import finish_kernel, prepare_kernel
from .tiles import Schedule

AROUND = Schedule(warps=1)  # a program has one head's channels


def _sizes(step: Step) -> StepSizes:
    _, C, H, D = step.state.tokens[0].shape
    filters, norm = step.weight.filters, step.weight.norm
    taps = filters[0].shape[1] if filters else 0
    tiles = fixed(BD=triton.next_power_of_2(D), BJ=triton.next_power_of_2(max(taps - 1, 1)))
    L = step.state.tokens[2].shape[3]
    return StepSizes(**fixed(H=H, L=L, CHUNK=C, D=D, TAPS=taps, NORMS=len(norm)), **tiles)


def _in_tuples(step: Step) -> Step:
    """Kernels take no lists."""
    return Step.of(*(tuple(x) if isinstance(x, list) else x for part in step for x in part))


def prepare(step: Step, rate: float) -> Packed:
    """The token as a query behind its open chunk, into which it is written."""
    k, memory = step.state.tokens[0], step.state.memory
    (N, C, H, D), depth = k.shape, len(memory) // 2

    def new(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return k.new_empty(shape, dtype=dtype)

    q, norm = new(N, H, D, dtype=k.dtype), new(H, 2, D, dtype=accumulator(k))
    k, v, theta, alpha, eta = (x.view(N * C, H, x.shape[3]) for x in step.state.tokens)
    token = Tokens(k, v, theta, alpha, eta, new(N, 2), new(N), new(N))
    projected, weight, state = _in_tuples(step)
    prepare_kernel[(N, H)](
        projected=projected,
        weight=weight,
        state=state,
        token=token,
        p_q=q,
        p_norm=norm,
        rate=rate,
        sizes=_sizes(step),
        **AROUND.options(),
    )
    learned = memory[:depth], memory[depth:], norm if weight.norm else None
    return Packed(q, *token[:5], *learned, *token[5:])


def finish(step: Step, o: Tensor, tail: Tensor) -> Tensor:
    """The gated output [N, H D]; what is left of the open chunk."""
    y, (N, H, D) = torch.empty_like(step.projected.gate), o.shape
    projected, weight, state = _in_tuples(step)
    finish_kernel[(N, H)](
        projected=projected,
        weight=weight,
        state=state,
        p_tail=tail,
        p_o=o,
        p_y=y,
        scale=sqrt(D),
        sizes=_sizes(step),
        **AROUND.options(),
    )
    return y

"""A token decoded into the storage of the state that it continues from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import ops
from ..backends import choose
from ..packing import Options
from ..stepping import Projected, Step, StepState, StepWeights
from .state import LayerState

if TYPE_CHECKING:
    from .neural_memory import NeuralMemory


def overwrite(layer: NeuralMemory, x: Tensor, state: LayerState) -> Tensor:
    """`layer.step`: what is between the projections is one operation, the state is overwritten."""
    memory = state.memory
    streams = [layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)]
    layer._check_state(state, streams[0][:, None], None)
    gates = [memory.theta, memory.alpha, memory.eta]
    step = Step(
        Projected(layer.gate_proj(x), streams, [gate(x) for gate in layer._gate_projections()]),
        StepWeights(
            [convolution() for convolution in layer.convolutions],
            [layer.theta_bias, layer.alpha_bias, layer.eta_bias],
            list(layer._norm() or ()),
            layer.out_norm,
        ),
        StepState(
            list(state.convolution),
            [memory.k, memory.v, *(x if x.dim() == 4 else x.unsqueeze(-1) for x in gates)],
            memory.length,
            [*memory.weights, *memory.momentum],
        ),
    )
    backend = choose(layer.backend, memory.k.flatten(0, 1), memory.weights)
    options = Options(layer.activation, layer.residual)
    return layer.out_proj(ops.step(step, backend, options, layer.max_learning_rate))


def overwrites(inplace: bool) -> bool:
    """`inplace`, checked."""
    if inplace and torch.is_grad_enabled():
        raise RuntimeError(
            "inplace: got True while gradients are recorded, which need the state that is "
            "overwritten; takes torch.no_grad() or torch.inference_mode()"
        )
    return inplace


def is_plain(module: nn.Module) -> bool:
    """Whether a call is `forward` and nothing else: no hook shards, offloads or casts around it."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))

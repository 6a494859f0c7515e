"""Other sequence models on the operator's q, k and v, for scale.

They compute something else. Each builder takes what it needs of the inputs; one whose package is
not installed raises ImportError, which the report shows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .providers import Builder, Inputs, Task, attention_leaves
from .shapes import Shape


def gated_delta_rule(inputs: Inputs, shape: Shape) -> Task:
    """flash-linear-attention's gated DeltaNet: a linear memory, one step a token."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    q, k, v = attention_leaves(inputs)
    forget = torch.log1p(-inputs["alpha"].detach())
    rate = inputs["theta"].detach().to(q.dtype)

    def call() -> Tensor:
        return chunk_gated_delta_rule(q, k, v, forget, rate)[0]

    return Task(call, [q, k, v])


def ttt_linear(inputs: Inputs, shape: Shape) -> Task:
    """flash-linear-attention's TTT-Linear: a matrix with a norm, a gradient step a chunk of 16."""
    from fla.ops.ttt import chunk_ttt_linear

    q, k, v = attention_leaves(inputs)
    rate = inputs["theta"].detach().to(q.dtype)[..., None]
    scale, shift = q.new_ones(shape.H, shape.D), q.new_zeros(shape.H, shape.D)

    def call() -> Tensor:
        return chunk_ttt_linear(q, k, v, scale, shift, rate, chunk_size=16)[0]

    return Task(call, [q, k, v])


def mamba2(inputs: Inputs, shape: Shape) -> Task:
    """Mamba-2's scan: a diagonal recurrence with a state of D by D a head."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    q, k, v = attention_leaves(inputs)
    step = inputs["theta"].detach().float()
    decay = -torch.ones(shape.H, device=q.device)

    def call() -> Tensor:
        return mamba_chunk_scan_combined(v, step, decay, k, q, chunk_size=256)

    return Task(call, [q, k, v])


def gated_delta_step(inputs: Inputs, shape: Shape) -> Task:
    """flash-linear-attention's recurrent step of one token: its operator alone, without a layer."""
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

    token = F.normalize(inputs["x"][:, -1:].detach().unflatten(-1, (shape.H, shape.D)), dim=-1)
    gate = token.new_full(token.shape[:3], 0.1)
    state = token.new_zeros(shape.B, shape.H, shape.D, shape.D, dtype=torch.float32)

    def call() -> Tensor:
        how = {"initial_state": state, "output_final_state": True}
        return fused_recurrent_gated_delta_rule(token, token, token, -gate.float(), gate, **how)[0]

    return Task(call, [])


DECODING: dict[str, Builder] = {"fla gated delta rule, its operator": gated_delta_step}
OPERATORS: dict[str, Builder] = {
    "fla gated delta rule": gated_delta_rule,
    "fla TTT-Linear": ttt_linear,
    "Mamba-2": mamba2,
}

"""What one memory consists of besides queries, keys and values: gates, M_0, LayerNorm."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .. import checks
from ..decay import Undecayed
from ..numeric import wide
from .sealing import lasting

Norm = tuple[Tensor, Tensor]


class Schedule(NamedTuple):
    """When a memory's weights change, and which of them a query reads: as in `neural_memory`."""

    chunk_size: int
    read: checks.Read = "token"
    reset_every: int | None = None


class Parts(NamedTuple):
    """What `neural_memory` takes besides queries, keys and values."""

    gates: tuple[Tensor, ...]  # sigmoids of theta, alpha and eta
    weights: tuple[Tensor, ...]
    norm: Norm | None


class MemoryWeights(nn.ParameterList):
    """M_0, read by calling it as every weight is: hooks that fetch weights run on calls alone."""

    __call__ = nn.Module.__call__

    def forward(self) -> tuple[Tensor, ...]:
        return tuple(lasting(self, w) for w in self)


class Learner(Undecayed):
    """A module with the parameters of one memory."""

    undecayed: ClassVar[tuple[str, ...]] = (
        "theta_bias",
        "alpha_bias",
        "eta_bias",
        "norm_weight",
        "norm_bias",
    )

    def _build(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        *,
        depth: int,
        expansion: int,
        norm: bool,
        per_layer_gates: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Make the parameters, without values."""
        self.depth, self.per_layer_gates = depth, per_layer_gates
        gates = heads * (depth if per_layer_gates else 1)

        def linear() -> nn.Linear:
            return nn.Linear(dim, gates, bias=False, device=device, dtype=dtype)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.theta_proj, self.alpha_proj, self.eta_proj = (linear() for _ in range(3))
        self.theta_bias, self.alpha_bias, self.eta_bias = (parameter(gates) for _ in range(3))

        hidden = [expansion * dim_head] * (depth - 1)
        self.shapes: list[tuple[int, ...]] = list(pairwise([dim_head, *hidden, dim_head]))
        self.weights = MemoryWeights(parameter(heads, *shape) for shape in self.shapes)
        self.norm_weight = parameter(heads, dim_head) if norm else None
        self.norm_bias = parameter(heads, dim_head) if norm else None

    def _gate_projections(self) -> tuple[nn.Linear, ...]:
        return self.theta_proj, self.alpha_proj, self.eta_proj

    def _reset(self) -> None:
        """All parameters but the projections of the gates."""
        nn.init.constant_(self.theta_bias, 0.0)
        nn.init.constant_(self.alpha_bias, -8.0)
        nn.init.constant_(self.eta_bias, 0.0)
        for i, w in enumerate(self.weights):
            # Keys have unit length. Without a LayerNorm nothing would bound what follows.
            unit = i == 0 and self.depth > 1 and self.norm_weight is not None
            nn.init.normal_(w, std=1.0 if unit else w.shape[1] ** -0.5)
        if self.norm_weight is not None and self.norm_bias is not None:
            nn.init.constant_(self.norm_weight, self.norm_weight.shape[-1] ** -0.5)
            nn.init.zeros_(self.norm_bias)

    def _parts(self, x: Tensor) -> Parts:
        return Parts(self._gates(x), self.weights(), self._norm())

    def _norm(self) -> Norm | None:
        if self.norm_weight is None or self.norm_bias is None:
            return None
        return self.norm_weight, self.norm_bias

    def _gates(self, x: Tensor) -> tuple[Tensor, ...]:
        """Three sigmoids of x: [B, T, heads], or [B, T, heads, depth] with per_layer_gates.

        Float32 from the bias on: bfloat16 would round a bias of -8 in steps of 0.03.
        """
        projected = torch.stack([self.theta_proj(x), self.alpha_proj(x), self.eta_proj(x)])
        bias = torch.stack([self.theta_bias, self.alpha_bias, self.eta_bias])
        gates = torch.sigmoid(wide(projected) + bias[:, None, None])
        if self.per_layer_gates:
            gates = gates.unflatten(-1, (-1, self.depth))
        return gates.unbind()

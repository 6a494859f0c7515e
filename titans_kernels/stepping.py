"""One token of a layer around its memory: what every backend takes."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Projected(NamedTuple):
    """What a layer's projections make of one token of each of N sequences."""

    gate: Tensor  # [N, H D], of the output
    streams: list[Tensor]  # [N, H D] of q, k and v, ahead of their convolutions
    gates: list[Tensor]  # [N, H L] of theta, alpha and eta, ahead of their biases


class StepWeights(NamedTuple):
    """Parameters that are applied between the projections."""

    filters: list[Tensor]  # [H D, taps] of q, k and v; none without convolutions
    biases: list[Tensor]  # [H L] of theta, alpha and eta
    norm: list[Tensor]  # [H, D], the LayerNorm's weight and bias; none without it
    out_norm: Tensor  # [H, D]


class StepState(NamedTuple):
    """What a layer carries, all of it in and out. W and S are in the dtype that sums have."""

    history: list[Tensor]  # [N, taps - 1, H D], the convolutions' last inputs
    tokens: list[Tensor]  # [N, chunk_size, H, D] of k and v, [N, chunk_size, H, L] of the gates
    length: Tensor  # [N] int32, tokens in the open chunk
    memory: list[Tensor]  # [N, H, d_in, d_out], W of every layer, then S


class Step(NamedTuple):
    projected: Projected
    weight: StepWeights
    state: StepState

    @classmethod
    def of(cls, *fields: Any) -> Step:
        """Of the fields of its parts, in order."""
        p, w = len(Projected._fields), len(Projected._fields) + len(StepWeights._fields)
        return cls(Projected(*fields[:p]), StepWeights(*fields[p:w]), StepState(*fields[w:]))

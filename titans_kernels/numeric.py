"""Two steps that are taken in float32 at least, whatever the tokens are."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-6


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit(x: Tensor) -> Tensor:
    """x / |x| along the last dimension, in float32 at least; 0 stays 0."""
    x = wide(x)
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS)

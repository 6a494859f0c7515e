"""Derivatives other than `backward`: dual numbers and the transforms of `torch.func`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transforming() -> bool:
    """Whether a transform of `torch.func` or a level of dual numbers is entered."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def values(x: Tensor) -> Any:
    """`x.tolist()`, also inside a transform, where a wrapper has no storage before torch 2.10."""
    if not transforming():
        return x.tolist()
    return [values(row) for row in x.unbind()] if x.dim() else x.item()


def differentiable() -> bool:
    """Whether derivatives of single operations may be taken: then none writes over another."""
    return torch.is_grad_enabled() or transforming()

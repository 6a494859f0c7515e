"""Derivatives other than `backward`: dual numbers and the transforms of `torch.func`."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def transforming() -> bool:
    """Whether a transform of `torch.func` or a level of dual numbers is entered."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def differentiable() -> bool:
    """Whether derivatives of single operations may be taken: then none writes over another."""
    return torch.is_grad_enabled() or transforming()

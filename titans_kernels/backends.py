"""Which backend runs a case. Each is a module with `neural_memory` and `retrieve`."""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import checks, chunked


def choose(backend: str, q: Tensor, matrices: tuple[Tensor, ...], *others: Any) -> ModuleType:
    """The backend for a memory of these matrices; `others` are all that may have gradients.

    One that is named never falls back to another. "auto" takes torch: the Triton kernels have no
    backward yet, so they are there by name only.
    """
    checks.choice("backend", backend, checks.BACKENDS)
    if backend != "triton":
        return chunked
    takes = _uncovered(q, matrices)
    leaves = pytree.tree_leaves((q, matrices, others))
    if takes is None and torch.is_grad_enabled() and any(_requires_grad(x) for x in leaves):
        takes = "inputs without gradients; use torch.no_grad() or backend='torch'"
    if takes is not None:
        raise NotImplementedError(f"backend: got 'triton', which takes {takes}")

    from . import kernels  # triton is imported only where it runs

    return kernels


def _requires_grad(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _uncovered(q: Tensor, matrices: tuple[Tensor, ...]) -> str | None:
    """What the Triton kernels take that a case is not; None if they cover it."""
    D, hidden = q.shape[3], [w.shape[-1] for w in matrices[:-1]]
    if importlib.util.find_spec("triton") is None:
        return "an installed triton; found none"
    if q.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"tensors on a GPU, or TRITON_INTERPRET=1; got device {q.device}"
    if q.device.type == "cuda" and q.dtype == torch.float64:
        return "float32, bfloat16 or float16 on a GPU; got float64"
    if len(matrices) > 2:
        return f"memories of 1 or 2 layers; got {len(matrices)}"
    if D % 16 or D > 256:
        return f"a head dimension that is a multiple of 16, at most 256; got {D}"
    if any(width % 16 or width > 1024 for width in hidden):
        return f"a hidden width that is a multiple of 16, at most 1024; got {hidden[0]}"
    return None

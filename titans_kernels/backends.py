"""Which backend runs a case."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks, selfcheck

OLDEST_TRITON = 3, 5  # tl.range takes disable_licm from there on

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def choose(backend: str, tokens: Tensor, matrices: Sequence[Tensor]) -> str:
    """ "torch", "triton" or "auto", for tokens [M, H, D] and matrices [N, H, d_in, d_out].

    One that is named never falls back to another. "auto" is kept only where Triton covers the case:
    whether it has passed its check is for the op to find out, which is never traced.
    """
    checks.choice("backend", backend, checks.BACKENDS)
    if backend == "torch" or (backend == "auto" and selfcheck.mode() == "torch"):
        return "torch"
    takes = _uncovered(tokens, matrices)
    if takes is None:
        return backend
    if backend == "auto":
        return "torch"
    raise NotImplementedError(f"backend: got 'triton', which takes {takes}")


def _uncovered(tokens: Tensor, matrices: Sequence[Tensor]) -> str | None:
    """Why the Triton kernels do not cover a case, as what they take; None if they cover it."""
    D, hidden = tokens.shape[2], [w.shape[-1] for w in matrices[:-1]]
    device = tokens.device
    oldest = ".".join(map(str, OLDEST_TRITON))
    if not _HAS_TRITON:
        return f"an installed Triton, {oldest} or newer; found none"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"tensors on a GPU, or TRITON_INTERPRET=1; got device {device}"
    from triton import __version__ as installed

    if tuple(map(int, installed.split(".")[:2])) < OLDEST_TRITON:
        return f"Triton {oldest} or newer; found {installed}"
    if device.type == "cuda" and tokens.dtype == torch.float64:
        return "float32, bfloat16 or float16 on a GPU; got float64"
    if len(matrices) > 4:
        return f"memories of 1 to 4 layers; got {len(matrices)}"
    if D % 16 or D > 256:
        return f"a head dimension that is a multiple of 16, at most 256; got {D}"
    if any(width % 16 or width > 1024 for width in hidden):
        return f"a hidden width that is a multiple of 16, at most 1024; got {hidden[0]}"
    if len(set(hidden)) > 1:
        return f"hidden layers of one width; got {hidden}"
    return None

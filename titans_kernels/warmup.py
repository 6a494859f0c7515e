"""Compiling ahead, so that a first call does not wait."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from . import checks, selfcheck
from .memory import neural_memory, retrieve


def warmup(
    heads: int,
    head_dim: int,
    *,
    hidden: int | None = None,
    depth: int = 2,
    chunk_size: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    gate_dtype: torch.dtype = torch.float32,
    per_layer_gates: bool = False,
    norm: bool = True,
    activation: checks.Activation = "gelu_tanh",
    residual: bool = True,
    lengths: Sequence[int] = (2048, 1),
    backward: bool = False,
    device: torch.device | str | None = None,
    backend: checks.Backend = "auto",
) -> None:
    """Compile the kernels of a memory of these sizes, so that no call of a run has to wait for it.

    Runs the operators once on zeros: what is compiled is what they launch. Triton keeps it on disk,
    for every later process too. With backend "auto" the kernels check themselves first, and what
    passes is remembered likewise. On a CPU, where "auto" is PyTorch, this does nothing. The two
    kernels around a token that is decoded in place are compiled by a layer's first such `step`.

    Args:
        heads, head_dim (int):
            H and D of q, k and v.
        hidden, depth (int):
            The memory's hidden width, 4 head_dim by default, and its layers.
        chunk_size, activation, residual, backend:
            As in `neural_memory`.
        dtype, gate_dtype (torch.dtype):
            Of q, k and v; of theta, alpha and eta.
        per_layer_gates (bool):
            Whether gates are [B, T, H, L]. Default: False.
        norm (bool):
            Whether there is a LayerNorm inside the memory. Default: True.
        lengths (Sequence[int]):
            Of the sequences to come. What is compiled depends on a length's blocks, or on the
            tokens of one that is shorter, rounded up to a power of two, and no more from 2,048
            tokens on: the default is for those and for decoding.
        backward (bool):
            Whether gradients will be taken. Default: False.
        device (torch.device | str | None):
            A GPU; the current one, or else the CPU, by default.

    Raises:
        TypeError, ValueError, NotImplementedError: sizes that the operators do not take.

    Examples:
        >>> from titans_kernels import warmup
        >>> warmup(heads=6, head_dim=64)  # on a GPU, seconds to minutes, the first time
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and selfcheck.mode() != "torch"
    if where.type == "cpu" and backend == "auto" and not interpreted:
        return
    wide = torch.promote_types(dtype, torch.float32)
    widths = (head_dim, *[hidden or 4 * head_dim] * (depth - 1), head_dim)

    def zeros(*shape: int, dtype: torch.dtype = wide) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=where, requires_grad=backward)

    weights = tuple(zeros(heads, d_in, d_out) for d_in, d_out in pairwise(widths))
    scale = (zeros(heads, head_dim), zeros(heads, head_dim)) if norm else None
    network: dict[str, Any] = {
        "norm": scale,
        "activation": activation,
        "residual": residual,
        "backend": backend,
    }
    with torch.set_grad_enabled(backward):
        for length in lengths:
            gate_shape = (1, length, heads, *([depth] if per_layer_gates else []))
            q, k, v = (zeros(1, length, heads, head_dim, dtype=dtype) for _ in "qkv")
            theta, alpha, eta = (zeros(*gate_shape, dtype=gate_dtype) for _ in range(3))
            inputs = (q, k, v, theta, alpha, eta, weights)
            o, _ = neural_memory(*inputs, **network, chunk_size=chunk_size, output_final_state=True)
            read = retrieve(q, weights, **network)
            if backward:
                torch.autograd.grad(o.sum() + read.sum(), [*inputs[:6], *weights])

"""Seeded inputs in the regime where the inner loop is stable, so that results can be compared."""

from itertools import pairwise

import torch
import torch.nn.functional as F


def make_inputs(
    B,
    T,
    H,
    D,
    hidden,
    depth,
    *,
    norm=True,
    per_layer_gates=False,
    dtype=torch.float64,
    seed=0,
    requires_grad=True,
    lengths=None,
    device="cpu",
):
    """The tensor arguments of `neural_memory`, by name; leaves, the same for every dtype.

    Unit q, k, v; theta <= 0.02, alpha <= 0.004, eta <= 0.9; LayerNorm of about v's norm.
    With `lengths` the one row (B = 1, T = sum(lengths)) packs that many sequences.
    """
    assert lengths is None or (B == 1 and sum(lengths) == T), "lengths need B = 1, T = their sum"
    generator = torch.Generator().manual_seed(seed)

    def leaf(x):
        return x.to(device, dtype).requires_grad_(requires_grad)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def gate(largest):
        shape = (B, T, H, depth) if per_layer_gates else (B, T, H)
        return leaf(torch.rand(shape, generator=generator, dtype=torch.float64) * largest)

    widths = [D] + [hidden] * (depth - 1) + [D]
    inputs = {name: leaf(F.normalize(randn(B, T, H, D), dim=-1)) for name in ("q", "k", "v")}
    inputs |= {"theta": gate(0.02), "alpha": gate(0.004), "eta": gate(0.9)}
    inputs["weights"] = tuple(
        leaf(randn(H, d_in, d_out) / d_in**0.5) for d_in, d_out in pairwise(widths)
    )
    inputs["norm"] = None
    if norm:
        weight, bias = 1 + 0.1 * randn(H, D), 0.1 * randn(H, D)
        inputs["norm"] = leaf(weight / D**0.5), leaf(bias / D**0.5)
    if lengths is not None:
        ends = torch.tensor([0, *lengths]).cumsum(0)
        inputs["cu_seqlens"] = ends.to(device, torch.int32)
    return inputs

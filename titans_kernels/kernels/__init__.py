"""The neural memory in fused Triton kernels, one file a pass: coefficients, scan, retrieve."""

from .operator import neural_memory

__all__ = ["neural_memory"]

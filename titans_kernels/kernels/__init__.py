"""The neural memory in fused Triton kernels, one file a pass.

`coefficients`, `scan` and `retrieve` are one forward pass; `recall` reads without learning."""

from .operator import neural_memory, retrieve

__all__ = ["neural_memory", "retrieve"]

"""Fused kernels for the Titans neural memory."""

from .memory import neural_memory, retrieve
from .state import MemoryState

__all__ = ["MemoryState", "neural_memory", "retrieve"]
__version__ = "0.1.0"

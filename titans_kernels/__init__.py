"""Fused kernels for the Titans neural memory."""

from .layers import NeuralMemory
from .memory import neural_memory, retrieve
from .state import MemoryState

__all__ = ["MemoryState", "NeuralMemory", "neural_memory", "retrieve"]
__version__ = "0.1.0"

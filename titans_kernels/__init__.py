"""Fused kernels for the Titans neural memory."""

from .adapt import replace
from .layers import NeuralMemory
from .memory import neural_memory, retrieve
from .state import MemoryState
from .warmup import warmup

__all__ = ["MemoryState", "NeuralMemory", "neural_memory", "replace", "retrieve", "warmup"]
__version__ = "0.1.0"

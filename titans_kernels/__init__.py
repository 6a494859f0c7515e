"""Fused kernels for the Titans neural memory."""

from .adapt import from_pretrained, replace, restore
from .layers import NeuralMemory
from .memory import neural_memory, retrieve
from .state import MemoryState
from .warmup import warmup

__all__ = [
    "MemoryState",
    "NeuralMemory",
    "from_pretrained",
    "neural_memory",
    "replace",
    "restore",
    "retrieve",
    "warmup",
]
__version__ = "0.1.0"

"""The definition of the Titans neural memory: plain PyTorch, token by token."""

from .memory import State, neural_memory, retrieve

__all__ = ["State", "neural_memory", "retrieve"]

"""Layers for models: the memory with its projections around it."""

from .neural_memory import NeuralMemory
from .state import LayerState

__all__ = ["LayerState", "NeuralMemory"]

"""Layers for models: the memory with its projections around it, and the Titans made of it."""

from .lmm import TitansLMM
from .mac import TitansMAC
from .mag import TitansMAG
from .mal import TitansMAL
from .neural_memory import NeuralMemory
from .state import ContextState, HybridState, LayerState, WindowState

__all__ = [
    "ContextState",
    "HybridState",
    "LayerState",
    "NeuralMemory",
    "TitansLMM",
    "TitansMAC",
    "TitansMAG",
    "TitansMAL",
    "WindowState",
]

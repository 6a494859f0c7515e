"""Layers for models: the memory with its projections around it, and the Titans made of it."""

from .lmm import TitansLMM
from .mac import TitansMAC
from .mag import TitansMAG
from .mal import TitansMAL
from .neural_memory import NeuralMemory
from .state import (
    ContextState,
    HybridState,
    LayerState,
    ProjectionState,
    TNTState,
    WindowState,
)
from .tnt import TitansTNT

__all__ = [
    "ContextState",
    "HybridState",
    "LayerState",
    "NeuralMemory",
    "ProjectionState",
    "TNTState",
    "TitansLMM",
    "TitansMAC",
    "TitansMAG",
    "TitansMAL",
    "TitansTNT",
    "WindowState",
]

"""Fused kernels for the Titans neural memory."""

from .adapt import from_pretrained, replace, restore
from .decay import no_weight_decay, parameter_groups
from .layers import NeuralMemory
from .memory import neural_memory, retrieve
from .sessions import load_session, save_session
from .state import MemoryState
from .warmup import warmup

__all__ = [
    "MemoryState",
    "NeuralMemory",
    "from_pretrained",
    "load_session",
    "neural_memory",
    "no_weight_decay",
    "parameter_groups",
    "replace",
    "restore",
    "retrieve",
    "save_session",
    "warmup",
]
__version__ = "0.2.0"

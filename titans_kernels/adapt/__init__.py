"""Titans layers in models that others wrote, called as those models call theirs."""

from .attention import TitansAttention
from .replacing import replace
from .titans_pytorch import TitansPytorchMemory

__all__ = ["TitansAttention", "TitansPytorchMemory", "replace"]

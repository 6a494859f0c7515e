"""Titans layers in models that others wrote, called as those models call their attention."""

from .attention import TitansAttention
from .replacing import replace

__all__ = ["TitansAttention", "replace"]

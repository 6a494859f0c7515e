"""Titans layers in models that others wrote, called as those models call theirs."""

from .attention import TitansAttention
from .loading import from_pretrained, restore
from .replacing import replace
from .titans_pytorch import TitansPytorchMemory

__all__ = ["TitansAttention", "TitansPytorchMemory", "from_pretrained", "replace", "restore"]

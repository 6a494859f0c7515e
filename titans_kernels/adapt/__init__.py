"""Titans layers in existing models, with the calling conventions of those models."""

from .attention import TitansAttention
from .loading import from_pretrained, restore
from .replacing import replace
from .titans_pytorch import TitansPytorchMemory

__all__ = ["TitansAttention", "TitansPytorchMemory", "from_pretrained", "replace", "restore"]

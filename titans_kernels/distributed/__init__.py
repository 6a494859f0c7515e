"""Titans layers on more than one GPU, by torch.distributed: styles for `parallelize_module`."""

from .heads import ShardHeads
from .length import ShardLength

__all__ = ["ShardHeads", "ShardLength"]

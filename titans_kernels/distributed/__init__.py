"""Titans layers on more than one GPU, by torch.distributed: styles for `parallelize_module`."""

from .heads import ReplicateHeads, ShardHeads
from .length import ShardLength

__all__ = ["ReplicateHeads", "ShardHeads", "ShardLength"]

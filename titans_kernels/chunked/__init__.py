"""The neural memory in PyTorch: any depth, any size, any device.

`layout` cuts sequences into blocks, `block` holds the three steps of a block and their derivatives,
`scan` walks the blocks forward and back and is the autograd function.
"""

from .operator import neural_memory, retrieve
from .scan import Options

__all__ = ["Options", "neural_memory", "retrieve"]

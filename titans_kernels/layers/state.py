"""What a layer carries from one call to the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..state import MemoryState


@dataclass(eq=False)  # tensors have no one truth value
class LayerState:
    """A layer's N sequences after any number of tokens; its size does not depend on how many.

    A pytree: `torch.utils._pytree.tree_map` reaches every tensor; `torch.load` takes it with
    `weights_only=True`.

    Args:
        memory (MemoryState): the learned weights, their momentum and the open chunk.
        convolution (tuple[Tensor, ...]): the last inputs of the convolutions of q, k and v, each
            [N, conv_size - 1, heads * dim_head]; empty in a layer without convolutions.
    """

    memory: MemoryState
    convolution: tuple[Tensor, ...]

    def map(self, function: Callable[[Tensor], Tensor]) -> LayerState:
        """A state of `function(tensor)` for every tensor, the first dimension being sequences."""
        return LayerState(self.memory.map(function), tuple(map(function, self.convolution)))

    def detach(self) -> LayerState:
        """The same values, cut off from the graph: truncated backpropagation."""
        return self.map(Tensor.detach)

    def index_select(self, sequences: Tensor) -> LayerState:
        """The state of the given sequences, in their order: beam search, dropping finished rows."""
        return self.map(lambda x: x.index_select(0, sequences.to(x.device)))


pytree.register_pytree_node(
    LayerState,
    lambda state: ([state.memory, state.convolution], None),
    lambda values, _: LayerState(*values),
    serialized_type_name="titans_kernels.LayerState",
)
torch.serialization.add_safe_globals([LayerState])

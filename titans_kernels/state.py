"""What a memory carries from one call to the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(eq=False)  # tensors have no one truth value
class MemoryState:
    """The memory of N sequences after any number of tokens.

    `weights` and `momentum` stand at the last whole chunk. The tokens since then, the open chunk,
    are kept beside them, so that a sequence may be cut anywhere and goes on exactly as if it had
    not been. States may share tensors: make new ones, do not write into them. A pytree:
    `torch.utils._pytree.tree_map` reaches every tensor; `torch.load` takes it with
    `weights_only=True`.

    Args:
        weights (tuple[Tensor, ...]): per memory layer [N, H, d_in, d_out], float32 (float64 for
            float64 inputs).
        momentum (tuple[Tensor, ...]): likewise, S of `S_t = eta_t S_{t-1} - theta_t g_t`.
        k, v (Tensor): [N, chunk_size, H, D], the open chunk's tokens first, then zeros.
        theta, alpha, eta (Tensor): [N, chunk_size, H] or [N, chunk_size, H, L], likewise.
            Go on with gates of the same dtype: others are rounded to theirs.
        length (Tensor): [N] int32, tokens in the open chunk, 0 to chunk_size - 1.
    """

    weights: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]
    k: Tensor
    v: Tensor
    theta: Tensor
    alpha: Tensor
    eta: Tensor
    length: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> MemoryState:
        """A state of `function(tensor)` for every tensor, the first dimension being sequences."""
        values, spec = pytree.tree_flatten(self)
        return pytree.tree_unflatten([function(x) for x in values], spec)

    def detach(self) -> MemoryState:
        """The same values, cut off from the graph: truncated backpropagation."""
        return self.map(Tensor.detach)

    def index_select(self, sequences: Tensor) -> MemoryState:
        """The state of the given sequences, in their order: beam search, dropping finished rows."""
        return self.map(lambda x: x.index_select(0, sequences.to(x.device)))

    @property
    def chunk_size(self) -> int:
        return self.k.shape[1]


_NAMES = tuple(field.name for field in fields(MemoryState))

pytree.register_pytree_node(
    MemoryState,
    lambda state: ([getattr(state, name) for name in _NAMES], None),
    lambda values, _: MemoryState(*values),
    serialized_type_name="titans_kernels.MemoryState",
    flatten_with_keys_fn=lambda state: (
        [(pytree.GetAttrKey(name), getattr(state, name)) for name in _NAMES],
        None,
    ),
)
torch.serialization.add_safe_globals([MemoryState])

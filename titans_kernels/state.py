"""What a memory carries from one call to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from typing_extensions import Self


class State:
    """N sequences after any number of tokens; its size does not depend on how many.

    A pytree: `torch.utils._pytree.tree_map` reaches every tensor; `torch.load` takes it with
    `weights_only=True`. The first dimension of every tensor is the sequences.
    """

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """A state of `function(tensor)` for every tensor, the first dimension being sequences."""
        values, spec = pytree.tree_flatten(self)
        return pytree.tree_unflatten([function(x) for x in values], spec)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Self:
        """The same values on another device. Dtypes stay: a memory is float32 at least."""
        if isinstance(device, (torch.dtype, Tensor)):
            got = device if isinstance(device, torch.dtype) else "a Tensor"
            raise TypeError(f"device: got {got}, takes a device; a state keeps its dtypes")
        return self.map(lambda x: x.to(device, non_blocking=non_blocking))

    def clone(self) -> Self:
        """The same values in tensors of their own, gradients flow through."""
        return self.map(Tensor.clone)

    def detach(self) -> Self:
        """The same values, detached from the graph: truncated backpropagation."""
        return self.map(Tensor.detach)

    def copy_(self, other: Self) -> Self:
        """Write the values of another state of the same sizes into this one's own tensors.

        A CUDA graph reads and writes the tensors it was captured with. No gradient flows through.
        """
        values, spec = pytree.tree_flatten(self)
        new, other_spec = pytree.tree_flatten(other)
        if spec != other_spec:
            raise ValueError("other: got a state of another structure, takes one as this one")
        for x, y in zip(values, new, strict=True):
            if x.shape != y.shape or x.dtype != y.dtype:
                got, takes = f"{y.dtype} {list(y.shape)}", f"{x.dtype} {list(x.shape)}"
                raise ValueError(f"other: got a tensor of {got}, takes {takes}")
        with torch.no_grad():
            for x, y in zip(values, new, strict=True):
                x.copy_(y)
        return self

    def index_select(self, sequences: Tensor) -> Self:
        """The state of the given sequences, in their order: beam search, dropping finished rows."""
        return self.map(lambda x: x.index_select(0, sequences.to(x.device)))


C = TypeVar("C", bound=type)


def registered(cls: C) -> C:
    """Make a dataclass of tensors a pytree that `torch.load` trusts.

    What is None or a number is no leaf: it belongs to the structure.
    """
    names = [field.name for field in fields(cls)]

    def leaves(state: Any) -> tuple[list[str], dict[str, Any] | None]:
        static = {n: x for n in names if isinstance(x := getattr(state, n), (int, type(None)))}
        return [n for n in names if n not in static], static or None

    def flatten(state: Any) -> tuple[list[Any], dict[str, Any] | None]:
        found, static = leaves(state)
        return [getattr(state, name) for name in found], static

    def flatten_with_keys(state: Any) -> tuple[list[Any], dict[str, Any] | None]:
        found, static = leaves(state)
        return [(pytree.GetAttrKey(name), getattr(state, name)) for name in found], static

    def unflatten(values: Iterable[Any], static: dict[str, Any] | None) -> Any:
        found = [name for name in names if name not in (static or {})]
        return cls(**dict(zip(found, values, strict=True)), **(static or {}))

    pytree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        serialized_type_name=f"titans_kernels.{cls.__name__}",
        flatten_with_keys_fn=flatten_with_keys,
    )
    torch.serialization.add_safe_globals([cls])
    return cls


# eq=False: tensors have no one truth value.


@registered
@dataclass(eq=False)
class MemoryState(State):
    """The memory of N sequences after any number of tokens.

    `weights` and `momentum` stand at the last whole chunk. The tokens since then, the open chunk,
    are kept next to them, so that a sequence may be cut anywhere and continues exactly as if it had
    not been. States may share tensors: make new ones, do not write into them. A pytree:
    `torch.utils._pytree.tree_map` reaches every tensor; `torch.load` takes it with
    `weights_only=True`.

    Args:
        weights (tuple[Tensor, ...]): per memory layer [N, H, d_in, d_out], float32 (float64 for
            float64 inputs).
        momentum (tuple[Tensor, ...]): likewise, S of `S_t = eta_t S_{t-1} - theta_t g_t`.
        k, v (Tensor): [N, chunk_size, H, D], the open chunk's tokens first, then zeros.
        theta, alpha, eta (Tensor): [N, chunk_size, H] or [N, chunk_size, H, L], likewise.
            Continue with gates of the same dtype: others are rounded to theirs.
        length (Tensor): [N] int32, tokens in the open chunk, 0 to chunk_size - 1.
        position (Tensor | None): [N] int32, tokens since the last reset, 0 to reset_every: at
            reset_every the next token resets the memory. None in a memory without resets.
        reset_every (int | None): of the memory, where it has resets.
    """

    weights: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]
    k: Tensor
    v: Tensor
    theta: Tensor
    alpha: Tensor
    eta: Tensor
    length: Tensor
    position: Tensor | None = None
    reset_every: int | None = None

    @property
    def chunk_size(self) -> int:
        return self.k.shape[1]

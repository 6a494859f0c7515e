"""States in the caches of Hugging Face transformers: as large after a million tokens as after one.

A cache is a list of layers. A Titans layer that replaces attention takes the place of its
layer there; one next to attention has a layer of its own after all others. So whatever a cache does
to its layers, reordering for beam search above all, reaches the states too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, StaticLayer

from .. import sessions
from ..layers.state import State


class MemoryLayer(CacheLayerMixin):
    """The state of one Titans layer, and how many tokens, padding included, its rows have had."""

    is_sliding = False
    supports_early_init = False
    read: Tensor | None = None  # [B], a checksum of the tokens, where they are known by number

    def __init__(self, beside: int | None = None) -> None:
        super().__init__()
        self.fixed = False  # whether the cache is as long as it will ever be, from the start
        self.beside = beside  # the layer of attention that this one is added to
        self.state: State | None = None
        self.seen = 0

    @property
    def keys(self) -> Any:
        """Whisper takes caches apart into keys and values: a state would be lost silently."""
        if self.state is None:
            return None
        raise AttributeError(
            "past_key_values: a memory leaves a state there, no keys and values; generate with "
            "use_cache=False, or without return_dict_in_generate"
        )

    @keys.setter
    def keys(self, empty: None) -> None:
        """Every layer of a cache starts without them."""

    values = keys

    def store(self, state: State, tokens: int) -> None:
        self.state = state
        self.seen += tokens

    def note(self, tokens: Tensor | None) -> None:
        """Remember by their checksum that these [B, T] are what comes next; before `store`."""
        before = self.read if self.seen else 0
        unknown = tokens is None or before is None
        self.read = None if unknown else _checksum(tokens, before)  # type: ignore[arg-type]

    def has_read(self, tokens: Tensor) -> bool | None:
        """Whether [B, T] are all that its rows have had; None where that is not known."""
        if self.read is None or tokens.shape != (len(self.read), self.seen):
            return None
        return bool((_checksum(tokens) == self.read).all())

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.state, self.read, self.seen = None, None, 0

    def detach(self) -> None:
        self.state = self.state and self.state.detach()

    def offload(self) -> None:
        """A state stays where it is; it is what keys and values of a few hundred tokens take."""

    prefetch = offload

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda x: x.repeat_interleave(repeats, dim=0))

    def _each(self, f: Callable[[Tensor], Tensor]) -> None:
        self.state = self.state and self.state.map(f)
        self.read = None if self.read is None else f(self.read)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError("crop: a memory cannot unlearn; keep a copy of its state instead")

    def lazy_initialization(self, key_states: Any, value_states: Any) -> None:
        raise TypeError("this layer of the cache holds the state of a memory, not keys and values")

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        self.lazy_initialization(key_states, value_states)


def _checksum(tokens: Tensor, before: Tensor | int = 0) -> Tensor:
    """A polynomial in the tokens [B, T] modulo 2^64, [B]; before: that of those before them."""
    factor = 6364136223846793005
    tokens = tokens.long()
    powers = tokens.new_full(tokens.shape[1:], factor).cumprod(0).flip(0)  # T to 1
    follow = powers[0] if len(powers) else 1
    return before * follow + ((tokens + 1) * powers).sum(1)


class TitansCache(Cache):
    """The states of a model of `layers` Titans layers."""

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[MemoryLayer() for _ in range(layers)])

    def to(self, device: torch.device | str) -> TitansCache:
        """The same states on another device; dtypes stay."""
        return sessions.move(self, device)

    def clone(self) -> TitansCache:
        """A copy, so that a sequence can continue in two ways."""
        return sessions.clone(self)

    def detach(self) -> TitansCache:
        """The same states, detached from the graph: truncated backpropagation."""
        for layer in self.layers:
            layer.detach()
        return self


def memory_layer(cache: Any, index: int, beside: bool = False, others: int = 0) -> MemoryLayer:
    """Where a Titans layer finds its state; made when it is not there yet.

    Args:
        cache: a `DynamicCache`, `TitansCache` or any other that grows.
        index: of the attention layer whose place it takes, or that it is added to.
        others: how many attention layers the model has or had.
    """
    cache = getattr(cache, "self_attention_cache", cache)
    if not isinstance(cache, Cache):
        got = type(cache).__name__
        raise TypeError(f"past_key_values: got {got}, takes a Cache of transformers or None")
    if beside and torch.compiler.is_compiling() and cache.is_compileable:
        got = f"{type(cache).__name__} in a compiled model"
        raise ValueError(f"past_key_values: got {got}; pass disable_compile=True to generate")
    # A cache that makes its layers when they are first used must not use ours for another.
    while len(cache.layers) < max(others, index + 1):
        cache.layers.append((cache.layer_class_to_replicate or MemoryLayer)())
    if beside:
        for layer in cache.layers:
            if isinstance(layer, MemoryLayer) and layer.beside == index:
                return layer
        layer = MemoryLayer(beside=index)
        if isinstance(cache.layers[index], StaticLayer):
            # Or the cache would not be one of fixed size any more, and the host would mask it as
            # one that grows.
            layer.fixed = layer.is_compileable = True
        cache.layers.append(layer)
        return layer

    layer = cache.layers[index]
    if isinstance(layer, MemoryLayer):
        return layer
    if isinstance(layer, StaticLayer):
        got = type(cache).__name__
        raise ValueError(f"past_key_values: got {got}, takes one that grows, as a DynamicCache")
    if getattr(layer, "is_initialized", False) or getattr(layer, "state", None) is not None:
        got = f"what another kind of layer left in layer {index}"
        raise ValueError(f"past_key_values: got {got}, takes an empty cache")
    cache.layers[index] = MemoryLayer()
    return cache.layers[index]

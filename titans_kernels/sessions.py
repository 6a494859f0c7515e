"""Sessions: what a conversation leaves, kept between calls, moved, and on disk.

A session is the state of a layer, a list or dict of them, or a cache of transformers: of a Titans
model, or of a host with Titans layers, keys and values of its attention included.

    out, state = layer(x)                               # or: cache = model(tokens).past_key_values
    save_session(state, "session.pt")
    state = load_session("session.pt", device="cuda")   # with weights_only=True
    out, state = layer(more, state)           # or: model.generate(more, past_key_values=cache)

`move`, `clone` and `detach` take all of these; states have `.to`, `.clone` and `.detach` of their
own. A host infers from its mask how many tokens it has read: `model.generate(more,
past_key_values=cache, attention_mask=torch.ones(B, cache.get_seq_length() + more.shape[1]))`.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import IO, Any, TypeVar

import torch
from torch import Tensor

from .state import State

T = TypeVar("T")


def save_session(session: Any, file: str | os.PathLike[str] | IO[bytes]) -> None:
    """Write a session to disk, detached from the graph.

    Args:
        session: a state, a cache of transformers, or lists, tuples and dicts of these.
        file: a path, or a file opened for writing bytes.

    Examples:
        >>> import io, torch
        >>> from titans_kernels import NeuralMemory, load_session, save_session
        >>> layer, file = NeuralMemory(16, heads=2), io.BytesIO()
        >>> _, state = layer(torch.randn(1, 10, 16))
        >>> save_session(state, file)
        >>> _ = file.seek(0)
        >>> _, state = layer(torch.randn(1, 10, 16), load_session(file))
    """

    def compact(x: Tensor) -> Tensor:
        x = x.detach()
        whole = x.untyped_storage().nbytes() == x.numel() * x.element_size()
        return x if whole else x.clone()  # `torch.save` writes all that a view is a part of

    torch.save(_mapped(session, compact), file)


def load_session(
    file: str | os.PathLike[str] | IO[bytes], device: torch.device | str | None = None
) -> Any:
    """What `save_session` wrote, read with `weights_only=True`: a file runs no code.

    Args:
        file: a path, or a file opened for reading bytes.
        device: where to; None: where it was.

    Examples:
        >>> import io, torch
        >>> from titans_kernels import NeuralMemory, load_session, save_session
        >>> layer, file = NeuralMemory(16, heads=2), io.BytesIO()
        >>> save_session(layer(torch.randn(1, 10, 16))[1], file)
        >>> _ = file.seek(0)
        >>> load_session(file, device="cpu").memory.length
        tensor([10], dtype=torch.int32)
    """
    # Those that are safe already stay so: torch forgets all that it is given here.
    missing = set(_caches()).difference(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals(list(missing)):
        session = torch.load(file, map_location=device, weights_only=True)
    return session if device is None else move(session, device)


def move(session: T, device: torch.device | str) -> T:
    """The same session on another device; dtypes stay."""
    return _mapped(session, lambda x: x.to(device), torch.device(device))


def clone(session: T) -> T:
    """A copy with tensors of its own, so that a sequence can continue in two ways."""
    return _mapped(session, Tensor.clone)


def detach(session: T) -> T:
    """The same values, detached from the graph: truncated backpropagation."""
    return _mapped(session, Tensor.detach)


def _mapped(x: Any, f: Callable[[Tensor], Tensor], device: torch.device | None = None) -> Any:
    """A session of `f(tensor)` for every tensor; everything else is shared or copied as it is."""
    if isinstance(x, Tensor):
        return f(x)
    if isinstance(x, State):
        return x.map(f)
    if isinstance(x, torch.device):
        return device or x
    if isinstance(x, dict):
        return type(x)((k, _mapped(v, f, device)) for k, v in x.items())
    if isinstance(x, (list, tuple)):
        parts = [_mapped(v, f, device) for v in x]
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
    if "transformers" in sys.modules and isinstance(x, _caches()):
        new = copy.copy(x)
        new.__dict__ = {k: _mapped(v, f, device) for k, v in vars(x).items()}
        return new
    return x


def _caches() -> Any:
    """The classes that caches of transformers are made of, ours among them."""
    from .adapt.titans_pytorch import NeuralMemState

    if find_spec("transformers") is None:
        return (NeuralMemState,)
    from transformers import cache_utils

    from .adapt.cache import MemoryLayer, TitansCache

    bases = (cache_utils.Cache, cache_utils.CacheLayerMixin)
    kinds = [x for x in vars(cache_utils).values() if isinstance(x, type) and issubclass(x, bases)]
    return (*kinds, MemoryLayer, TitansCache, NeuralMemState)

"""Whether the ranks of a group make the same call: an error at once, where they would hang."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layers import NeuralMemory
from ..layers.attention import Attention
from ..layers.block import Block
from ..layers.sealing import unsealed
from ..packing import known
from .messages import Line


class Agreed(NamedTuple):
    """What a rank knows of the call from the ranks before it.

    Args:
        cu_seqlens: of this rank's tokens.
        fresh: whether the first rank was given no state.
        start, end: of this rank's tokens in the whole row.
        read: tokens since the last reset in the state that the first rank was given.
    """

    cu_seqlens: Tensor | None
    fresh: bool
    start: int
    end: int
    read: int | None


def agree(
    line: Line,
    module: nn.Module,
    x: Tensor,
    state: Any,
    cu_seqlens: Tensor | None,
    options: dict[str, Any],
    read: int | None,
) -> Agreed:
    """Compare this rank's call with that of the rank before it.

    Args:
        cu_seqlens: of the whole row.
        read: on the first rank, tokens since the last reset in its state.

    Raises:
        ValueError: naming both ranks and what they differ in.
    """
    facts = _facts(module, x, state, cu_seqlens, options)
    start = 0
    if not line.first:
        before = line.take_facts(line.rank - 1, x.device)
        start, read = before.pop("start"), before.pop("read")
        if facts["state"] is None:  # a rank behind the first need not have what it is sent
            facts["state"] = before["state"]
        _compare(line, line.rank - 1, before, facts)
    end = start + x.shape[1]
    if not line.last:
        line.put_facts(facts | {"start": end, "read": read}, line.rank + 1, x.device)
    fresh = facts["state"] is None
    if cu_seqlens is None:
        return Agreed(None, fresh, start, end, read)
    if line.last and known(cu_seqlens) and int(cu_seqlens[-1]) != end:
        raise ValueError(
            f"cu_seqlens: got {int(cu_seqlens[-1])} last, takes {end}, the tokens of all "
            f"{line.count} ranks together"
        )
    return Agreed((cu_seqlens - start).clamp(0, x.shape[1]), fresh, start, end, read)


def _facts(
    module: nn.Module, x: Tensor, state: Any, cu_seqlens: Tensor | None, options: dict[str, Any]
) -> dict[str, Any]:
    packed = None
    if cu_seqlens is not None:
        packed = [len(cu_seqlens)]
        if known(cu_seqlens):
            packed.append(zlib.crc32(repr(cu_seqlens.tolist()).encode()))
    return {
        "module": type(module).__name__.lstrip("_"),
        **_options(module),
        **getattr(module, "_sharding", {}),
        "shape of x without its length": [x.shape[0], x.shape[2]],
        "dtype of x": str(x.dtype),
        "cu_seqlens": packed,
        "whether gradients are on": torch.is_grad_enabled(),
        "options": {name: repr(value) for name, value in options.items()},
        "state": None if state is None else type(state).__name__,
    }


def _options(module: nn.Module) -> dict[str, Any]:
    """Sizes and other options of a layer and of its parts that have some."""
    found = {}
    for prefix, part in module.named_modules():
        if isinstance(part, (NeuralMemory, Attention, Block)):
            for name, value in vars(part).items():
                if name == "local_chunks":
                    found[f"{prefix}.{name}"] = list(value)
                simple = isinstance(value, (bool, int, float, str, type(None)))
                if simple and not name.startswith("_") and name != "training":
                    found[f"{prefix}.{name}" if prefix else name] = value
    return found


def agree_together(line: Line, module: nn.Module, named: dict[str, Any]) -> None:
    """Compare this rank's call with those of all others, which have the same tokens.

    Args:
        named: the arguments of `forward`.

    Raises:
        ValueError: as `agree`.
    """
    x, state, cu_seqlens = (named.get(name) for name in ("x", "state", "cu_seqlens"))
    if not isinstance(x, Tensor) or x.dim() != 3:  # which the layer refuses
        return
    options = {n: v for n, v in named.items() if n not in ("x", "state", "cu_seqlens")}
    own = _facts(module, x, unsealed(state), cu_seqlens, options) | {"length of x": x.shape[1]}
    own["state"] = state is not None
    for rank, theirs in enumerate(line.gather_facts(own, x.device)):
        _compare(line, rank, theirs, own)


def _compare(line: Line, rank: int, theirs: dict[str, Any], own: dict[str, Any]) -> None:
    for name, value in theirs.items():
        if value != own.get(name):
            raise ValueError(
                f"{name}: got {own.get(name)} on {line.name(line.rank)}, takes that of "
                f"{line.name(rank)}, {value}"
            )

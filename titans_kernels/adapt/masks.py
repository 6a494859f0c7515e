"""Masks as attention is given them: which tokens they hide as padding, where sequences begin.

A memory reads a sequence from its beginning, in order. So of a mask it understands padding, causal
masks with or without a window, and packed sequences; a mask that hides anything else from
some queries is refused.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

HIDDEN = -9e3  # what is added to scores to hide a token: -1e4, also in bfloat16, and all below


def read(
    mask: Any, batch: tuple[int, int], device: torch.device, seen: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Which tokens [B, T] are not padding, and which begin a sequence, where a mask has that.

    Args:
        mask: [B, K] with 0 at padding, or [B, 1 or heads, 1 or T, K], of 0 and 1 or added to the
            scores.
        seen: how many of the K tokens come before those of the batch. Default: K - T.

    Raises:
        ValueError: a shape or values that are none of these, or a mask that hides more than that.
    """
    B, T = batch
    if not isinstance(mask, Tensor):
        got = type(mask).__name__
        raise TypeError(f"attention_mask: got {got}, takes a tensor, as for sdpa or eager")
    shape = tuple(mask.shape)
    square = len(shape) == 4 and shape[2] in (1, T)
    fits = len(shape) == 2 or square
    if not fits or shape[-1] < T or shape[0] not in (1, B):
        takes = f"[B, K] or [B, 1, T, K] with B = {B}, T = {T}, K >= T"
        raise ValueError(f"attention_mask: got {list(shape)}, takes {takes}")
    start = shape[-1] - T if seen is None else min(seen, shape[-1] - T)
    mask = mask.to(device).expand(B, *shape[1:])
    if len(shape) == 2:
        return _real(mask[:, start : start + T]), None
    seeing = visible(mask)
    if shape[1] > 1 and not bool((seeing == seeing[:, :1]).all()):
        raise _refused("hides other tokens in one head than in another")
    seeing = seeing[:, 0, :, start : start + T]
    if shape[2] < T:  # every token sees the same, which are all that are no padding
        return seeing[:, 0], None
    return _from_square(seeing)


def visible(mask: Tensor) -> Tensor:
    """A mask of what is seen, or one to be added to scores, as a boolean mask of what is seen."""
    if mask.dtype == torch.bool:
        return mask
    ones = (mask == 1).any()
    if bool(ones & ((mask == 0) | (mask == 1)).all()) or not mask.is_floating_point():
        return _zeros_and_ones(mask)
    return mask > HIDDEN


def _real(mask: Tensor) -> Tensor:
    """[B, T], which are tokens: of 0 and 1, or added to scores where anything is below 0."""
    if mask.is_floating_point() and bool((mask < 0).any()):
        return visible(mask)
    return _zeros_and_ones(mask)


def _zeros_and_ones(mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        got = f"values from {mask.min().item()} to {mask.max().item()}"
        takes = "0 and 1, booleans, or what is added to the scores"
        raise ValueError(f"attention_mask: got {got}, takes {takes}")
    return mask.bool()


def _from_square(seeing: Tensor) -> tuple[Tensor, Tensor]:
    """Of what queries see, [B, T, T]: which are tokens, and which begin a sequence, [B, T].

    Causal masks let a token see itself, padding not even that; the first of a sequence does not
    see the token before it.
    """
    T = seeing.shape[1]
    real = seeing.diagonal(0, 1, 2)
    place = torch.arange(T, device=seeing.device)
    last = torch.where(real, place, -1).cummax(1).values
    before = F.pad(last[:, :-1], (1, 0), value=-1)
    seen = seeing.gather(2, before.clamp(min=0)[..., None])[..., 0]
    begins = real & ~((before >= 0) & seen)

    if bool(seeing.any() & ~real.any()):
        raise _refused("shows no token itself, as one that is True at what it hides does")
    tokens = seeing & real[..., None]  # what padding sees does not matter
    if bool((tokens & ~real[:, None]).any()):
        raise _refused("hides a token from itself, or shows padding to a token")
    sequence = begins.cumsum(1)
    if bool((tokens & (sequence[..., None] != sequence[:, None])).any()):
        raise _refused("shows tokens of one sequence to another")
    # Of its own sequence a token sees the last n: n tokens, the oldest n - 1 before it.
    past = tokens & torch.ones(T, T, dtype=torch.bool, device=seeing.device).tril()
    order = real.cumsum(1)
    age = torch.where(past, order[..., None] - order[:, None], 0).amax(2) if T else order
    if bool((real & (past.sum(2) != age + 1)).any()):
        raise _refused("hides tokens between those that it shows")
    return real, begins


def _refused(what: str) -> ValueError:
    takes = "padding, causal masks, windows and packed sequences"
    return ValueError(f"attention_mask: got one that {what}; a memory understands {takes}")

"""Padded batches, as attention is told about them, and the packed sequences that memories read.

A memory learns what it reads, so it must not read padding. Masks say which tokens are padding, on
either side or in between, and which begin a new sequence in the middle of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Rows(NamedTuple):
    """Where the tokens of a batch [B, T] are, and where its sequences begin."""

    token: Tensor  # [M], places of what is no padding in the batch laid end to end, B T long
    cu_seqlens: Tensor  # [N + 1], N is B unless rows hold several sequences
    batch: tuple[int, int]

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [1, M, C]"""
        return x.flatten(0, 1)[self.token][None]

    def packs(self, cu_seqlens: Tensor) -> bool:
        """Whether these are the same sequences, and no token is padding."""
        whole = len(self.token) == self.batch[0] * self.batch[1]
        return whole and self.cu_seqlens.tolist() == cu_seqlens.tolist()

    def unpack(self, y: Tensor) -> Tensor:
        """[1, M, C] -> [B, T, C], zeros at padding."""
        B, T = self.batch
        rows = y.new_zeros(B * T, y.shape[-1]).index_copy(0, self.token, y[0])
        return rows.view(B, T, -1)


def rows_of(
    x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None = None, past: bool = False
) -> Rows | None:
    """How to pack x [B, T, C]; None where every row is one whole sequence. Waits for a GPU.

    Args:
        attention_mask: [B, K] with 0 at padding, or [B, 1, T or 1, K], bool or added to the scores.
            The last T of K are those of x.
        position_ids: [B, T]. Where no mask says so, a position that does not follow the one before
            begins a sequence.
        past: whether the rows go on from earlier ones, so that no sequence begins here.
    """
    B, T = x.shape[:2]
    if attention_mask is not None:
        if not isinstance(attention_mask, Tensor):
            got = type(attention_mask).__name__
            raise TypeError(f"attention_mask: got {got}, takes a tensor, as for sdpa or eager")
        shape = tuple(attention_mask.shape)
        square = len(shape) == 4 and shape[2] in (1, T)
        if not (len(shape) == 2 or square) or shape[-1] < T:
            takes = f"[B, K] or [B, 1, T, K] with T = {T}, K >= T"
            raise ValueError(f"attention_mask: got {list(shape)}, takes {takes}")
        attention_mask = attention_mask.to(x.device).expand(B, *shape[1:])
        if len(shape) == 2:
            real, begins = attention_mask[:, -T:].bool(), None
        elif shape[2] < T:  # every token sees the same, which are all that are no padding
            real, begins = _visible(attention_mask[:, 0, 0, -T:]), None
        else:
            real, begins = _from_square(_visible(attention_mask[:, 0]))
    elif position_ids is not None and position_ids.dim() == 2 and not past and T > 1:
        real = torch.ones(B, T, dtype=torch.bool, device=x.device)
        begins = F.pad(position_ids.diff(dim=1) != 1, (1, 0), value=True).expand(B, T)
    else:
        return None

    several = begins is not None and not past and bool((begins.sum(1) > 1).any())
    if not several and bool(real.all()):
        return None
    if several:
        assert begins is not None
        lengths = torch.bincount(begins[real].cumsum(0) - 1)
    else:
        lengths = real.sum(1)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return Rows(real.flatten().nonzero()[:, 0], cu_seqlens, (B, T))


def rows_once(
    x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None = None, past: bool = False
) -> Rows | None:
    """`rows_of`, but the many layers of a host that are given the same tensor wait only once."""
    source = position_ids if attention_mask is None else attention_mask
    if not isinstance(source, Tensor) or source.is_inference() or torch.compiler.is_compiling():
        return rows_of(x, attention_mask, position_ids, past)
    key = (source._version, *x.shape[:2], past)
    found = getattr(source, "_titans_rows", None)
    if found is None or found[0] != key:
        found = key, rows_of(x, attention_mask, position_ids, past)
        source._titans_rows = found  # type: ignore[attr-defined]
    return found[1]


def _visible(mask: Tensor) -> Tensor:
    """A mask of what is seen, or one to be added to scores, as a mask of what is seen."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _from_square(visible: Tensor) -> tuple[Tensor, Tensor]:
    """Of what queries see, [B, T, K]: which are tokens, and which begin a sequence, [B, T].

    Causal masks let a token see itself, padding not even that; the first of a sequence does not
    see the token before it.
    """
    T, K = visible.shape[1:]
    real = visible.diagonal(K - T, 1, 2)
    place = torch.arange(K - T, K, device=visible.device)
    last = torch.where(real, place, -1).cummax(1).values
    before = F.pad(last[:, :-1], (1, 0), value=-1)
    seen = visible.gather(2, before.clamp(min=0)[..., None])[..., 0]
    return real, real & ~((before >= 0) & seen)

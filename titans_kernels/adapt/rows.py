"""Padded batches, as attention gets them, and the packed sequences that memories read.

A memory is trained on what it reads, so it must not read padding. Masks have which tokens are
padding, on either side or in between, and which begin a new sequence in the middle of a row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils.weak import WeakTensorKeyDictionary

from . import masks


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
    x: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    past: bool = False,
    *,
    seen: int | None = None,
    chunk: int | None = None,
) -> Rows | None:
    """How to pack x [B, T, C]; None where every row is one whole sequence. Waits for a GPU.

    Args:
        attention_mask: as `masks.read` takes it.
        position_ids: [B, T]. Without a mask, a position that does not follow the one before begins
            a sequence.
        past: whether the rows continue earlier ones, so that no sequence begins here.
        seen: the place of x in the mask. Default: at its end.
        chunk: after how many tokens attention no longer reaches back, within one sequence.
    """
    if attention_mask is None and (position_ids is None or past or x.shape[1] < 2):
        return None
    if _without_values(x):  # nothing to look at; the shapes are the same
        return None
    B, T = x.shape[:2]
    if attention_mask is not None:
        real, begins = masks.read(attention_mask, (B, T), x.device, seen)
        if begins is not None and chunk is not None:
            begins = begins & ~_of_chunks(real, begins, position_ids, chunk)
    elif position_ids is not None and position_ids.dim() == 2:
        real = torch.ones(B, T, dtype=torch.bool, device=x.device)
        begins = F.pad(position_ids.diff(dim=1) != 1, (1, 0), value=True).expand(B, T)
    else:
        return None

    several = begins is not None and bool((begins.sum(1) > 1).any())
    if several and past and chunk is None:
        raise ValueError("past_key_values: takes None together with packed sequences")
    several = several and not past
    if not several and bool(real.all()):
        return None
    if several:
        assert begins is not None
        lengths = torch.bincount(begins[real].cumsum(0) - 1)
    else:
        lengths = real.sum(1)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return Rows(real.flatten().nonzero()[:, 0], cu_seqlens, (B, T))


def _of_chunks(real: Tensor, begins: Tensor, position_ids: Tensor | None, chunk: int) -> Tensor:
    """Which of the beginnings [B, T] are those of a chunk within a sequence."""
    place = real.cumsum(1) - 1
    grid = (place % chunk == 0) & (place > 0)
    if position_ids is not None and position_ids.dim() == 2:
        return grid & F.pad(position_ids.diff(dim=1) == 1, (1, 0), value=False)
    if bool((begins & ~grid).sum(1).gt(1).any()):
        raise ValueError("position_ids: got None, takes those of packed sequences with chunks")
    return grid


def _without_values(x: Tensor) -> bool:
    return x.is_meta or (is_fake(x) and not torch.compiler.is_compiling())


# The rows of a mask for as long as it lives. On our side: a mask is the user's to save and to send.
_KNOWN: Any = WeakTensorKeyDictionary()


def rows_once(
    x: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    past: bool = False,
    *,
    seen: int | None = None,
    chunk: int | None = None,
) -> Rows | None:
    """`rows_of`, but the many layers of a host that are given the same tensor wait only once."""

    def made() -> Rows | None:
        return rows_of(x, attention_mask, position_ids, past, seen=seen, chunk=chunk)

    source = position_ids if attention_mask is None else attention_mask
    if not isinstance(source, Tensor) or torch.compiler.is_compiling() or _without_values(source):
        return made()
    # NumPy and `.data` write without a trace, on a CPU where a copy is cheap to compare with.
    copied = source.device.type == "cpu"
    if source.is_inference() and not copied:
        return made()
    version = None if source.is_inference() else source._version
    positions = None if position_ids is None else id(position_ids)
    key = (version, x.device, *x.shape[:2], past, seen, chunk, chunk and positions)
    found = _KNOWN.get(source)
    if found is not None and found[0] == key and (not copied or torch.equal(found[1], source)):
        return found[2]
    with torch.inference_mode(False), torch.no_grad():  # training may use it too
        copy = source.clone() if copied else None
        found = key, copy, made()
    _KNOWN[source] = found
    return found[2]

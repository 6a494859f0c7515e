"""Padded batches, as attention gets them, and the packed sequences that memories read.

A memory is trained on what it reads, so it must not read padding. Masks say which tokens are
padding, on either side or in between, and which begin a new sequence in the middle of a row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..packing import without_values
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


class Aligned(NamedTuple):
    """The tokens of every row first and zeros behind them: one shape, whatever is padding.

    A token depends on those before it alone, so what is behind changes no output. It does change
    the state, which is not used.
    """

    real: Tensor  # [B, T], which tokens are no padding
    cu_seqlens: None = None

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, C]"""
        return _take(x.masked_fill(~self.real[..., None], 0), self._order())

    def unpack(self, y: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, C], zeros at padding."""
        return _take(y, self._order().argsort(1)).masked_fill(~self.real[..., None], 0)

    def _order(self) -> Tensor:
        return (~self.real).long().argsort(dim=1, stable=True)


def _take(x: Tensor, places: Tensor) -> Tensor:
    return x.gather(1, places[..., None].expand_as(x))


@torch.library.custom_op(
    "titans_kernels::padding",
    mutates_args=(),
    # Older releases of torch do not infer it: they take typing.List, not list.
    schema="(Tensor? attention_mask, Tensor? position_ids, SymInt[] batch, Device device, "
    "bool past, bool whole, SymInt? seen, SymInt? chunk) -> Tensor",
)
def _padding(
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    batch: list[int],
    device: torch.device,
    past: bool,
    whole: bool,
    seen: int | None,
    chunk: int | None,
) -> Tensor:
    """Which tokens are no padding, [B, T]: read where a graph runs, refused as without one."""
    B, T = batch
    real, begins = _read(attention_mask, position_ids, (B, T), device, past, seen, chunk)
    takes = "in one graph (fullgraph=True, export) it takes"
    if begins is not None:
        got = "several sequences in a row"
        raise ValueError(f"attention_mask: got {got}; {takes} one a row, or cu_seqlens")
    if whole and not bool(real.all()):
        got = "padding together with a cache or packed sequences"
        raise ValueError(f"attention_mask: got {got}; {takes} either")
    return real.clone()


@_padding.register_fake
def _(
    attention_mask: Any, position_ids: Any, batch: Any, device: Any, *_: Any, **__: Any
) -> Tensor:
    return torch.empty(batch, dtype=torch.bool, device=device)


def _one_graph() -> bool:
    """Whether the compiler that reads this must not break its graph, to look at values for one."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    translator: Any = InstructionTranslator.current_tx()
    names = ("one_graph", "error_on_graph_break")
    return any(getattr(translator, name, False) is True for name in names)


# As by torch.compiler.assume_constant_result, which would import the whole compiler now.
_one_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


def rows_of(
    x: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    past: bool = False,
    *,
    seen: int | None = None,
    chunk: int | None = None,
    whole: bool = False,
) -> Rows | Aligned | None:
    """How to pack x [B, T, C]; None where every row is one whole sequence. Waits for a GPU.

    In one graph rows are aligned, not packed, by what is read when it runs.

    Args:
        attention_mask: as `masks.read` takes it.
        position_ids: [B, T]. Without a mask, a position that does not follow the one before begins
            a sequence.
        past: whether the rows continue earlier ones, so that no sequence begins here.
        seen: the place of x in the mask. Default: at its end.
        chunk: after how many tokens attention no longer reaches back, within one sequence.
        whole: whether rows in one graph must have no padding, as where a state is kept.
    """
    if _says_nothing(x, attention_mask, position_ids, past):
        return None
    B, T = x.shape[:2]
    if torch.compiler.is_compiling() and (torch.compiler.is_exporting() or _one_graph()):
        place = ([B, T], x.device, past, whole, seen, chunk)
        return Aligned(_padding(attention_mask, position_ids, *place))
    real, begins = _read(attention_mask, position_ids, (B, T), x.device, past, seen, chunk)
    if begins is None and bool(real.all()):
        return None
    if begins is not None:
        lengths = torch.bincount(begins[real].cumsum(0) - 1)
    else:
        lengths = real.sum(1)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return Rows(real.flatten().nonzero()[:, 0], cu_seqlens, (B, T))


def _says_nothing(
    x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, past: bool
) -> bool:
    """Whether every row is one whole sequence, as far as can be known before values are read."""
    if without_values(x):  # nothing to look at; the shapes are the same
        return True
    unmarked = position_ids is None or position_ids.dim() != 2 or past or x.shape[1] < 2
    return attention_mask is None and unmarked


def _read(
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    batch: tuple[int, int],
    device: torch.device,
    past: bool,
    seen: int | None,
    chunk: int | None,
) -> tuple[Tensor, Tensor | None]:
    """Which tokens are no padding, and which begin a sequence if a row holds several, [B, T]."""
    if attention_mask is not None:
        real, begins = masks.read(attention_mask, batch, device, seen)
        if begins is not None and chunk is not None:
            begins = begins & ~_of_chunks(real, begins, position_ids, chunk)
    else:
        assert position_ids is not None
        real = torch.ones(batch, dtype=torch.bool, device=device)
        begins = F.pad(position_ids.diff(dim=1) != 1, (1, 0), value=True).expand(batch)
    if begins is None or not bool((begins.sum(1) > 1).any()):
        return real, None
    if past and chunk is None:
        raise ValueError("past_key_values: takes None together with packed sequences")
    return real, None if past else begins


def _of_chunks(real: Tensor, begins: Tensor, position_ids: Tensor | None, chunk: int) -> Tensor:
    """Which of the beginnings [B, T] are those of a chunk within a sequence."""
    place = real.cumsum(1) - 1
    grid = (place % chunk == 0) & (place > 0)
    if position_ids is not None and position_ids.dim() == 2:
        return grid & F.pad(position_ids.diff(dim=1) == 1, (1, 0), value=False)
    if bool((begins & ~grid).sum(1).gt(1).any()):
        raise ValueError("position_ids: got None, takes those of packed sequences with chunks")
    return grid


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
    whole: bool = False,
) -> Rows | Aligned | None:
    """`rows_of`, but the many layers of a host that are given the same tensor wait only once."""

    def made() -> Rows | Aligned | None:
        return rows_of(x, attention_mask, position_ids, past, seen=seen, chunk=chunk, whole=whole)

    source = position_ids if attention_mask is None else attention_mask
    if not isinstance(source, Tensor) or torch.compiler.is_compiling() or without_values(source):
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

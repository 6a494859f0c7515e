"""Titans with the memory as context of attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..packing import without_values
from ..transforms import values
from . import checking
from .attention import SegmentAttention
from .block import Block, BlockOptions, Gate
from .state import ContextState, choose, concatenate, divide

if TYPE_CHECKING:
    from typing_extensions import Unpack


class TitansMAC(Block[ContextState]):
    """Memory as context of attention (arXiv 2501.00663, section 4.1).

        x --+----------------------------+
            |                            |
            +-- memory, as the segment --+-- attention --+-- y -- rms, w_y ------------ * --- out
                began, without an update |               |                              |
                                  p -----+               +-- memory -- rms, w_m -- sigmoid
                                                         trained on y, read with y

    A sequence is read in segments. For segment t, of tokens S_t:

        h_t = M*_{t-1}(q_t)                 read with the weights before the segment            (21)
        S̃_t = [p_1 .. p_P | h_t | S_t]                                                          (22)
        y_t = Attn(S̃_t)                     of the segment's own tokens                         (23)
        M_t = M_{t-1}(y_t)                  the memory is trained on attention's output         (24)
        o_t = y_t ⊗ M*_t(y_t)               ⊗ as in `TitansMAG`                                 (25)

    Where the paper leaves it open, a token sees itself and earlier tokens only: token i attends to
    p, to h_1 .. h_i and to tokens 1 .. i of its segment; and its y_i reads the memory after the
    updates of y_1 .. y_i, not the rest. h_i has the position of token i; p has none.
    q_t is `NeuralMemory.recall` of x: the projection and the convolution, over segment borders, of
    queries. The residual connections and the norms around a block are the model's.

    [B, T, dim] -> ([B, T, dim], ContextState). With inner = heads * dim_head, the parameters are

        those of NeuralMemory + 4 dim inner + n_persistent dim + 2 dim

    Segments follow one another: each starts with the memory that the one before left. Sequences,
    packed or not, are read in parallel, whatever their lengths and wherever their segments end: a
    call takes as many rounds as the sequence with the most segments has.

    Args:
        segment (int): tokens of a segment. Semantics: a model is run with the segment it was
            trained with. Default: 512.
        rotary (bool): whether attention rotates queries and keys by their distance. Default: True.

    Examples:
        >>> import torch
        >>> from titans_kernels.layers import TitansMAC
        >>> block = TitansMAC(64, heads=2, segment=32)
        >>> out, state = block(torch.randn(1, 100, 64))
        >>> out, state = block.step(torch.randn(1, 64), state)
        >>> out.shape, state.length  # 3 segments and 5 tokens
        (torch.Size([1, 64]), tensor([5], dtype=torch.int32))
    """

    state_type = ContextState

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        dim_head: int | None = None,
        segment: int = 512,
        n_persistent: int = 4,
        rotary: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **memory: Unpack[BlockOptions],
    ) -> None:
        super().__init__(dim, heads, dim_head, n_persistent, device=device, dtype=dtype, **memory)
        self.segment = segment
        self.attention = SegmentAttention(
            dim, heads, self.dim_head, rotary, segment, device=device, dtype=dtype
        )
        self.gate = Gate(dim, device=device, dtype=dtype)

    def _start(self, sequences: int) -> None:
        """Persistent tokens are context of every segment; the memory does not read them."""

    def _read(
        self, x: Tensor, state: ContextState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, ContextState]:
        T = x.shape[1]
        sequences = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        opened = [0]  # tokens in the open segments; any will do for a step, which never overshoots
        if state is None:
            state = self._empty(x[:, :0], sequences)
        else:
            checking.lengths("state.length", state.length, sequences, self.segment - 1, x)
            if T != 1 and not without_values(state.length):  # shapes are the same whatever it is
                opened = values(state.length) or opened
        if cu_seqlens is not None and without_values(cu_seqlens):
            got = "one without values, as on the meta device"
            raise ValueError(f"cu_seqlens: got {got}, takes one that segments are counted by")
        lengths = [T] if cu_seqlens is None else values(cu_seqlens.diff()) or [T]

        n, filled = lengths[0], max(opened)
        if _same(lengths) and (_same(opened) or filled + n <= self.segment):
            # All end their segments at the same tokens, or none does.
            rows = x.reshape(sequences, n, self.dim)
            first = min(n, self.segment - filled)
            if n > self.segment and torch.compiler.is_compiling():
                from . import compilation  # not before: it loads Dynamo

                if compilation.graphs_may_break():
                    y, state = compilation.read_alike(self, rows, first, state)
                    return y.reshape(x.shape), state
            y, state = self._read_alike(rows, first, state)
            return y.reshape(x.shape), state

        order, tokens, ends = _in_rounds(lengths, opened, self.segment)
        order, tokens = order.to(x.device), tokens.to(x.device)
        sizes = [int(end[-1]) for end in ends]
        pieces = x.flatten(0, 1).index_select(0, tokens)[None].split(sizes, dim=1)
        state = state.index_select(order)
        y, state = self._read_rounds(pieces, ends, state)
        y = torch.empty_like(y).index_copy(1, tokens, y)
        return y.reshape(x.shape), state.index_select(order.argsort())

    def _read_alike(
        self, rows: Tensor, first: int, state: ContextState
    ) -> tuple[Tensor, ContextState]:
        """Sequences [N, n, dim] of which all end their open segment after `first` tokens."""
        parts = rows[:, :first], *rows[:, first:].split(self.segment, dim=1)
        out = []
        for part in [part for part in parts if part.shape[1]] or [rows]:
            y, state = self._read_segment(part.contiguous(), state, None)
            out.append(y)
        return torch.cat(out, 1), state

    def _read_rounds(
        self, rounds: Sequence[Tensor], ends: Sequence[Tensor], state: ContextState
    ) -> tuple[Tensor, ContextState]:
        """In each round a piece of every sequence, packed with cu_seqlens `ends`.

        Sequences that have read all they have drop out: they are the last of the state.
        """
        out: list[Tensor] = []
        done: list[ContextState] = []
        for x, cu_seqlens in zip(rounds, ends, strict=True):
            if len(cu_seqlens) <= len(state.length):
                state, finished = divide(state, len(cu_seqlens) - 1)
                done.insert(0, finished)
            y, state = self._read_segment(x, state, cu_seqlens)
            out.append(y)
        return torch.cat(out, 1), concatenate([state, *done]) if done else state

    def _read_segment(
        self, x: Tensor, state: ContextState, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, ContextState]:
        """Tokens of the open segments, up to their end at most: [N, n, dim], or packed."""
        retrieved, past = self.memory.recall(x, state.past, cu_seqlens)
        y, keys, values = self.attention(
            x, retrieved, state.keys, state.values, state.length, self.persistent, cu_seqlens
        )
        m, memory = self.memory(y, state.memory, cu_seqlens)

        n = x.shape[1] if cu_seqlens is None else cu_seqlens.diff().to(state.length)
        length = state.length + n
        full = length == self.segment
        # The next segment reads the memory as this one left it; the queries' convolution continues.
        past = dataclasses.replace(choose(full, memory, past), convolution=past.convolution)
        keys, values = (z.masked_fill(full.view(-1, 1, 1, 1), 0) for z in (keys, values))
        length = length.masked_fill(full, 0)
        return self.gate(y, m), ContextState(memory, past, keys, values, length)

    def _empty(self, x: Tensor, sequences: int) -> ContextState:
        """The state of sequences that have not begun."""
        nothing = x.new_empty(sequences, 0, self.dim)
        length = torch.zeros(sequences, dtype=torch.int32, device=x.device)
        _, memory = self.memory(nothing)
        _, keys, values = self.attention(nothing, nothing, None, None, length)
        return ContextState(memory, memory, keys, values, length)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, segment={self.segment}"


def _same(values: list[int]) -> bool:
    return values[:-1] == values[1:]


def _in_rounds(
    lengths: list[int], opened: list[int], segment: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """How sequences are read in parallel, in each round one segment of all that have one.

    Args:
        lengths: of N sequences end to end, in tokens; [n] if each has n.
        opened: tokens in the open segments before them; [n] likewise.

    Returns:
        (order, tokens, ends): the sequences, those of most rounds first, [N]; their tokens, round
        after round and each in that order, [T]; and of every round the cu_seqlens of those that
        take part in it. All on the CPU, where to look at them does not wait for a GPU.
    """
    # Places count from the start of the open segment: a sequence goes from `begin` to `end`.
    begin, length = torch.broadcast_tensors(torch.tensor(opened), torch.tensor(lengths))
    end = begin + length
    order = ((end + segment - 1) // segment).argsort(descending=True, stable=True)
    shift = length.cumsum(0) - end  # from a place to the token that stands there
    begin, end, shift = begin[order], end[order], shift[order]

    border = segment * torch.arange(-(-int(end[0]) // segment) + 1)[:, None]
    reached = border.clamp(begin, end)  # [rounds + 1, N]
    pieces = reached.diff(dim=0)
    # A piece is a run of tokens.
    start, size = (reached[:-1] + shift).flatten(), pieces.flatten()
    before = size.cumsum(0) - size
    tokens = torch.arange(int(length.sum())) + (start - before).repeat_interleave(size)
    left = values((end > border[:-1]).sum(1))
    ends = [F.pad(piece[:n].cumsum(0), (1, 0)) for piece, n in zip(pieces, left, strict=True)]
    return order, tokens, ends

"""Titans with the memory as context of attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import checking
from .attention import SegmentAttention
from .block import Block, Gate, MemoryOptions
from .state import ContextState, LayerState, choose, concatenate

if TYPE_CHECKING:
    from typing_extensions import Unpack


class TitansMAC(Block[ContextState]):
    """Memory as context: attention decides what to learn (arXiv 2501.00663, section 4.1).

        x --+----------------------------+
            |                            |
            +-- memory, as the segment --+-- attention --+-- y -- rms, w_y ------------ * --- out
                began: asked, not taught |               |                              |
                                  p -----+               +-- memory -- rms, w_m -- sigmoid
                                                         learns y, is asked y

    A sequence is read in segments. For segment t, of tokens S_t:

        h_t = M*_{t-1}(q_t)                 what the memory before the segment answers to S_t   (21)
        S̃_t = [p_1 .. p_P | h_t | S_t]                                                          (22)
        y_t = Attn(S̃_t)                     of the segment's own tokens                         (23)
        M_t = M_{t-1}(y_t)                  the memory learns what attention found              (24)
        o_t = y_t ⊗ M*_t(y_t)               ⊗ as in `TitansMAG`                                 (25)

    Where the paper leaves it open, a token sees itself and earlier tokens only: token i attends to
    p, to h_1 .. h_i and to tokens 1 .. i of its segment; and its y_i is asked of the memory that
    has learned y_1 .. y_i, not the rest. h_i stands where token i does; p has no place.
    q_t is `NeuralMemory.recall` of x: the projection and the convolution, over segment borders, of
    queries. The residual connections and the norms around a block are the model's.

    [B, T, dim] -> ([B, T, dim], ContextState). With inner = heads * dim_head, the parameters are

        those of NeuralMemory + 4 dim inner + n_persistent dim + 2 dim

    Segments follow one another: one starts with what the one before has learned. Packed sequences,
    and rows that reach the ends of their segments at different tokens of one call, are read one
    after another; decoding a token is always one batch.

    Args:
        dim (int): width of the model.
        heads (int): memories side by side, and heads of the attention. Default: 4.
        dim_head (int | None): width of queries, keys and values of both. Default: dim / heads.
        segment (int): tokens of a segment. Semantics: a model is run with the segment it was
            trained with. Default: 512.
        n_persistent (int): P, persistent tokens. Default: 4.
        rotary (bool): whether attention rotates queries and keys by their distance. Default: True.
        device, dtype: of the parameters.
        depth, expansion, chunk_size, activation, residual, norm, per_layer_gates, conv_size,
            max_learning_rate, backend: of the memory, as `NeuralMemory` takes them.

    Example:
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
        **memory: Unpack[MemoryOptions],
    ) -> None:
        super().__init__(dim, heads, dim_head, n_persistent, device=device, dtype=dtype, **memory)
        checking.integer("segment", segment, 1)
        checking.rotary(rotary, self.dim_head)
        self.segment = segment
        self.attention = SegmentAttention(
            dim, heads, self.dim_head, rotary, segment, device=device, dtype=dtype
        )
        self.gate = Gate(dim, device=device, dtype=dtype)

    def _start(self, sequences: int) -> None:
        """Persistent tokens are context of every segment; nobody reads them beforehand."""

    def _read(
        self, x: Tensor, state: ContextState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, ContextState]:
        T = x.shape[1]
        opened = [0]  # tokens in the open segments; any will do for a step, which never overshoots
        if state is None:
            state = self._empty(x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1)
        else:
            self._check_state(x, state, cu_seqlens)
            if T != 1:
                opened = state.length.tolist()
        if cu_seqlens is not None:
            rows = x.split(cu_seqlens.diff().tolist(), dim=1)
            return self._one_by_one(rows, state, dim=1)
        filled = max(opened, default=0)
        if len(set(opened)) > 1 and filled + T > self.segment:
            return self._one_by_one(x.split(1), state, dim=0)

        first = min(T, self.segment - filled)
        out: list[Tensor] = []
        for part in (x[:, :first], *x[:, first:].split(self.segment, dim=1)):
            if part.shape[1] or not out:
                y, state = self._read_segment(part, state)
                out.append(y)
        return torch.cat(out, 1), state

    def _read_segment(self, x: Tensor, state: ContextState) -> tuple[Tensor, ContextState]:
        """Tokens [N, n, dim] of the open segments, up to their end at most."""
        retrieved, past = self.memory.recall(x, state.past)
        y, keys, values = self.attention(
            x, retrieved, state.keys, state.values, state.length, self.persistent
        )
        m, memory = self.memory(y, state.memory)

        length = state.length + x.shape[1]
        full = length == self.segment
        # The next segment asks what this one has learned; its questions follow on this one's.
        past = LayerState(choose(full, memory.memory, past.memory), past.convolution)
        keys, values = (z.masked_fill(full.view(-1, 1, 1, 1), 0) for z in (keys, values))
        length = length.masked_fill(full, 0)
        return self.gate(y, m), ContextState(memory, past, keys, values, length)

    def _one_by_one(
        self, rows: tuple[Tensor, ...], state: ContextState, dim: int
    ) -> tuple[Tensor, ContextState]:
        """Sequences [1, T_n, dim] that end their segments at different tokens; joined along dim."""
        if not rows:
            return self._nothing(1), state
        out, states = [], []
        for n, x in enumerate(rows):
            one = state.index_select(torch.tensor([n]))
            y, one = self._read(x, one, None)
            out.append(y)
            states.append(one)
        return torch.cat(out, dim), concatenate(states)

    def _empty(self, sequences: int) -> ContextState:
        """The state of sequences that have not begun."""
        nothing = self._nothing(sequences)
        k = self.attention.k_proj(nothing)  # in the dtype that autocast gives it
        slots = k.new_zeros(sequences, 2, self.segment, k.shape[2])
        _, memory = self.memory(nothing)
        length = torch.zeros(sequences, dtype=torch.int32, device=k.device)
        return ContextState(memory, memory, slots, slots, length)

    def _check_state(self, x: Tensor, state: ContextState, cu_seqlens: Tensor | None) -> None:
        sequences = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        k = self.attention.k_proj(x[:, :0])
        takes = (sequences, 2, self.segment, k.shape[2])
        for name in ("keys", "values"):
            held = getattr(state, name)
            checking.held(f"state.{name}", held, takes, "[N, 2, segment, heads * dim_head]", k)
        checking.lengths("state.length", state.length, sequences, self.segment - 1, k)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, segment={self.segment}"

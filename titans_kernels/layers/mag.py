"""Titans with the memory as a gate of attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .block import Gate, repeat
from .state import HybridState
from .window import WindowBlock


class TitansMAG(WindowBlock):
    """Memory as a gate of attention, in parallel with it (arXiv 2501.00663, section 4.2).

        p, x --+-- sliding-window attention --- rms, w_y ------------ * --- out
               |                                                      |
               +-- memory --------------------- rms, w_m -- sigmoid --+

        x̃ = [p_1 .. p_P | x]                                          (26)
        y = SW-Attn*(x̃), every token attends to p and a window        (27)
        o = y ⊗ M(x̃) = (w_y * rms(y)) * sigmoid(w_m * rms(M(x̃)))      (28)

    The memory is trained on the persistent tokens before a sequence's first. [B, T, dim] ->
    ([B, T, dim], HybridState). With inner = heads * dim_head, the parameters are

        those of NeuralMemory + 4 dim inner + n_persistent dim + 2 dim

    Args:
        window (int): tokens that a token attends to, itself included. Default: 512.
        rotary (bool): whether attention rotates queries and keys by their distance. Default: True.

    Examples:
        >>> import torch
        >>> from titans_kernels.layers import TitansMAG
        >>> block = TitansMAG(64, heads=2, window=32)
        >>> out, state = block(torch.randn(1, 100, 64))
        >>> out, state = block.step(torch.randn(1, 64), state)
        >>> out.shape, state.attention.keys.shape
        (torch.Size([1, 64]), torch.Size([1, 31, 64]))
    """

    def _add_parts(self, **place: Any) -> None:
        self.gate = Gate(self.dim, **place)

    def _read(
        self, x: Tensor, state: HybridState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, HybridState]:
        m, memory = self.memory(x, None if state is None else state.memory, cu_seqlens)
        y, attention = self.attention(x, state and state.attention, cu_seqlens, self.persistent)
        return self.gate(y, m), HybridState(memory, attention)

    def _start(self, sequences: int) -> HybridState | None:
        if self.persistent is None:
            return None
        # The window holds no persistent token: attention sees them all, always.
        _, attention = self.attention(self.persistent.new_empty(sequences, 0, self.dim))
        _, memory = self.memory(self.persistent[None])
        return HybridState(repeat(memory, sequences), attention)

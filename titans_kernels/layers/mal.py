"""Titans with the memory as a layer before attention."""

from __future__ import annotations

from torch import Tensor

from .state import HybridState
from .window import WindowBlock


class TitansMAL(WindowBlock):
    """Memory as a layer: attention over the memory's outputs (arXiv 2501.00663, section 4.3).

        p, x --- memory --- sliding-window attention --- out

        x̃ = [p_1 .. p_P | x]        (29)
        y = M(x̃)                    (30)
        o = SW-Attn(y)              (31)

    The persistent tokens are the first that a sequence reads, and no more than that: the memory is
    trained on them, attention sees them while they are in its window. [B, T, dim] -> ([B, T, dim],
    HybridState). With inner = heads * dim_head, the parameters are

        those of NeuralMemory + 4 dim inner + n_persistent dim

    Args:
        window (int): tokens that a token attends to, itself included. Default: 512.
        rotary (bool): whether attention rotates queries and keys by their distance. Default: True.

    Examples:
        >>> import torch
        >>> from titans_kernels.layers import TitansMAL
        >>> block = TitansMAL(64, heads=2, window=32)
        >>> out, state = block(torch.randn(1, 100, 64))
        >>> out, state = block.step(torch.randn(1, 64), state)
        >>> out.shape, state.attention.keys.shape
        (torch.Size([1, 64]), torch.Size([1, 31, 64]))
    """

    def _read(
        self, x: Tensor, state: HybridState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, HybridState]:
        y, memory = self.memory(x, None if state is None else state.memory, cu_seqlens)
        o, attention = self.attention(y, state and state.attention, cu_seqlens)
        return o, HybridState(memory, attention)

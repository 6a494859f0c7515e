"""Titans without attention: the memory alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import decoding
from .block import Block, BlockOptions
from .state import LayerState

if TYPE_CHECKING:
    from typing_extensions import Unpack


class TitansLMM(Block[LayerState]):
    """The long-term memory as a model's only way to mix tokens (arXiv 2501.00663, section 4.3).

        p, x --- memory --- out

        x̃ = [p_1 .. p_P | x]
        o = M(x̃)

    `NeuralMemory`, trained on the persistent tokens p before a sequence's first. Without any,
    the default, it is `NeuralMemory`. [B, T, dim] -> ([B, T, dim], LayerState). Parameters:

        those of NeuralMemory + n_persistent dim

    Examples:
        >>> import torch
        >>> from titans_kernels.layers import TitansLMM
        >>> block = TitansLMM(64, heads=2, n_persistent=4)
        >>> out, state = block(torch.randn(1, 100, 64))
        >>> out, state = block.step(torch.randn(1, 64), state)
        >>> out.shape, state.memory.length  # 4 + 101 tokens in chunks of 16
        (torch.Size([1, 64]), tensor([9], dtype=torch.int32))
    """

    state_type = LayerState

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        dim_head: int | None = None,
        n_persistent: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **memory: Unpack[BlockOptions],
    ) -> None:
        super().__init__(dim, heads, dim_head, n_persistent, device=device, dtype=dtype, **memory)
        self.state_type = self.memory.state_type

    def _read(
        self, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        return self.memory(x, state, cu_seqlens)

    def _overwrite(self, x: Tensor, state: LayerState) -> Tensor:
        if decoding.is_plain(self):
            return self.memory.step(x, state, inplace=True)[0]
        return super()._overwrite(x, state)

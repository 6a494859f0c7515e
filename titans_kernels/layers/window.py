"""What the blocks with sliding-window attention have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .attention import WindowAttention
from .block import Block, BlockOptions
from .state import HybridState

if TYPE_CHECKING:
    from typing_extensions import Unpack


class WindowBlock(Block[HybridState]):
    """A memory and sliding-window attention, of as many heads; `TitansMAG` and `TitansMAL`."""

    state_type = HybridState

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        dim_head: int | None = None,
        window: int = 512,
        n_persistent: int = 4,
        rotary: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **memory: Unpack[BlockOptions],
    ) -> None:
        super().__init__(dim, heads, dim_head, n_persistent, device=device, dtype=dtype, **memory)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.attention = WindowAttention(dim, heads, self.dim_head, rotary, window, **place)
        self._add_parts(**place)

    def _add_parts(self, **place: Any) -> None:
        """What a block has besides its memory and attention."""

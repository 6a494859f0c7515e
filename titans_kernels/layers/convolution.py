"""A short causal convolution, a filter per channel, that goes on where it left off."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ShortConvolution(nn.Module):
    """`y_t = sum_j weight[:, j] x_{t - size + 1 + j}`, and what a sequence's next token needs of x.

    A sum of `size` shifted products: a token's result does not depend on how the sequence is cut,
    not even in its rounding. No bias. Accumulates in float32 at least and returns that.

    Args:
        channels (int): width of x.
        size (int): taps, at least 1; a sequence's last size - 1 inputs are its history.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels, self.size = channels, size
        self.weight = nn.Parameter(torch.empty(channels, size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal, so that inputs of unit variance give outputs of unit variance."""
        nn.init.normal_(self.weight, std=self.size**-0.5)

    def forward(
        self, x: Tensor, history: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x [B, T, channels], history [N, size - 1, channels] or None for zeros -> (y, history)."""
        B, T, _ = x.shape
        before = self.size - 1
        if history is None:
            sequences = B if cu_seqlens is None else len(cu_seqlens) - 1
            history = x.new_zeros(sequences, before, self.channels)

        if cu_seqlens is None:
            past = torch.cat([history, x], dim=1)  # [B, before + T, channels]
            # Not a view: a state must not keep its whole segment alive.
            return self._filter(past, T), past[:, T:].clone()

        # Every sequence behind its own history, all in one row: no filter reaches into a neighbour.
        ends = cu_seqlens.to(x.device, torch.int64)
        n = torch.arange(len(history), device=x.device)  # [N]
        tokens = torch.arange(T, device=x.device)
        shift = n.repeat_interleave(ends.diff(), output_size=T) * before  # [T]
        rows = torch.arange(before, device=x.device)
        first = (ends[:-1] + n * before)[:, None] + rows  # [N, before]
        last = (ends[1:] + n * before)[:, None] + rows
        past = x.new_zeros(T + history.shape[0] * before, self.channels)
        past = past.index_copy(0, tokens + shift + before, x[0])
        past = past.index_copy(0, first.flatten(), history.flatten(0, 1))
        y = self._filter(past[None], len(past) - before)
        return y[:, tokens + shift], past[last]

    def _filter(self, past: Tensor, count: int) -> Tensor:
        dtype = torch.promote_types(past.dtype, torch.float32)
        past, weight = past.to(dtype), self.weight.to(dtype)
        y = past[:, :count] * weight[:, 0]
        for j in range(1, self.size):
            y = torch.addcmul(y, past[:, j : j + count], weight[:, j])
        return y

    def extra_repr(self) -> str:
        return f"{self.channels}, size={self.size}"

"""A short causal convolution, a filter per channel, that continues from its last inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .sealing import lasting


class ShortConvolution(nn.Module):
    """The filters of one stream, which `convolve` applies. No bias.

    They are read by calling the module, as every weight is: hooks that fetch weights (offloading,
    sharding) run on calls alone.

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

    def forward(self) -> Tensor:
        """The filters, [channels, size]."""
        return lasting(self, self.weight)

    def extra_repr(self) -> str:
        return f"{self.channels}, size={self.size}"


def convolve(
    filters: Sequence[Tensor],
    streams: Sequence[Tensor],
    histories: Sequence[Tensor] | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """S streams [B, T, channels], each through a convolution of its own, in the steps of one.

        y_t = sum_j filter[:, j] x_{t - size + 1 + j}

    A sum of `size` shifted products: a token's result does not depend on how the sequence is cut,
    not even in its rounding. Accumulates in float32 at least and returns that.

    Args:
        filters: S of [channels, size].
        histories: the last inputs of every stream, S of [N, size - 1, channels]; None for zeros.

    Returns:
        (y, histories): [B, S, T, channels]; S of [N, size - 1, channels].
    """
    weight = torch.stack(list(filters))  # [S, channels, size]
    x, before = streams[0], weight.shape[-1] - 1
    B, T, channels = x.shape
    if histories is None:
        sequences = B if cu_seqlens is None else len(cu_seqlens) - 1
        histories = [x.new_zeros(sequences, before, channels)] * len(streams)

    if cu_seqlens is None:
        rows = [part for pair in zip(histories, streams, strict=True) for part in pair]
        past = torch.cat(rows, dim=1).view(B, len(streams), before + T, channels)
        # Not a view: a state must not keep its whole segment alive.
        return _filter(past, weight, T), past[:, :, T:].clone().unbind(1)

    # Every sequence behind its own history, all in one row: no filter reaches into a neighbour.
    N, ends = len(cu_seqlens) - 1, cu_seqlens.to(x.device, torch.int64)
    n = torch.arange(N, device=x.device)
    tokens = torch.arange(T, device=x.device)
    shift = n.repeat_interleave(ends.diff(), output_size=T) * before  # [T]
    rows_before = torch.arange(before, device=x.device)
    first = (ends[:-1] + n * before)[:, None] + rows_before  # [N, before]
    last = (ends[1:] + n * before)[:, None] + rows_before
    past = x.new_zeros(len(streams), T + N * before, channels)
    past = past.index_copy(1, tokens + shift + before, torch.cat(list(streams)))
    past = past.index_copy(1, first.flatten(), torch.stack(list(histories)).flatten(1, 2))
    y = _filter(past[None], weight, past.shape[1] - before)
    return y[:, :, tokens + shift], past[:, last].unbind()


def last_inputs(
    streams: Sequence[Tensor], histories: Sequence[Tensor], cu_seqlens: Tensor | None
) -> tuple[Tensor, ...]:
    """The histories that `convolve` returns, without the convolution."""
    before = histories[0].shape[1]
    if cu_seqlens is None:
        pairs = zip(histories, streams, strict=True)
        rows = [torch.cat([h, x[:, max(0, x.shape[1] - before) :]], 1) for h, x in pairs]
        return tuple(x[:, x.shape[1] - before :].clone() for x in rows)
    # A place before a sequence's first token is one in its history.
    ends = cu_seqlens.to(histories[0].device, torch.int64)
    place = ends.diff()[:, None] + torch.arange(-before, 0, device=ends.device)  # [N, before]
    token, old = (ends[:-1, None] + place).clamp(min=0), (place + before).clamp(max=before - 1)
    n = torch.arange(len(place), device=ends.device)[:, None]
    return tuple(
        torch.where((place >= 0)[..., None], _rows(x[0], token), h[n, old])
        for h, x in zip(histories, streams, strict=True)
    )


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x[index], and zeros where x has no rows."""
    return x[index] if len(x) else x.new_zeros(*index.shape, x.shape[-1])


def _filter(past: Tensor, weight: Tensor, count: int) -> Tensor:
    """[B, S, rows, channels] to the `count` of them that have all their past."""
    dtype = torch.promote_types(past.dtype, torch.float32)
    past, weight = past.to(dtype), weight.to(dtype).unsqueeze(1)
    y = past[:, :, :count] * weight[..., 0]
    for j in range(1, weight.shape[-1]):
        y = torch.addcmul(y, past[:, :, j : j + count], weight[..., j])
    return y

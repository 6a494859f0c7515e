"""The attention of the Titans blocks: over a sliding window, or over one segment and its context.

Tokens see the block's persistent tokens, wherever they are, and what lies a bounded way back. Only
how far back enters: queries and keys are rotated by where they stand in the window or the segment,
so nothing depends on how long a sequence has become, nor on where it was cut.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..numeric import wide
from ..packing import surely, without_values
from ..transforms import transforming, values
from . import checking
from .state import WindowState


class Attention(nn.Module):
    """Projections, and softmax attention between them. No biases: 4 dim heads dim_head parameters.

    Args:
        dim, heads, dim_head (int): widths of tokens and heads.
        rotary (bool): whether queries and keys are rotated by their positions.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        rotary: bool,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checking.rotary(rotary, dim_head)
        self.heads, self.dim_head, self.rotary = heads, dim_head, rotary
        inner = heads * dim_head

        def linear(d_in: int, d_out: int) -> nn.Linear:
            return nn.Linear(d_in, d_out, bias=False, device=device, dtype=dtype)

        self.q_proj, self.k_proj, self.v_proj = (linear(dim, inner) for _ in range(3))
        self.out_proj = linear(inner, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: tuple[Tensor, Tensor],
        visible: Tensor,
        prefix: Tensor | None,
    ) -> Tensor:
        """q [N, T, inner], k, v [N, K, inner] -> what the queries see, [N, T, inner].

        Args:
            positions: of queries and of keys, [T] and [K], or [N, T] where sequences differ.
            visible: bool [T, K] or [N, T, K].
            prefix: [P, dim], tokens that every query sees besides, and sees without a position.
        """
        q, k, v = (x.unflatten(-1, (self.heads, self.dim_head)).transpose(1, 2) for x in (q, k, v))
        plain = q
        if self.rotary:
            q, k = _rotate(q, positions[0]), _rotate(k, positions[1])
        if prefix is not None:
            before = (projection(prefix) for projection in (self.k_proj, self.v_proj))
            pk, pv = (
                x.unflatten(-1, (self.heads, self.dim_head))
                .transpose(0, 1)
                .expand(q.shape[0], -1, -1, -1)
                for x in before
            )
            if self.rotary:
                # Queries meet them as they are, not rotated: in features of their own.
                q, k = torch.cat([q, plain], -1), F.pad(k, (0, self.dim_head))
                pk = F.pad(pk, (self.dim_head, 0))
            k, v = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
            visible = F.pad(visible, (len(prefix), 0), value=True)
        if torch.compiler.is_exporting():  # the unfused form, of unequal widths, fixes the length
            v = F.pad(v, (0, q.shape[-1] - self.dim_head))
        mask = visible[:, None] if visible.dim() == 3 else visible
        with _any_derivative():
            o = F.scaled_dot_product_attention(q, k, v, mask, scale=self.dim_head**-0.5)
        return o[..., : self.dim_head].transpose(1, 2).flatten(2)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, dim_head={self.dim_head}, rotary={self.rotary}"


def _any_derivative() -> AbstractContextManager[Any]:
    """The fused forms of attention have first derivatives in reverse, and no others."""
    if transforming():
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def _rotate(x: Tensor, positions: Tensor) -> Tensor:
    """x [N, H, T, D]: pair i, of entries i and D/2 + i, turned by position 10000^(-2i / D)."""
    half = x.shape[-1] // 2
    a, b = wide(x).split(half, -1)
    exponent = torch.arange(half, device=x.device, dtype=a.dtype) / -half
    angle = positions.to(a.dtype)[..., None] * 10_000.0**exponent  # [T, D / 2] or [N, T, D / 2]
    if angle.dim() == 3:
        angle = angle[:, None]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


class WindowAttention(Attention):
    """A token sees itself, the window - 1 tokens before it, and the prefix: linear in T."""

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        rotary: bool,
        window: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        checking.state_rows("window", window)
        super().__init__(dim, heads, dim_head, rotary, device=device, dtype=dtype)
        self.window = window

    def forward(
        self,
        x: Tensor,
        state: WindowState | None = None,
        cu_seqlens: Tensor | None = None,
        prefix: Tensor | None = None,
    ) -> tuple[Tensor, WindowState]:
        """x [B, T, dim], and where its sequences stand -> ([B, T, dim], state)."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        token = None
        if cu_seqlens is not None:  # a row for every sequence, as long as the longest
            lengths, token = _rows(cu_seqlens, x)
            longest = _longest(cu_seqlens, x)
            q, k, v = (_unpack(y, token, len(lengths), longest) for y in (q, k, v))
        if state is None:
            N, _, inner = k.shape
            nothing = k.new_zeros(N, self.window - 1, inner)
            state = WindowState(
                nothing, nothing, torch.zeros(N, dtype=torch.int32, device=x.device)
            )
        else:
            self._check_state(state, k)

        counts = None if token is None else lengths
        state, keys, values, after = self._window(k, v, state, counts)
        o = self._in_blocks(q, keys, values, state.length, prefix)
        if token is not None:
            o = o[token][None]
        return self.out_proj(o), after

    def _window(
        self, k: Tensor, v: Tensor, state: WindowState, lengths: Tensor | None
    ) -> tuple[WindowState, Tensor, Tensor, WindowState]:
        """Keys and values of a call, behind those of the state, and the state after them.

        Args:
            lengths: [N], tokens of every sequence; None: all have T.

        Returns:
            (state, keys, values, after): keys and values [N, window - 1 + T, inner].
        """
        before, (N, T, _) = self.window - 1, k.shape
        keys, values = torch.cat([state.keys, k], 1), torch.cat([state.values, v], 1)
        if lengths is None:
            # Not views: a state must not keep its whole segment alive.
            length = state.length + T
            last = keys[:, T:].clone(), values[:, T:].clone()
        else:
            length = state.length + lengths
            row = torch.arange(N, device=k.device)[:, None]
            place = lengths[:, None] + torch.arange(before, device=k.device)
            last = keys[row, place], values[row, place]
        length = length.clamp(max=before).to(torch.int32)
        return state, keys, values, WindowState(*last, length)

    def _in_blocks(
        self, q: Tensor, keys: Tensor, values: Tensor, length: Tensor, prefix: Tensor | None
    ) -> Tensor:
        """q [N, T, inner], keys and values [N, window - 1 + T, inner] -> [N, T, inner].

        A block of `window` queries needs the keys of its own tokens and of the block before. The
        first block alone may meet slots that were never filled; all others run in parallel, so that
        the work is the same few operations at any length.
        """
        W, (N, T, _) = self.window, q.shape
        slot = torch.arange(2 * W, device=q.device)
        query = slot[W:]
        ago = query[:, None] - slot
        visible = (ago >= 0) & (ago < W)  # [W, 2 W]; query i stands in slot W + i
        filled = slot >= W - length[:, None]  # [N, 2 W]
        first = visible & filled[:, None]
        if surely(T <= W):
            return self.attend(
                q, keys, values, (query[:T], slot[1 : W + T]), first[:, :T, 1 : W + T], prefix
            )

        count, compiling = (T + W - 1) // W, torch.compiler.is_compiling()
        if torch.compiler.is_exporting():
            count = count + 2  # of a maximum it cannot prove that it fits all lengths
        elif compiling:
            count = torch.sym_max(count, 3)  # a size of 1 would have a graph of its own
        behind = count * W - T

        def blocks(x: Tensor) -> Tensor:
            return x.unfold(1, W, W).transpose(2, 3)

        def pairs(x: Tensor) -> Tensor:
            x = blocks(F.pad(x, (0, 0, 1, behind)))  # their first is in slot 1
            return torch.cat([x[:, :-1], x[:, 1:]], 2)

        q = blocks(F.pad(q, (0, 0, 0, behind)))  # [N, count, W, inner]
        keys, values = pairs(keys), pairs(values)  # [N, count, 2 W, inner]
        o = self.attend(q[:, 0], keys[:, 0], values[:, 0], (query, slot), first, prefix)
        q, keys, values = (x[:, 1:].flatten(0, 1) for x in (q, keys, values))
        later = self.attend(q, keys, values, (query, slot), visible, prefix)
        o = torch.cat([o, later.unflatten(0, (N, -1)).flatten(1, 2)], 1)
        # The same as a view, of which a graph would ask whether it is all.
        return o.index_select(1, torch.arange(T, device=q.device)) if compiling else o[:, :T]

    def _check_state(self, state: WindowState, k: Tensor) -> None:
        if not isinstance(state, WindowState):
            got = type(state).__name__
            raise TypeError(f"state.attention: got {got}, takes a WindowState")
        takes = (k.shape[0], self.window - 1, k.shape[2])
        for name in ("keys", "values"):
            held, meaning = getattr(state, name), "[N, window - 1, heads * dim_head]"
            checking.held(f"state.attention.{name}", held, takes, meaning, k)
        checking.lengths("state.attention.length", state.length, k.shape[0], self.window - 1, k)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, window={self.window}"


def _longest(cu_seqlens: Tensor, x: Tensor) -> int:
    """Tokens of the longest sequence; where there are no values, as many as it may have."""
    if without_values(cu_seqlens):
        return x.shape[1]
    return max(values(cu_seqlens.diff()), default=0)


def _rows(cu_seqlens: Tensor, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The lengths of packed sequences, and of every token its sequence and its place there."""
    ends = cu_seqlens.to(x.device, torch.int64)
    lengths = ends.diff()
    n = torch.arange(len(lengths), device=x.device).repeat_interleave(
        lengths, output_size=x.shape[1]
    )
    return lengths, (n, torch.arange(x.shape[1], device=x.device) - ends[n])


def _unpack(x: Tensor, token: tuple[Tensor, Tensor], rows: int, longest: int) -> Tensor:
    """[1, T, C] -> [N, longest, C], zeros behind a sequence's end."""
    return x.new_zeros(rows, longest, x.shape[2]).index_put(token, x[0])


class SegmentAttention(Attention):
    """A segment's token i sees the prefix, the retrieved tokens up to h_i, and its own up to i.

    Paper, equation 22: attention over [prefix | retrieved | segment]. h_j was retrieved with token
    j, so token i < j must not attend to it. h_j has the position of token j.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        rotary: bool,
        segment: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        checking.state_rows("segment", segment)
        super().__init__(dim, heads, dim_head, rotary, device=device, dtype=dtype)
        self.segment = segment

    def forward(
        self,
        x: Tensor,
        retrieved: Tensor,
        keys: Tensor | None,
        values: Tensor | None,
        length: Tensor,
        prefix: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens x [N, n, dim], or packed, of open segments with `length` [N] tokens before them.

        Returns (y, of x's shape, keys, values), the latter [N, 2, segment, inner] with x entered;
        None before a sequence's first token.
        """
        N, n, token = len(length), x.shape[1], None
        q, both = self.q_proj(x), torch.stack([retrieved, x], 2)
        k, v = self.k_proj(both), self.v_proj(both)  # [B, T, 2, inner]
        takes = (N, 2, self.segment, k.shape[3])
        if keys is None or values is None:
            keys = values = k.new_zeros(takes)
        for name, held in (("keys", keys), ("values", values)):
            checking.held(f"state.{name}", held, takes, "[N, 2, segment, heads * dim_head]", k)
        if cu_seqlens is not None:  # a row for every sequence, as long as the longest
            _, token = _rows(cu_seqlens, x)
            n = _longest(cu_seqlens, x)
            q = _unpack(q, token, N, n)
        place = length[:, None] + torch.arange(n, device=x.device)  # [N, n]
        if token is None:
            entry = torch.arange(N, device=x.device)[:, None], place
        else:  # of tokens alone: nothing behind a sequence's end is ever a key
            entry = token[0][None], place[token][None]
        keys, values = (
            held.transpose(1, 2).index_put(entry, new).transpose(1, 2)
            for held, new in ((keys, k), (values, v))
        )
        slot = torch.arange(self.segment, device=x.device)
        visible = (slot <= place[..., None]).repeat(1, 1, 2)  # [N, n, 2 segment]
        places = place, slot.repeat(2)
        y = self.attend(q, keys.flatten(1, 2), values.flatten(1, 2), places, visible, prefix)
        if token is not None:
            y = y[token][None]
        return self.out_proj(y), keys, values

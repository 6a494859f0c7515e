"""A Titans layer where a model expects attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .rows import rows_once
from .variants import build


class TitansAttention(nn.Module):
    """A Titans block with the calling convention of attention in flash-linear-attention.

    `(hidden_states, attention_mask, past_key_values, use_cache, ..., cu_seqlens)` ->
    `(out, None, past_key_values)`. Reads left to right, whatever the mask: of a mask it takes which
    tokens are padding, which it neither reads nor answers (zeros), and where sequences begin.

    Args:
        hidden_size (int): width of the model.
        num_heads (int): memories side by side, and heads of the block's attention.
        variant (str): "mac", "mag", "mal" or "lmm".
        layer_idx (int | None): where in a cache of transformers the state is kept; needed to use
            one.
        options: as the block of that variant takes them.

    Example:
        >>> import torch
        >>> from titans_kernels.adapt import TitansAttention
        >>> layer = TitansAttention(64, num_heads=2, variant="lmm")
        >>> padding = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
        >>> out, _, _ = layer(torch.randn(2, 4, 64), attention_mask=padding)
        >>> out.shape, bool(out[0, :2].any())
        (torch.Size([2, 4, 64]), False)
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        variant: str = "mac",
        layer_idx: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.variant, self.layer_idx = variant, layer_idx
        self.beside, self.others = False, 0
        self.gate: ClosedGate | None = None
        # What it took the place of, for `restore`: in a tuple, which is no submodule.
        self.replaced: tuple[nn.Module, ...] | None = None
        self.block = build(variant, hidden_size, heads=num_heads, **options)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        cu_seqlens: Tensor | None = None,
        **host: Any,
    ) -> tuple[Tensor, None, Any]:
        """`host`: what else a model tells its attention, such as rotary embeddings.

        As attention does, it goes on from the state in past_key_values, and leaves its own there,
        whenever there is a cache; use_cache and output_attentions are the convention's.
        """
        if host.get("encoder_hidden_states") is not None:
            raise ValueError("encoder_hidden_states: a memory reads one sequence, takes None")
        if past_key_values is None:
            past_key_values = host.get("past_key_value")  # its name in older models
        layer = None
        if past_key_values is not None:
            from .cache import memory_layer

            if self.layer_idx is None:
                raise ValueError("past_key_values: a layer without a layer_idx takes None")
            layer = memory_layer(past_key_values, self.layer_idx, self.beside, self.others)
        state = None if layer is None else layer.state

        if cu_seqlens is None:
            cu_seqlens = host.get("cu_seq_lens_q")  # its name in transformers
        x, rows = self._in_own_dtype(hidden_states), None
        if cu_seqlens is None:
            past = state is not None
            rows = rows_once(x, attention_mask, host.get("position_ids"), past)
        if rows is not None:
            x, cu_seqlens = rows.pack(x), rows.cu_seqlens
            if layer is not None and len(cu_seqlens) != len(hidden_states) + 1:
                raise ValueError("past_key_values: takes None together with packed sequences")
        out, state = self.block(x, state, cu_seqlens)
        if self.gate is not None:
            out = self.gate(out)
        if layer is not None:
            layer.store(state, hidden_states.shape[1])
        out = out if rows is None else rows.unpack(out)
        return out.to(hidden_states.dtype), None, past_key_values

    def _in_own_dtype(self, x: Tensor) -> Tensor:
        """A host may compute in another, in bfloat16 around a layer that trains in float32."""
        if torch.is_autocast_enabled(x.device.type):
            return x
        return x.to(self.block.memory.out_norm.dtype)

    def extra_repr(self) -> str:
        return f"variant={self.variant}, layer_idx={self.layer_idx}"


class InTransformers(TitansAttention):
    """As attention in Hugging Face transformers: `(out, None)`."""

    positional: tuple[str, ...] = ()  # what the host's attention calls its arguments

    def forward(self, hidden_states: Tensor, *host: Any, **named: Any) -> Any:
        named |= dict(zip(self.positional, host, strict=False))
        return super().forward(hidden_states, **named)[:2]


class InMultihead(TitansAttention):
    """As `nn.MultiheadAttention` of a sequence with itself: `(out, None)`."""

    # What nn.TransformerEncoderLayer reads to decide that it cannot skip calling this.
    in_proj_bias, _qkv_same_embed_dim = None, True
    batch_first = False

    @property
    def num_heads(self) -> int:
        return self.block.heads

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        if any(x is not None and x is not query for x in (key, value)):
            raise ValueError("key, value: got other tensors than query, takes the same")
        x, batched = query, query.dim() == 3
        if not batched:
            x = x[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            x = x.transpose(0, 1)
        real = None
        if key_padding_mask is not None:  # True, or -inf to be added, at padding
            real = key_padding_mask == 0
        out, _, _ = super().forward(x, attention_mask=real)
        if not batched:
            return out[0], None
        return (out if self.batch_first else out.transpose(0, 1)), None


class InPlain(TitansAttention):
    """As a module that maps [B, T, dim] to [B, T, dim]."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


def gated(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """A forward hook: the output of attention plus that of the memory beside it."""
    found = module.titans(*args, **kwargs)  # type: ignore[operator]
    if isinstance(output, tuple):
        return (output[0] + found[0].to(output[0].dtype), *output[1:])
    return output + found.to(output.dtype)


class ClosedGate(nn.Module):
    """A factor per channel, 0 at first: a memory changes nothing until its gate is trained."""

    def __init__(
        self,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.titans_gate = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))
        self.titans_gate._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(self, found: Tensor) -> Tensor:
        return self.titans_gate * found

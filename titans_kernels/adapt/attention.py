"""A Titans layer where a model expects attention."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..decay import Undecayed
from . import masks
from .arguments import MASKS, Call, understood
from .rows import Aligned, Rows, rows_of, rows_once
from .source import Form
from .variants import Variant, build

READS_ON = (
    "attention that sees both ways becomes a memory that reads left to right in {}; "
    "replace(..., causal=True) states that this is meant"
)
_NO_DEFAULTS: dict[str, Any] = {}


class TitansAttention(nn.Module):
    """A Titans block with the calling convention of attention in flash-linear-attention.

    `(hidden_states, attention_mask, past_key_values, use_cache, ..., cu_seqlens)` ->
    `(out, None, past_key_values)`. Reads left to right, whatever the mask: of a mask it takes which
    tokens are padding, which it does not read (their outputs are 0), and where sequences begin.

    Args:
        hidden_size (int): width of the model.
        num_heads (int): heads of the memory and of the block's attention.
        variant (str): "mac", "mag", "mal", "lmm" or "tnt".
        layer_idx (int | None): where in a cache of transformers the state is kept; needed to use
            one.
        options: as the block of that variant takes them.

    Examples:
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
        variant: Variant = "mac",
        layer_idx: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.variant, self.layer_idx = variant, layer_idx
        self.beside, self.others = False, 0
        self.chunk: int | None = None  # of attention that forgets between chunks
        self.gate: ClosedGate | None = None
        # What it replaced, for `restore`: in a tuple, which is no submodule.
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
        """`host`: what else a model passes to its attention, such as rotary embeddings.

        Like attention, it continues from the state in past_key_values and stores its own there,
        whenever there is a cache; use_cache and output_attentions are the convention's. Arguments
        other than the places of tokens and how to compute are refused by name.
        """
        named = {
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "cu_seqlens": cu_seqlens,
        }
        call = understood(named | host, _NO_DEFAULTS, self.beside)
        return self._read(hidden_states, call), None, call.cache

    def _read(self, hidden_states: Tensor, call: Call) -> Tensor:
        layer = None
        if call.cache is not None:
            from .cache import memory_layer

            if self.layer_idx is None:
                raise ValueError("past_key_values: a layer without a layer_idx takes None")
            layer = memory_layer(call.cache, self.layer_idx, self.beside, self.others)
        state = None if layer is None else layer.state

        x, cu_seqlens = self._in_own_dtype(hidden_states), call.cu_seqlens
        rows = self._rows(x, call, layer)
        if rows is not None:
            x = rows.pack(x)
            cu_seqlens = rows.cu_seqlens if cu_seqlens is None else cu_seqlens
            several = cu_seqlens is not None and len(cu_seqlens) != len(hidden_states) + 1
            if layer is not None and several:
                raise ValueError("past_key_values: takes None together with packed sequences")
        out, state = self.block(x, state, cu_seqlens)
        if self.gate is not None:
            out = self.gate(out)
        if layer is not None:
            layer.store(state, hidden_states.shape[1])
        out = out if rows is None else rows.unpack(out)
        return out.to(hidden_states.dtype)

    def _rows(self, x: Tensor, call: Call, layer: Any) -> Rows | Aligned | None:
        past = layer is not None and layer.state is not None
        seen = layer.seen if layer is not None and layer.fixed else None
        place: dict[str, Any] = {"seen": seen, "chunk": self.chunk, "whole": layer is not None}
        if self.chunk is not None and call.position_ids is None and call.restarts is not None:
            step = 1 + call.restarts.long()  # only where they do not follow one another matters
            call = call._replace(position_ids=step.cumsum(1).expand(len(x), -1))
        if call.cu_seqlens is None:
            return rows_once(x, call.mask, call.position_ids, past, **place)
        if call.mask is not None:
            rows = rows_of(x, call.mask, call.position_ids, past, **place | {"whole": True})
            if isinstance(rows, Aligned):
                return rows
            whole = rows is None and call.mask.dim() == 2
            if not whole and (rows is None or not rows.packs(call.cu_seqlens)):
                takes = "a mask of the same sequences, without padding, or None"
                raise ValueError(f"attention_mask: together with cu_seqlens it takes {takes}")
        return None

    def _in_own_dtype(self, x: Tensor) -> Tensor:
        """A host may compute in another, in bfloat16 around a layer that trains in float32."""
        if torch.is_autocast_enabled(x.device.type):
            return x
        return x.to(self.block.memory.out_norm.dtype)

    def extra_repr(self) -> str:
        return f"variant={self.variant}, layer_idx={self.layer_idx}"


class InHost(TitansAttention):
    """As the module that it replaces: called with its arguments, returning its form."""

    names: tuple[str, ...] = ()  # of the host's arguments by position
    defaults: dict[str, Any] = _NO_DEFAULTS
    takes_masks = MASKS
    hiding: frozenset[str] = frozenset()  # boolean masks of which True is hidden, as MPT's
    form: Form = ("", "")  # what is returned with the output; None: the output alone

    def forward(self, *args: Any, **named: Any) -> Any:
        if len(args) > len(self.names):
            takes = f"at most {len(self.names)} by position, {', '.join(self.names)}"
            raise TypeError(f"forward: got {len(args)} arguments, takes {takes}")
        arguments = dict(zip(self.names, args, strict=False)) | named
        if self.names[0] not in arguments:
            raise TypeError(f"{self.names[0]}: missing")
        x = arguments.pop(self.names[0])
        for name in self.hiding.intersection(arguments):
            if getattr(arguments[name], "dtype", None) == torch.bool:
                arguments[name] = ~arguments[name]
        call = understood(arguments, self.defaults, self.beside, self.takes_masks)
        out = self._read(x, call)
        if call.residual is not None and not self.beside:
            out = out + call.residual
        if self.form is None:
            return out
        return (out, *(arguments.get(name) for name in self.form[1:]))


class InMultihead(TitansAttention):
    """As `nn.MultiheadAttention` of a sequence with itself: `(out, None)`."""

    # What nn.TransformerEncoderLayer reads to decide that it cannot skip calling this.
    in_proj_bias, _qkv_same_embed_dim = None, True
    batch_first, causal = False, False

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
        for name, other in (("key", key), ("value", value)):
            if other is not None and not _same(other, query):
                raise ValueError(f"{name}: got other tensors than query, takes the same")
        causal = is_causal or attn_mask is not None or self.causal or self.beside
        x, batched = query, query.dim() == 3
        if not batched:
            x = x[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            x = x.transpose(0, 1)
        if not causal and x.shape[1] > 1 and not torch.compiler.is_compiling():
            warnings.warn(READS_ON.format("nn.MultiheadAttention without a mask"), stacklevel=2)
        mask = self._mask(x, key_padding_mask, attn_mask)
        out, _, _ = super().forward(x, attention_mask=mask)
        if not batched:
            return out[0], None
        return (out if self.batch_first else out.transpose(0, 1)), None

    def _mask(self, x: Tensor, padding: Tensor | None, attn_mask: Tensor | None) -> Tensor | None:
        """Both masks in one, of what is seen. Theirs are True, or far below 0, at what is not."""
        real = None if padding is None else ~_hidden(padding)
        if attn_mask is None:
            return real
        (B, T), takes = x.shape[:2], "[T, T] or [B * heads, T, T]"
        if attn_mask.dim() not in (2, 3) or attn_mask.shape[-2:] != (T, T):
            raise ValueError(f"attn_mask: got {list(attn_mask.shape)}, takes {takes}, T = {T}")
        if attn_mask.dim() == 3 and attn_mask.shape[0] % max(B, 1):
            raise ValueError(f"attn_mask: got {list(attn_mask.shape)}, takes {takes}, B = {B}")
        seen = ~_hidden(attn_mask)
        seen = seen[None, None] if seen.dim() == 2 else seen.unflatten(0, (B, -1))
        return seen if real is None else seen & real[:, None, None]


def _hidden(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else ~(mask > masks.HIDDEN)


def _same(other: Tensor, query: Tensor) -> bool:
    """Whether this is the query: itself, as hooks and checkpoints pass it on, or a copy of it."""
    if other is query:
        return True
    if other.shape != query.shape or other.device != query.device or other.dtype != query.dtype:
        return False
    if other.is_set_to(query):
        return True
    return not torch.compiler.is_compiling() and bool(torch.equal(other, query))


def gated(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """A forward hook: the output of attention plus that of the memory."""
    found = module.titans(*args, **kwargs)  # type: ignore[operator]
    found = found[0] if isinstance(found, tuple) else found
    if isinstance(output, tuple):
        return (output[0] + found.to(output[0].dtype), *output[1:])
    return output + found.to(output.dtype)


class ClosedGate(Undecayed):
    """A factor per channel, 0 at first: a memory changes nothing until its gate is trained."""

    undecayed = ("titans_gate",)

    def __init__(
        self,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.titans_gate = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))
        self.mark_undecayed()

    def forward(self, found: Tensor) -> Tensor:
        return self.titans_gate * found

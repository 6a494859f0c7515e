"""The arguments that a host passes to its attention, and which of them a memory reads.

Each argument of a call is known by its name: a mask, a cache, packed sequences, positions, or one
about how to compute. Whatever else differs from its default is refused by name: a memory that
ignored it would silently compute something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

MASKS = frozenset({"attention_mask", "mask"})
CACHES = frozenset(
    {
        *("past_key_values", "past_key_value", "layer_past", "past", "past_state", "past_states"),
        *("cache", "cache_params", "kv_cache", "mems", "past_buckets_states", "layer_state"),
        *("inference_params", "key_value_cache", "present"),
    }
)
PACKED = frozenset({"cu_seqlens", "cu_seq_lens_q", "cu_seqlens_q"})
PACKED_KEYS = frozenset({"cu_seq_lens_k", "cu_seqlens_k"})
OTHER_SEQUENCES = frozenset(
    {
        *("key_value_states", "encoder_hidden_states", "cross_attention_states", "kv_states"),
        *("encoder_outputs", "encoder_output", "context", "memory", "key_states", "image_states"),
    }
)
# A memory reads in order and needs no positions.
POSITIONS = frozenset(
    {
        *("position_ids", "position_embeddings", "position_bias", "cache_position", "alibi"),
        *("rotary_pos_emb", "rotary_emb", "freqs_ci", "freqs_cis", "sinusoidal_pos", "rope"),
        *("rel_pos", "rel_2d_pos", "relative_pos", "rel_embeddings", "relative_position_bias"),
        *("relative_position_embeddings", "pos_emb", "cos", "sin", "position_embeddings_global"),
        *("position_embeddings_local", "rotary_embeds"),
    }
)
# How to compute, or what to return with the output; a memory has no attention weights.
COMPUTING = frozenset(
    {
        *("use_cache", "output_attentions", "output_hidden_states", "output_router_logits"),
        *("return_dict", "num_items_in_batch", "logits_to_keep", "is_causal", "need_weights"),
        *("max_length_q", "max_length_k", "max_seqlen", "max_seqlens", "max_seqlen_q"),
        *("max_seqlen_k", "max_seq_len", "training", "deterministic", "average_attn_weights"),
    }
)
# What only attention can use. A memory next to it ignores this.
OF_ATTENTION = frozenset({"head_mask", "layer_head_mask", "shared_kv_states", "prev_topk_indices"})
RESIDUAL = "residual"  # BLOOM's attention adds it to its output
KNOWN = MASKS | CACHES | PACKED | PACKED_KEYS | OTHER_SEQUENCES | POSITIONS | COMPUTING | {RESIDUAL}


class Call(NamedTuple):
    """The part of a call that a memory reads."""

    mask: Any = None
    cache: Any = None
    cu_seqlens: Tensor | None = None
    position_ids: Tensor | None = None
    restarts: Tensor | None = None  # [B, T], where positions are 0, as far as rotations show it
    residual: Tensor | None = None


def understood(
    arguments: Mapping[str, Any],
    defaults: Mapping[str, Any],
    beside: bool = False,
    masks: frozenset[str] = MASKS,
) -> Call:
    """What a memory reads of the arguments of a call, other than its input.

    Args:
        arguments: by the names that the host knows them by.
        defaults: of those that have one.
        beside: whether attention gets the same call.
        masks: the names under which a mask is understood.

    Raises:
        ValueError: an argument that a memory does not understand, or two that contradict.
        TypeError: a cache that is none of transformers.
    """
    found: dict[str, Any] = {}

    def take(meaning: str, name: str, value: Any) -> None:
        if meaning in found and not _same(found[meaning], value):
            raise ValueError(f"{name}: got another {meaning} than in the same call, takes one")
        found[meaning] = value

    for name, value in arguments.items():
        if value is None or name in COMPUTING:
            continue
        if name in masks:
            take("mask", name, value)
        elif _is_cache(value):
            take("cache", name, value)
        elif name in CACHES:
            if value is not defaults.get(name):
                got = type(value).__name__
                raise TypeError(f"{name}: got {got}, takes a Cache of transformers or None")
        elif name in PACKED or name in PACKED_KEYS:
            take("cu_seqlens", name, value)
        elif name in OTHER_SEQUENCES:
            raise ValueError(f"{name}: a memory reads one sequence, takes None")
        elif name == RESIDUAL:
            found[RESIDUAL] = value
        elif name == "position_ids":
            found[name] = value
        elif name == "position_embeddings" and isinstance(value, Tensor) and value.is_complex():
            found["restarts"] = (value == 1).all(-1)  # Llama 4 passes its attention no positions
        elif name not in POSITIONS and not (beside and name in OF_ATTENTION):
            _refuse_unless_default(name, value, defaults)
    return Call(**found)


def _refuse_unless_default(name: str, value: Any, defaults: Mapping[str, Any]) -> None:
    default = defaults.get(name)
    if value is default or (value is False and default is None):
        return
    plain = isinstance(value, (bool, int, float, str))
    if plain and type(value) is type(default) and value == default:
        return
    got = repr(value) if plain else type(value).__name__
    if isinstance(value, Tensor):
        got = f"a tensor {list(value.shape)}"
    raise ValueError(f"{name}: got {got}, which a memory does not understand, takes {default!r}")


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if not isinstance(one, Tensor) or not isinstance(other, Tensor) or one.shape != other.shape:
        return False
    if torch.compiler.is_compiling():
        torch._assert_async((one == other.to(one.device)).all(), "two arguments that contradict")
        return True
    return bool(torch.equal(one, other.to(one.device)))


def _is_cache(value: Any) -> bool:
    """Whether this is a cache of transformers, which is not imported for that."""
    if isinstance(value, (Tensor, bool, int, float, str, tuple, list, dict)):
        return False
    return any(
        kind.__name__ == "Cache" and kind.__module__ == "transformers.cache_utils"
        for kind in type(value).__mro__
    )

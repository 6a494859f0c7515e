"""How a module of a host is called and what it returns, or why no memory can take its place."""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

from torch import nn

from .arguments import KNOWN, MASKS, OF_ATTENTION, OTHER_SEQUENCES
from .source import Form, adds_its_input, returned, tried
from .versions import check_transformers

# Attention to another sequence, by the names that hosts give it.
_CROSS = re.compile(r"cross|encoder_attn|encdec|enc_dec|enc_attn|encoder_attention", re.IGNORECASE)
_NEEDED_LATER = re.compile(r"hidden|logits|indices|states$|loss|scaling_factor|layout|qkv|context")


def check(model: nn.Module, name: str, module: nn.Module, replaced: bool) -> None:
    """Refuse modules that a memory can neither replace nor be added to.

    Raises:
        ValueError: attention to another sequence, or a module that does more than attention.
        TypeError: it is not called as attention is, or needs what a memory does not understand.
    """
    kind = type(module).__name__
    if type(module).__module__.startswith("transformers."):
        check_transformers()
    if _is_cross(model, name, module):
        raise ValueError(f"where: {name} is cross-attention, takes attention to one sequence")
    if isinstance(module, nn.MultiheadAttention):
        return
    for argument in _needed(module)[1:]:
        if argument not in KNOWN and (replaced or argument not in OF_ATTENTION):
            takes = "forward(hidden_states, ...), nn.MultiheadAttention or forward(x)"
            takes += ", without arguments that a memory does not understand"
            raise TypeError(
                f"where: {name} is a {kind} that needs {argument}, takes modules with {takes}"
            )
    if not replaced:
        return
    if getattr(module, "has_relative_attention_bias", False) and "bias" in str(returned(module)):
        got = "computes the position bias that later layers use"
        raise ValueError(f"where: {name} {got}; use mode='beside', or choose another layer")
    if adds_its_input(module):
        got = "adds its input to its output, which a memory does not"
        raise ValueError(f"where: {name} is a {kind} that {got}; choose the attention inside it")
    later = [part for part in (returned(module) or ())[1:] if _NEEDED_LATER.search(part)]
    if later:
        got = f"returns {', '.join(later)}, which a memory does not"
        raise ValueError(f"where: {name} is a {kind} that {got}; use mode='beside'")


def like_transformers(name: str, module: nn.Module) -> bool:
    """Whether forward takes hidden states and what goes with them; else it is forward(x)."""
    parameters = _parameters(module)
    if parameters and parameters[0].name in ("hidden_states", "hidden_state"):
        return True
    if len(_needed(module)) == 1 and _needed(module)[0] == parameters[0].name:
        return False
    takes = "forward(hidden_states, ...), nn.MultiheadAttention or forward(x)"
    raise TypeError(f"where: {name} is a {type(module).__name__}, takes modules with {takes}")


def signature(module: nn.Module) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The names of the arguments of forward by position, and the defaults of all that have one."""
    parameters = _parameters(module)
    names = tuple(p.name for p in parameters if p.kind in _POSITIONAL)
    return names, {p.name: p.default for p in parameters if p.default is not p.empty}


def form(module: nn.Module, dim: int) -> Form:
    """The form of what the module returns."""
    hosted = _parameters(module)[0].name in ("hidden_states", "hidden_state")
    return returned(module) if hosted else tried(module, dim)


def masks(module: nn.Module) -> frozenset[str]:
    """Where a mask of which 1 and True are tokens may come.

    Elsewhere than in transformers `mask` may mean the opposite, and is refused.
    """
    of_transformers = type(module).__module__.startswith("transformers.")
    return MASKS if of_transformers else MASKS - {"mask"}


def sees_both_ways(module: nn.Module) -> bool:
    """Whether this is attention of an encoder, as far as transformers marks it."""
    if not type(module).__module__.startswith("transformers."):
        return False
    causal = getattr(module, "is_causal", None)
    if isinstance(causal, bool):
        return not causal
    config = getattr(module, "config", None)
    known = sys.modules.get("transformers.models.auto.modeling_auto")
    decoders = getattr(known, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", {})
    model_type = type(module).__module__.split(".")[2]
    return getattr(config, "model_type", model_type) not in decoders


def chunk(module: nn.Module) -> int | None:
    """After how many tokens attention no longer reaches back, within one sequence.

    Llama 4 attends within chunks; a window of one token is a chunk of one.
    """
    config = getattr(module, "config", None)
    if getattr(module, "sliding_window", None) == 1:
        return 1
    size = getattr(config, "attention_chunk_size", None)
    kinds, index = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if kinds is not None and index is not None and index < len(kinds):
        return size if kinds[index] == "chunked_attention" else None
    return size


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _parameters(module: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(module.forward).parameters.values())


def _needed(module: nn.Module) -> list[str]:
    kinds = (*_POSITIONAL, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in _parameters(module) if p.default is p.empty and p.kind in kinds]


def _is_cross(model: nn.Module, name: str, module: nn.Module) -> bool:
    if getattr(module, "is_cross_attention", False) is True:
        return True
    if isinstance(module, nn.MultiheadAttention):
        parent = model.get_submodule(name.rpartition(".")[0])
        of_decoder = isinstance(parent, nn.TransformerDecoderLayer) and parent.self_attn
        return not module._qkv_same_embed_dim or of_decoder not in (False, module)
    if OTHER_SEQUENCES.intersection(_needed(module)):
        return True
    parts = [*name.split("."), type(module).__name__]
    return any(_CROSS.search(part) for part in parts)

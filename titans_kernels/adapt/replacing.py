"""Titans layers in an existing model: in place of its attention, or in parallel with it."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

from .. import checks
from ..layers.block import BlockOptions
from ..packing import without_values
from . import hosts
from .attention import (
    READS_ON,
    ClosedGate,
    InHost,
    InMultihead,
    TitansAttention,
    gated,
)
from .recipes import remember
from .source import hiding
from .variants import Variant

if TYPE_CHECKING:
    from typing_extensions import Unpack

Where = str | Callable[[str, nn.Module], bool]
Mode = Literal["replace", "beside"]


class Options(BlockOptions, total=False):
    """What `replace` takes for the blocks, whichever variant they are; they refuse the others."""

    dim_head: int | None
    n_persistent: int
    segment: int
    window: int
    rotary: bool
    device: torch.device | str | None
    dtype: torch.dtype | None


def replace(
    model: nn.Module,
    where: Where,
    variant: Variant = "mac",
    *,
    mode: Mode = "replace",
    dim: int | None = None,
    heads: int | None = None,
    causal: bool = False,
    **options: Unpack[Options],
) -> list[str]:
    """Put Titans layers into a model: in place of the chosen attention, or in parallel with it.

    Takes attention of Hugging Face transformers (decoders: GPT-2, Llama, Qwen, ... with `generate`,
    caches, left padding, packed sequences), `nn.MultiheadAttention` of a sequence with itself, and
    modules that map [B, T, dim] to [B, T, dim]. The model is changed in place. A Titans layer reads
    left to right, also where attention saw both ways. Freeze, train and save as ever;
    `titans_kernels.from_pretrained` loads what a changed model's `save_pretrained` saved; from a
    state dict, build the model, replace again, then `load_state_dict`. `titans_kernels.restore`
    undoes it.

    A model is changed only if nothing is refused. Arguments of a later call that a memory does not
    understand are refused by name then.

    Args:
        where (str | Callable): a pattern such as "model.layers.[13].self_attn" (as file names are
            matched, * for anything), or a function of (name, module).
        variant (str): "mac", "mag", "mal", "lmm" or "tnt".
        mode (str): "replace": the Titans layer takes attention's place. "beside": attention stays
            as it is, and the output of the memory, times a gate, is added to its output. The gate
            starts at 0, one number a channel: the model computes what it did, to the bit, until it
            is trained. The memory is the submodule `titans` of the attention, its gate
            `titans.gate`: with PEFT, `modules_to_save=["titans"]` trains and saves both, and
            `modules_to_save=["titans.gate"]` the gate next to LoRA of the memory's projections.
        dim, heads (int | None): of the Titans layer. Default: those of the attention.
        causal (bool): states that reading left to right is meant, where attention sees both ways
            (BERT, ViT, ...), and silences the warning about it.
        options: as the block of that variant takes them: segment, window, chunk_size, ...

    Returns:
        The names of the chosen modules; of one that is used in several places, all of them.

    Raises:
        ValueError: nothing matches, a module has no known dim or heads, is cross-attention, or
            does more than attention, such as adding the residual.
        TypeError: a module is not called as attention is.

    Examples:
        >>> import torch
        >>> from titans_kernels import replace
        >>> encoder = torch.nn.TransformerEncoderLayer(64, nhead=2, batch_first=True)
        >>> replace(encoder, "self_attn", "lmm", causal=True)
        ['self_attn']
        >>> encoder(torch.randn(1, 10, 64)).shape
        torch.Size([1, 10, 64])
    """
    if not isinstance(where, str) and not callable(where):
        raise TypeError(f"where: got {where!r}, takes a pattern or a function of (name, module)")
    checks.choice("mode", mode, get_args(Mode))
    chosen = _chosen(model, where)
    others = 1 + max((_index(module) for module in model.modules()), default=-1)
    for name, module in chosen.items():
        hosts.check(model, name, module, replaced=mode == "replace")
        if mode == "beside" and hasattr(module, "titans"):
            raise ValueError(f"where: {name} has a memory already")
    # One layer a module, in all places where the module is; all are made before one is put in.
    layers: dict[nn.Module, TitansAttention] = {}
    for name, module in chosen.items():
        if module not in layers:
            layer = _layer(model, name, module, variant, dim, heads, options)
            layer.others, layer.beside = others, mode == "beside"
            if isinstance(layer, InMultihead):
                layer.causal = causal
            layers[module] = layer.train(module.training)
    if mode == "replace" and not causal:
        _warn(chosen)
    for module, layer in layers.items():
        if mode == "beside":
            like = next(layer.block.parameters())
            layer.gate = ClosedGate(layer.block.dim, device=like.device, dtype=like.dtype)
            module.titans = layer
            module.register_forward_hook(gated, with_kwargs=True)
            continue
        for name in (name for name, one in chosen.items() if one is module):
            model.set_submodule(name, layer)
        layer.replaced = _kept(model, module)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # its nested tensors are for its own attention only
    call = {"variant": variant, "mode": mode, "dim": dim, "heads": heads, **options}
    remember(model, list(chosen), call | {"causal": causal})
    return list(chosen)


def _chosen(model: nn.Module, where: Where) -> dict[str, nn.Module]:
    """The modules to change, under every name that they have."""
    named = list(model.named_modules(remove_duplicate=False))
    matched = [(name, module) for name, module in named if _matches(where, name, module)]
    # A module inside a chosen one goes or stays with it.
    names = {name for name, _ in matched}
    outer = [m for n, m in matched if not any(n.startswith(f"{o}.") for o in names)]
    if not outer:
        candidates = [n for n, _ in named if "attn" in n.split(".")[-1]]
        raise ValueError(f"where: got {where!r}, which matches no module; there are {candidates}")
    return {name: module for name, module in named if any(module is one for one in outer)}


def _warn(chosen: dict[str, nn.Module]) -> None:
    names = [name for name, module in chosen.items() if hosts.sees_both_ways(module)]
    if names:
        warnings.warn(READS_ON.format(", ".join(names)), stacklevel=3)


def _matches(where: Where, name: str, module: nn.Module) -> bool:
    if isinstance(where, str):
        return bool(name) and fnmatch.fnmatchcase(name, where)
    return bool(name) and where(name, module)


def _index(module: nn.Module) -> int:
    index = _first(module, "layer_idx", "layer_id")
    return -1 if index is None else index


def _layer(
    model: nn.Module,
    name: str,
    module: nn.Module,
    variant: Variant,
    dim: int | None,
    heads: int | None,
    options: Options,
) -> TitansAttention:
    """The Titans layer that replaces one module, of its width, heads, device and dtype."""
    multihead = isinstance(module, nn.MultiheadAttention)
    if not multihead:
        hosts.like_transformers(name, module)
    config = getattr(module, "config", None)
    if dim is None:
        linear = next((m for m in module.modules() if isinstance(m, nn.Linear)), None)
        dim = _first(module, "embed_dim", "hidden_size") or _first(config, "hidden_size")
        dim = dim or (linear.in_features if linear is not None else None)
    if heads is None:
        heads = _first(module, "num_heads", "n_head", "n_heads", "num_attention_heads") or _first(
            config, "num_attention_heads"
        )
    for what, size in (("dim", dim), ("heads", heads)):
        if size is None:
            raise ValueError(f"{what}: {name} does not say it, takes an int")
    assert dim is not None and heads is not None
    own: dict[str, Any] = {**_place(model, module), **options}
    index = _first(module, "layer_idx", "layer_id")
    if multihead:
        multi = InMultihead(dim, heads, variant, layer_idx=index, **own)
        multi.batch_first = bool(module.batch_first)
        return multi
    layer = InHost(dim, heads, variant, layer_idx=index, **own)
    layer.names, layer.defaults = hosts.signature(module)
    layer.takes_masks, layer.chunk = hosts.masks(module), hosts.chunk(module)
    layer.form, layer.hiding = hosts.form(module, dim), hiding(module)
    return layer


def _kept(model: nn.Module, module: nn.Module) -> tuple[nn.Module, ...]:
    """What was replaced, out of a GPU's way; without weights at hand there is nothing to keep."""
    if any(without_values(p) for p in module.parameters()):
        return ()
    shared = {id(p) for p in model.parameters()}.intersection(map(id, module.parameters()))
    return (module,) if shared else (module.cpu(),)


def _place(model: nn.Module, module: nn.Module) -> dict[str, Any]:
    """The device that the module computes on, and the dtype; not those that its weights rest in.

    Offloaded weights are on the meta device between calls, quantised ones are integers.
    """
    parts = list(module.modules())
    like = next(module.parameters(), None)
    place: dict[str, Any] = {} if like is None else {"device": like.device}
    for part in parts:
        hook = getattr(part, "_hf_hook", None)  # of accelerate; several in a SequentialHook
        for one in getattr(hook, "hooks", (hook,)):
            device = getattr(one, "execution_device", None)
            if device is not None:
                place["device"] = torch.device(device)
    weights = [*module.parameters(), *model.parameters()] if like is not None else []
    dtypes = [getattr(part, "compute_dtype", None) for part in parts]  # of bitsandbytes, 4 bit
    dtypes += [weight.dtype for weight in weights]
    dtype = next((dtype for dtype in dtypes if dtype in checks.DTYPES), None)
    return place if dtype is None else place | {"dtype": dtype}


def _first(holder: Any, *names: str) -> int | None:
    """The first of these attributes that is an int."""
    found = (getattr(holder, name, None) for name in names)
    return next((x for x in found if isinstance(x, int)), None)

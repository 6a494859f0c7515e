"""Models that `replace` changed: loaded from checkpoints, and changed back."""

from __future__ import annotations

from typing import Any

from torch import nn

from .attention import TitansAttention, gated
from .recipes import MARK
from .replacing import replace


def restore(model: nn.Module) -> list[str]:
    """Undo `replace`: every memory goes, and attention that was replaced is back in its place.

    Attention that a memory replaced is kept for this on the CPU, outside the model's
    parameters and checkpoints. It comes back with the weights that it had.

    Returns:
        The names of the modules that are as they were.

    Raises:
        ValueError: the model was loaded by `from_pretrained`: its attention was never there.

    Examples:
        >>> import torch
        >>> from titans_kernels import replace, restore
        >>> encoder = torch.nn.TransformerEncoderLayer(64, nhead=2)
        >>> replace(encoder, "self_attn", "lmm")
        ['self_attn']
        >>> restore(encoder)
        ['self_attn']
        >>> type(encoder.self_attn).__name__
        'MultiheadAttention'
    """
    layers = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, TitansAttention) and (module.beside or module.replaced is not None)
    }
    lost = [n for n, layer in layers.items() if not layer.beside and not layer.replaced]
    if lost:
        got = f"one that was loaded with memories in place of {', '.join(lost)}"
        raise ValueError(f"model: got {got}, takes one that replace has changed")
    wrapped = [n for n, layer in layers.items() if layer.beside and not n.endswith("titans")]
    if wrapped:
        got = f"one with adapters around {', '.join(wrapped)}"
        raise ValueError(f"model: got {got}, takes one without: merge_and_unload them first")
    names = []
    for name, layer in layers.items():
        if layer.beside:
            name = name.removesuffix("titans").removesuffix(".")
            names.append(name)
            module = model.get_submodule(name)
            if not hasattr(module, "titans"):  # the same module under another name
                continue
            for key, hook in list(module._forward_hooks.items()):
                if hook is gated:
                    del module._forward_hooks[key], module._forward_hooks_with_kwargs[key]
            del module.titans
        else:
            original: nn.Module = layer
            while isinstance(original, TitansAttention) and original.replaced:
                [original] = original.replaced
            device = layer.block.memory.out_norm.device
            model.set_submodule(name, original.to(device).train(layer.training))
            names.append(name)
    for module in model.modules():
        if hasattr(module, MARK):
            delattr(module, MARK)
            module.config.titans_kernels = None  # type: ignore[union-attr]
    return names


def from_pretrained(
    pretrained_model_name_or_path: str, model_class: Any = None, **options: Any
) -> Any:
    """Load a model with Titans layers: changed by `replace`, or of `titans_kernels.models`.

    Args:
        pretrained_model_name_or_path (str): a folder, or a repository of the Hugging Face hub.
        model_class (type | None): of transformers. Default: that of the model that was saved.
        options: as `from_pretrained` of transformers takes them: dtype, device_map, ...

    Returns:
        The model, in eval mode.

    Raises:
        ValueError: its configuration has no recipe: no memories were put into what was saved.

    Examples:
        >>> import tempfile
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> from titans_kernels import from_pretrained, replace
        >>> size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
        >>> config = LlamaConfig(vocab_size=99, num_attention_heads=2, **size)
        >>> model = AutoModelForCausalLM.from_config(config)
        >>> names = replace(model, "model.layers.*.self_attn", "lmm", mode="beside")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     type(from_pretrained(folder).model.layers[0].self_attn.titans).__name__
        'InHost'
    """
    import transformers

    from .. import models

    hub = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
    config = options.pop("config", None) or transformers.AutoConfig.from_pretrained(
        pretrained_model_name_or_path, **{k: options[k] for k in hub if k in options}
    )
    recipe = getattr(config, "titans_kernels", None)
    if model_class is None:
        [name] = config.architectures
        model_class = getattr(models, name, None) or getattr(transformers, name)
    if issubclass(model_class, models.TitansPreTrainedModel):
        return model_class.from_pretrained(pretrained_model_name_or_path, config=config, **options)
    if not recipe:
        got = f"{pretrained_model_name_or_path}, whose configuration has no titans_kernels"
        raise ValueError(f"pretrained_model_name_or_path: got {got}, takes what replace changed")

    def init(self: Any, config: Any, *args: Any, **named: Any) -> None:
        model_class.__init__(self, config, *args, **named)
        _follow(self, recipe)

    space = {"__init__": init, "__module__": model_class.__module__}
    following: Any = type(model_class.__name__, (model_class,), space)
    found = following.from_pretrained(pretrained_model_name_or_path, config=config, **options)
    (found[0] if isinstance(found, tuple) else found).__class__ = model_class
    return found


def _follow(model: Any, recipe: list[dict[str, Any]]) -> None:
    """Replace again. Names count from where `replace` was called, in a wrapper or deeper down."""
    model.config.titans_kernels = None
    for entry in recipe:
        wanted = entry["where"]

        def chosen(name: str, _: nn.Module, wanted: list[str] = wanted) -> bool:
            return any(_same(name, one) for one in wanted)

        found = replace(model, chosen, **{k: v for k, v in entry.items() if k != "where"})
        if len(found) != len(wanted):
            raise ValueError(f"titans_kernels: the recipe says {wanted}, the model has {found}")
    for layer in model.modules():
        if isinstance(layer, TitansAttention) and not layer.beside:
            layer.replaced = ()  # its weights are not in the checkpoint


def _same(name: str, other: str) -> bool:
    return f".{name}".endswith(f".{other}") or f".{other}".endswith(f".{name}")

"""What a Titans language model is made of."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from .. import checks
from ..adapt.variants import VARIANTS

# hidden_size, num_heads, and the layers that bring each variant nearest to the name, with a
# vocabulary of 32,000 and a head of its own. The paper gives the totals, not how they are made.
SIZES: dict[str, tuple[int, int, dict[str, int]]] = {
    "170m": (768, 12, {"mac": 12, "mag": 12, "mal": 12, "lmm": 15, "tnt": 14}),
    "340m": (1024, 16, {"mac": 15, "mag": 15, "mal": 15, "lmm": 19, "tnt": 18}),
    "760m": (1536, 24, {"mac": 16, "mag": 16, "mal": 16, "lmm": 21, "tnt": 20}),
    "1.3b": (2048, 32, {"mac": 16, "mag": 16, "mal": 16, "lmm": 21, "tnt": 20}),
}

# Options of memories that have local ones, instead of chunk_size.
LOCAL = ["global_chunk", "local_chunks", "reset_every", "project"]

# What transformers takes, or writes into files, besides the fields and attributes of its class.
_OTHER = {
    *("attn_implementation", "auto_map", "base_model_name_or_path", "experts_implementation"),
    *("model_type", "name_or_path", "output_attentions", "per_layer_config"),
    *("quantization_config", "tokenizer_class", "torch_dtype"),
}


class TitansConfig(PreTrainedConfig):
    """Configuration of `TitansModel` and `TitansForCausalLM`.

    Args:
        vocab_size, hidden_size, num_hidden_layers (int): Default: 32,000, 768, 12.
        num_heads (int): memories in a layer, and heads of attention. Default: 12.
        head_dim (int | None): Default: hidden_size / num_heads.
        intermediate_size (int | None): width of the SwiGLU MLPs. Default: 8/3 hidden_size, rounded
            up to a multiple of 64.
        variant (str): "mac", "mag", "mal", "lmm" or "tnt": `titans_kernels.layers`.
        segment (int): of "mac"; window (int): of "mag" and "mal"; rotary (bool): of these three.
        n_persistent (int): persistent tokens of a layer.
        depth, expansion, chunk_size, activation, residual, norm: of the memories, as `NeuralMemory`
            takes them; so are the next four.
        per_layer_gates, conv_size, max_learning_rate, backend: likewise.
        global_chunk, local_chunks, reset_every, project: of "tnt", as `TitansTNT` takes them,
            instead of chunk_size; with local_chunks of every variant. Default: (16,) for "tnt",
            none for others.
        initializer_range (float | None): deviation of embeddings, head and MLPs at the start.
            Default: hidden_size^-1/2, so that small models start no further from their blocks'
            scale than large ones.
        loss_chunk (int | None): with labels, logits are computed of so many tokens at a time, and
            again for their gradient, and are not returned: a large vocabulary in little memory.
            Default: None, all at once.
        rms_norm_eps, use_cache, tie_word_embeddings, pad_token_id, bos_token_id, eos_token_id: as
            in every model of transformers.

    Raises:
        ValueError: for an unknown option, with the nearest name that there is. What a file holds
            besides options, and resembles none, becomes an attribute as everywhere.

    Examples:
        >>> from titans_kernels.models import TitansConfig
        >>> TitansConfig.titans_340m("mag", window=1024).num_hidden_layers
        15
    """

    model_type = "titans"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    attribute_map = {"num_attention_heads": "num_heads"}  # noqa: RUF012

    vocab_size: int = 32_000
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_heads: int = 12
    head_dim: int | None = None
    intermediate_size: int | None = None
    variant: str = "mac"
    segment: int = 512
    window: int = 512
    n_persistent: int = 4
    rotary: bool = True
    depth: int = 2
    expansion: int = 4
    chunk_size: int = 16
    global_chunk: int = 2048
    local_chunks: list[int] | None = None
    reset_every: int = 2048
    project: str | None = "shard"
    activation: str = "gelu_tanh"
    residual: bool = True
    norm: bool = True
    per_layer_gates: bool = False
    conv_size: int | None = 4
    max_learning_rate: float = 0.1
    backend: str = "auto"
    initializer_range: float | None = None
    loss_chunk: int | None = None
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs: Any) -> None:
        checks.known(self._unknown(kwargs), self._options())
        checks.choice("variant", self.variant, tuple(VARIANTS))
        if self.variant == "tnt" and self.local_chunks is None:
            self.local_chunks = [16]
        if isinstance(self.local_chunks, tuple):
            self.local_chunks = list(self.local_chunks)  # as it comes back from a file
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_heads"):
            checks.integer(name, getattr(self, name), 1)
        if self.loss_chunk is not None:
            checks.integer("loss_chunk", self.loss_chunk, 1)
        if self.intermediate_size is None:
            self.intermediate_size = -(-8 * self.hidden_size // (3 * 64)) * 64
        if self.initializer_range is None:
            self.initializer_range = self.hidden_size**-0.5
        super().__post_init__(**kwargs)

    @classmethod
    def _options(cls) -> list[str]:
        return [*(f.name for f in fields(cls)), *cls.attribute_map, "num_labels"]

    @classmethod
    def _unknown(cls, names: Iterable[str]) -> list[str]:
        """Those that neither this configuration nor transformers knows."""
        of_generation = GenerationConfig._get_default_generation_params()
        known = {*cls._options(), *_OTHER, *of_generation}
        return [n for n in names if n not in known and not n.startswith("_")]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As everywhere in transformers."""
        options = cls._options()
        strange = cls._unknown(config_dict)
        others = [n for n in strange if not difflib.get_close_matches(n, options, 1, cutoff=0.8)]
        found = super().from_dict(
            {name: x for name, x in config_dict.items() if name not in others}, **kwargs
        )
        for name in others:
            setattr(found[0] if isinstance(found, tuple) else found, name, config_dict[name])
        return found

    @classmethod
    def titans_170m(cls, variant: str = "mac", **options: Any) -> TitansConfig:
        """About 170 million parameters, as the smallest models of the paper."""
        return cls._sized("170m", variant, options)

    @classmethod
    def titans_340m(cls, variant: str = "mac", **options: Any) -> TitansConfig:
        return cls._sized("340m", variant, options)

    @classmethod
    def titans_760m(cls, variant: str = "mac", **options: Any) -> TitansConfig:
        return cls._sized("760m", variant, options)

    @classmethod
    def titans_1_3b(cls, variant: str = "mac", **options: Any) -> TitansConfig:
        return cls._sized("1.3b", variant, options)

    @classmethod
    def _sized(cls, name: str, variant: str, options: dict[str, Any]) -> TitansConfig:
        checks.choice("variant", variant, tuple(VARIANTS))
        hidden_size, num_heads, layers = SIZES[name]
        size = {
            "hidden_size": hidden_size,
            "num_heads": num_heads,
            "num_hidden_layers": layers[variant],
        }
        return cls(**(size | {"variant": variant} | options))

    def block_options(self) -> dict[str, Any]:
        """What the block of the variant takes."""
        names = [
            *("n_persistent", "depth", "expansion", "activation", "residual", "norm"),
            *("per_layer_gates", "conv_size", "max_learning_rate", "backend"),
        ]
        names += ["chunk_size"] if self.local_chunks is None else LOCAL
        if self.variant not in ("lmm", "tnt"):
            names += ["rotary", "segment" if self.variant == "mac" else "window"]
        options = {name: getattr(self, name) for name in names}
        return {"heads": self.num_heads, "dim_head": self.head_dim} | options

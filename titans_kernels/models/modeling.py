"""The models: embedding, layers of a Titans block and an MLP, and a head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .. import checks
from ..adapt.cache import MemoryLayer, TitansCache, memory_layer
from ..adapt.rows import Rows, rows_of
from ..adapt.variants import build
from ..layers.block import Block
from ..layers.local import TNTMemory
from ..layers.sealing import Sealing
from ..layers.state import State
from .configuration import TitansConfig
from .loss import next_token_loss

_POINTER = "modeling_titans"
_AUTO_MAP = {
    "AutoConfig": "TitansConfig",
    "AutoModel": "TitansModel",
    "AutoModelForCausalLM": "TitansForCausalLM",
    "AutoModelForSequenceClassification": "TitansForSequenceClassification",
    "AutoModelForTokenClassification": "TitansForTokenClassification",
}


class TitansMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        dim, wide = config.hidden_size, config.intermediate_size
        assert wide is not None, "the configuration has filled it in"
        self.gate_proj = nn.Linear(dim, wide, bias=False)
        self.up_proj = nn.Linear(dim, wide, bias=False)
        self.down_proj = nn.Linear(wide, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class TitansDecoderLayer(Sealing, GradientCheckpointingLayer):
    """x + block(norm(x)), then x + mlp(norm(x)); state in, state out."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = build(config.variant, config.hidden_size, **config.block_options())
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = TitansMLP(config)

    def forward(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, State]:
        y, state = self.mixer(self.mixer_norm(x), state, cu_seqlens)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), state


class TitansPreTrainedModel(PreTrainedModel):
    config_class = TitansConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # Generation must not roll back tokens: a memory cannot unlearn them.
    _is_stateful = True
    _no_split_modules = ["TitansDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        """Called for every module, children first."""
        std = self.config.initializer_range
        if isinstance(module, Block):
            module.reset_parameters()
        elif isinstance(module, TitansMLP):
            for linear in (module.gate_proj, module.up_proj, module.down_proj):
                nn.init.normal_(linear.weight, std=std)
        elif isinstance(module, nn.Embedding) or module is self.get_output_embeddings():
            nn.init.normal_(module.weight, std=std)
        elif module is getattr(self, "score", None):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For code that is not its own, transformers passes over modules without parameters of
        # their own, an MLP for one. It needs not: `torch.nn.init` there spares what was loaded.
        super()._initialize_weights(module)

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:
        """As every model of transformers; with a file by which `AutoModel` finds Titans.

        A process that has not imported `titans_kernels.models` then loads it by
        `AutoModel.from_pretrained(..., trust_remote_code=True)`; the error without that names it.
        """
        self.config.auto_map = {name: f"{_POINTER}.{cls}" for name, cls in _AUTO_MAP.items()}
        super().save_pretrained(save_directory, **options)
        names = ", ".join(_AUTO_MAP.values())
        text = f"from titans_kernels.models import {names}  # pip install 'titans_kernels[hf]'\n"
        if Path(save_directory).is_dir():
            Path(save_directory, f"{_POINTER}.py").write_text(text, encoding="utf-8")

    def set_local_chunks(self, local_chunks: Sequence[int]) -> None:
        """Other chunks for the local memories of all layers, here and in the configuration.

        The second stage of TNT (arXiv 2511.07343) trains a model on with smaller ones. Caches made
        before are refused by the next call.

        Args:
            local_chunks (Sequence[int]): tokens of a chunk of each local memory of a layer.

        Raises:
            TypeError, ValueError: not as many as there are local memories, or not ints.
        """
        memories = [part for part in self.modules() if isinstance(part, TNTMemory)]
        if not memories:
            raise ValueError(f"local_chunks: got {local_chunks}, the model has no local memories")
        for memory in memories:
            memory.set_local_chunks(local_chunks)
        self.config.local_chunks = list(local_chunks)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Every parameter as at the start; also after `to_empty` of a model on the meta device."""
        self.tie_weights()  # `to_empty` unties
        self.apply(self._init_weights)


class TitansModel(TitansPreTrainedModel):
    """Tokens to hidden states. Padding is neither read nor computed.

    Examples:
        >>> import torch
        >>> from titans_kernels.models import TitansConfig, TitansModel
        >>> size = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2}
        >>> model = TitansModel(TitansConfig(**size, variant="lmm"))
        >>> out = model(torch.tensor([[5, 6, 7]]), use_cache=True)
        >>> out = model(torch.tensor([[8]]), past_key_values=out.past_key_values)
        >>> out.last_hidden_state.shape, out.past_key_values.get_seq_length()
        (torch.Size([1, 1, 32]), 4)
    """

    def __init__(self, config: TitansConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            TitansDecoderLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Read tokens, and continue from the states in past_key_values if there are any.

        Args:
            input_ids (Tensor): [B, T], or inputs_embeds [B, T, hidden_size] instead.
            attention_mask (Tensor | None): [B, T], or [B, all tokens so far + T]: 0 at padding,
                left, right or in between.
            position_ids (Tensor | None): [B, T]. Only where sequences begin is taken from it, as
                where it restarts, and only without a mask and a past.
            past_key_values (Cache | None): its states are read, and replaced by those after T.
            use_cache (bool | None): whether to make a cache where none is given. Default: as the
                config says, but not in training.
            cu_seqlens (Tensor | None): [N + 1], sequences packed end to end in a batch of 1; also
                by its other name, cu_seq_lens_q.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: got both or neither, takes one of them")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        T = x.shape[1]
        caches: list[MemoryLayer | None] = [None] * len(self.layers)
        if past_key_values is not None:
            caches = [memory_layer(past_key_values, i) for i in range(len(self.layers))]
        past = caches[0] is not None and caches[0].state is not None

        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        checks.boolean("output_hidden_states", output_hidden_states)
        if cu_seqlens is None:
            cu_seqlens = kwargs.get("cu_seq_lens_q")
        keeps = self.config.use_cache and not self.training if use_cache is None else use_cache
        whole = keeps or past_key_values is not None
        rows = None
        if cu_seqlens is None:
            rows = rows_of(x, attention_mask, position_ids, past, whole=whole)
        several = isinstance(rows, Rows) and len(rows.cu_seqlens) != len(x) + 1
        if use_cache is None:
            use_cache = keeps and not several
        if several and (use_cache or past_key_values is not None):
            raise ValueError("use_cache: got True, takes False where rows hold several sequences")
        if use_cache and past_key_values is None:
            past_key_values = TitansCache(len(self.layers))
            caches = list(past_key_values.layers)
        if caches and caches[0] is not None:
            caches[0].note(input_ids)
        seen = [x]
        if rows is not None:
            x, cu_seqlens = rows.pack(x), rows.cu_seqlens

        for cache, layer in zip(caches, self.layers, strict=True):
            state = None if cache is None else cache.state
            x, state = layer(x, state, cu_seqlens)
            if cache is not None:
                cache.store(state, T)
            if output_hidden_states and rows is not None:
                seen.append(rows.unpack(x))
                x = rows.pack(seen[-1])  # so that what is shown has a gradient
            elif output_hidden_states:
                seen.append(x)
        x = self.norm(x)
        seen[-1] = x = x if rows is None else rows.unpack(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=tuple(seen) if output_hidden_states else None,
        )


class TitansForCausalLM(TitansPreTrainedModel, GenerationMixin):
    """`TitansModel` and a head: the next token. `generate` with a cache of constant size.

    Examples:
        >>> import torch
        >>> from titans_kernels.models import TitansConfig, TitansForCausalLM
        >>> size = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2}
        >>> model = TitansForCausalLM(TitansConfig(**size, variant="lmm", eos_token_id=None))
        >>> text = torch.tensor([[5, 6, 7]])
        >>> model(text, labels=text).loss.shape
        torch.Size([])
        >>> model.generate(text, max_new_tokens=4).shape
        torch.Size([1, 7])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: TitansConfig) -> None:
        super().__init__(config)
        self.model = TitansModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_attention_mask_for_generation(
        self, inputs_tensor: Tensor, generation_config: Any, model_kwargs: dict[str, Any]
    ) -> Tensor:
        """Tokens given to `generate` with a cache are the whole text, or those that are new.

        The whole text, as everywhere in transformers, begins with what the cache has read; all else
        is new. Of a cache that was given embeddings this is not known: no more tokens than it has
        read are new, more are the whole text. A mask over all that has been read and is to be read
        decides it, if given.
        """
        mask = super()._prepare_attention_mask_for_generation(
            inputs_tensor, generation_config, model_kwargs
        )
        cache = model_kwargs.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        if past == 0:
            return mask
        whole = mask.shape[1] > past
        if whole and not inputs_tensor.is_floating_point():
            whole = memory_layer(cache, 0).has_read(inputs_tensor[:, :past]) is not False
        return mask if whole else F.pad(mask, (past, 0), value=1)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seqlens: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As `TitansModel.forward`, and

        Args:
            labels (Tensor | None): [B, T], the input_ids; the loss shifts them. -100: no loss.
                With `config.loss_chunk` the output then has a loss and no logits.
            logits_to_keep (int | Tensor): of that many last tokens, or of these; 0: of all.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            cu_seqlens=cu_seqlens,
            cu_seq_lens_q=kwargs.pop("cu_seq_lens_q", None),
        )
        hidden, chunk, logits, loss = outputs.last_hidden_state, self.config.loss_chunk, None, None
        whole = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if labels is not None and chunk is not None and whole:
            counted = {n: kwargs.get(n) for n in ("num_items_in_batch", "shift_labels")}
            loss = next_token_loss(self.lm_head, hidden, labels, chunk, **counted)
        else:
            last = isinstance(logits_to_keep, int)
            logits = self.lm_head(
                hidden[:, slice(-logits_to_keep, None) if last else logits_to_keep]
            )
            if labels is not None:
                size = self.config.vocab_size
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

"""Caches of transformers that quantise or offload keys and values, with memories among them."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

pytest.importorskip("transformers")

from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    QuantizedCache,
    StaticCache,
)
from transformers.cache_utils import Cache, QuantizedLayer

from titans_kernels import replace
from titans_kernels.adapt.cache import MemoryLayer

V = 37
CONFIG = LlamaConfig(
    **{"vocab_size": V, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0},
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3},
)


def _model(where=None, mode="beside", gate=0.0):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG).double().eval()
    if where is not None:
        replace(model, where, "lmm", mode=mode, chunk_size=4)
    for name, parameter in model.named_parameters():
        if name.endswith("titans_gate"):
            nn.init.constant_(parameter, gate)
    return model


def _generate(model, cache, **options):
    tokens = torch.randint(1, V, (2, 8), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    tokens[0, :3], mask[0, :3] = 0, 0
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True} | options
    out = model.generate(
        tokens,
        attention_mask=mask,
        past_key_values=cache,
        return_dict_in_generate=True,
        **options,
    )
    return out.sequences, torch.stack(out.logits), out.past_key_values


class Rounded(QuantizedLayer):
    """As HQQ's and Quanto's layers, which need packages: a window of tokens as they are."""

    def _quantize(self, tensor, axis):
        return tensor.bfloat16()

    def _dequantize(self, tensor):
        return tensor.to(self.dtype)


QUANTISED = {
    "float8": lambda: QuantizedCache("fp8", config=CONFIG),
    "groups": lambda: Cache(layers=[Rounded(residual_length=3) for _ in range(2)]),
}


@pytest.mark.parametrize("beams", [1, 2], ids=["greedy", "beams"])
@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_caches(kind, beams):
    """Attention's keys and values are rounded as ever, states are not."""
    make = QUANTISED[kind]
    tokens, logits, _ = _generate(_model(), make(), num_beams=beams)
    assert not torch.equal(logits, _generate(_model(), DynamicCache(), num_beams=beams)[1])
    shut, same, _ = _generate(_model("*.self_attn"), make(), num_beams=beams)
    assert torch.equal(shut, tokens) and torch.equal(same, logits)

    model = _model("*.self_attn", "replace")
    alike = [_generate(model, cache, num_beams=beams) for cache in (make(), DynamicCache())]
    assert torch.equal(alike[0][0], alike[1][0]) and torch.equal(alike[0][1], alike[1][1])


@pytest.mark.parametrize("mode", ["replace", "beside"])
@pytest.mark.parametrize("kind", QUANTISED)
def test_a_state_next_to_what_is_quantised(kind, mode):
    """The first layer's memory has the state that it has with any cache."""
    model, states = _model("model.layers.0.self_attn", mode, gate=0.5), []
    for cache in (QUANTISED[kind](), DynamicCache()):
        torch.manual_seed(1)
        tokens = torch.randint(1, V, (2, 9))
        with torch.no_grad():
            for part in tokens.split([5, 1, 3], 1):
                model(part, past_key_values=cache)
        [layer] = [layer for layer in cache.layers if isinstance(layer, MemoryLayer)]
        states.append(tree_leaves(layer.state))
    assert all(map(torch.equal, *states))


class _Stream(nullcontext):
    """In the place of a GPU's: moving to the CPU and back is then no move, but is called for."""

    def wait_stream(self, other):
        pass


GROWS, FIXED = (DynamicCache, {}), (StaticCache, {"max_cache_len": 16})


@pytest.mark.parametrize("where", ["*.self_attn", "*.0.self_attn", "*.1.self_attn"])
@pytest.mark.parametrize(
    "kind, mode",
    [(GROWS, "replace"), (GROWS, "beside"), (FIXED, "beside")],
    ids=["grows, replace", "grows, beside", "of fixed size, beside"],
)
def test_offloaded_caches(kind, mode, where, monkeypatch):
    """They fetch layers in turn, memories too, which stay where they are."""
    (cls, options), model = kind, _model(where, mode, gate=0.5)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda _: _Stream())
    fetched, method = [], MemoryLayer.prefetch
    monkeypatch.setattr(MemoryLayer, "prefetch", lambda self: fetched.append(method(self)))
    found = []
    for offloading in (True, False):
        cache = cls(config=CONFIG, offloading=offloading, **options)
        cache.prefetch_stream = _Stream()
        found.append(_generate(model, cache, disable_compile=True)[:2])
    assert all(map(torch.equal, *found))
    attends = mode == "beside" or where != "*.self_attn"  # something that is kept by the cache
    assert bool(fetched) == attends


@pytest.mark.parametrize("offloading", [False, True])
def test_a_cache_of_fixed_size_has_no_place_for_a_state(offloading):
    model = _model("*.1.self_attn", "replace")
    cache = StaticCache(config=CONFIG, max_cache_len=16, offloading=offloading)
    with pytest.raises(ValueError, match="past_key_values: got StaticCache, takes one that grows"):
        model.model.layers[1].self_attn(torch.randn(1, 3, 16).double(), past_key_values=cache)

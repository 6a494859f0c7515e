"""The errors that docs/troubleshooting.md quotes are those that users get."""

import os
import re
import warnings
from dataclasses import replace as changed
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertModel, LlamaConfig
from transformers.cache_utils import StaticCache

from titans_kernels import NeuralMemory, neural_memory, replace
from titans_kernels.adapt import TitansAttention
from titans_kernels.packing import Options, Reading
from titans_kernels.selfcheck import decide
from titans_kernels.selfcheck.configuration import Configuration

PAGE = Path(__file__).parents[1] / "docs" / "troubleshooting.md"
HEADINGS = re.findall(r"^\*\*(.+)\*\*$", PAGE.read_text(), flags=re.MULTILINE)
QUOTED = [quote for heading in HEADINGS for quote in re.findall(r"`([^`]+)`", heading)]


def _memory(**options):
    q, k, v = torch.randn(3, 1, 20, 2, 8)
    gates = 0.01 * torch.rand(3, 1, 20, 2)
    return neural_memory(q, k, v, *gates, (torch.randn(2, 8, 8),), **options)


def _llama():
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=16, num_attention_heads=2, eos_token_id=None, **size)
    )


def _bert():
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return BertModel(BertConfig(vocab_size=16, num_attention_heads=2, **size))


def _state_of_another_chunk():
    _, state = _memory(output_final_state=True)
    _memory(initial_state=state, chunk_size=8)


def _rounded_state():
    _, state = _memory(output_final_state=True)
    rounded = changed(state, weights=tuple(w.bfloat16() for w in state.weights))
    _memory(initial_state=rounded)


def _cross_attention():
    replace(nn.TransformerDecoderLayer(16, 2), "multihead_attn", "lmm")


def _whole_sublayer():
    replace(_bert(), "encoder.layer.0.attention", "lmm", heads=2, dim=16)


def _odd_mask():
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    mask[0, 0, 5, 2] = False
    TitansAttention(16, 2, "lmm")(torch.randn(1, 6, 16), attention_mask=mask)


def _static_cache():
    model = _llama()
    replace(model, "model.layers.*.self_attn", "lmm")
    cache = StaticCache(config=model.config, max_cache_len=16)
    model(torch.ones(1, 4, dtype=torch.long), past_key_values=cache)


def _crop():
    model = _llama()
    replace(model, "model.layers.*.self_attn", "lmm")
    model(torch.ones(1, 4, dtype=torch.long), use_cache=True).past_key_values.crop(2)


def _auto(check=None, capturing=False):
    """What a configuration that is met for the first time leads to, warnings as errors."""
    reading = Reading(torch.ones(1, 1, 16), [torch.ones(1, 1, 16, 16)], None, torch.tensor([0, 1]))
    unknown = Configuration.of_reading(reading, Options("relu", True), 1)._replace(kernels="none")
    with (
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: capturing),
        mock.patch.object(decide, "check", lambda *_: check),
        mock.patch.dict(os.environ, TITANS_KERNELS_AUTO="check"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("error")
        decide._backend(unknown, 1, torch.device("cuda"))


CALLS = [
    lambda: _auto(check="o is wrong"),
    lambda: _auto(capturing=True),
    lambda: _memory(backend="triton", read="chunk"),
    lambda: NeuralMemory(16, heads=2, chunk_size=0),
    _state_of_another_chunk,
    _rounded_state,
    lambda: replace(_llama(), "no.such.module", "lmm"),
    _cross_attention,
    _whole_sublayer,
    _odd_mask,
    _static_cache,
    _crop,
]


def _pattern(quote):
    parts = (re.escape(part.strip()) for part in quote.split("..."))
    return re.compile(".*".join(parts), re.DOTALL)


def test_every_quoted_error_is_one_that_users_get():
    found = []
    for call in CALLS:
        with pytest.raises((ValueError, TypeError, RuntimeError, RuntimeWarning)) as caught:
            call()
        found.append(str(caught.value))
        assert any(_pattern(quote).search(found[-1]) for quote in QUOTED), found[-1]
    quoted = [quote for quote in QUOTED if " " in quote]  # the others are names
    unseen = [quote for quote in quoted if not any(_pattern(quote).search(x) for x in found)]
    assert unseen == ["transformers: got version ..., takes 5.15 or newer"]

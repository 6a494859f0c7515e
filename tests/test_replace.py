"""Titans layers in existing models: in place of attention, and in parallel with it."""

import copy
import io
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    StaticCache,
)

from titans_kernels import replace
from titans_kernels.adapt import TitansAttention
from titans_kernels.adapt.versions import checkpointing

V = 37
_SIZE = {
    **{"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2},
    **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "initializer_range": 0.3},
}
_LLAMA = _SIZE | {"intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8}
# Name: configuration, and where the attention of layer {} is.
HOSTS = {
    "gpt2": (GPT2Config(**_SIZE, n_positions=64), "transformer.h.{}.attn"),
    "llama": (LlamaConfig(**_LLAMA), "model.layers.{}.self_attn"),
    "qwen2": (Qwen2Config(**_LLAMA), "model.layers.{}.self_attn"),
    "qwen3": (
        Qwen3Config(
            **_LLAMA,
            use_sliding_window=True,
            sliding_window=4,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
        ),
        "model.layers.{}.self_attn",
    ),
}
OPTIONS = {
    "mac": {"segment": 6},
    "mag": {"window": 5},
    "mal": {"window": 5},
    "lmm": {},
    "tnt": {"global_chunk": 6, "local_chunks": [4, 3], "reset_every": 8},
}


def _host(name, seed=0):
    torch.manual_seed(seed)
    config, where = HOSTS[name]
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    return model.to(torch.float64).eval(), where


def _swapped(name, layers="[01]", variant="lmm", mode="replace"):
    model, where = _host(name)
    options = OPTIONS[variant] | ({} if variant == "tnt" else {"chunk_size": 4})
    names = replace(model, where.format(layers), variant, mode=mode, **options)
    if mode == "beside":  # a closed gate would hide what the memory does
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("titans_gate"):
                nn.init.constant_(parameter, 0.5)
    return model, names


def _tokens(*shape, seed=1):
    return torch.randint(1, V, shape, generator=torch.Generator().manual_seed(seed))


def _close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("mode", ["replace", "beside"])
def test_generate(name, mode):
    model, names = _swapped(name, mode=mode)
    assert names == [HOSTS[name][1].format(i) for i in (0, 1)]
    tokens = _tokens(2, 6)
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(tokens, use_cache=False, **options)
    assert (model.generate(tokens, **options) == expected).all()
    made = DynamicCache()  # its layers come into being as they are used
    assert (model.generate(tokens, past_key_values=made, **options) == expected).all()
    beams = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False}
    expected = model.generate(tokens, use_cache=False, **beams)
    assert (model.generate(tokens, **beams) == expected).all()


@pytest.mark.parametrize("variant", ["mac", "mag", "mal", "tnt"])
def test_variants_and_pieces(variant):
    model, _ = _swapped("llama", "*", variant)
    tokens, cache, logits = _tokens(2, 13), DynamicCache(config=model.config), []
    for piece in tokens.split([5, 1, 7], dim=1):
        logits.append(model(piece, past_key_values=cache).logits)
    _close(torch.cat(logits, 1), model(tokens).logits)
    sizes = {len(x) for x in pytree.tree_leaves(cache.layers[0].state)}
    assert sizes == {2} and cache.get_seq_length() == 13


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "name, mode", [("gpt2", "replace"), ("llama", "replace"), ("qwen3", "beside")]
)
def test_left_padding(name, mode, attention):
    model, _ = _swapped(name, mode=mode)
    model.set_attn_implementation(attention)
    model.float()  # in float64 the eager attention of transformers makes NaN of padding
    prompts = [_tokens(1, 3), _tokens(1, 8, seed=2)]
    padded = torch.cat([F.pad(p, (8 - p.shape[1], 0)) for p in prompts])
    options = {"max_new_tokens": 4, "do_sample": False}
    got = model.generate(padded, attention_mask=padded.ne(0).long(), **options)
    for row, prompt in zip(got, prompts, strict=True):
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        assert (row[-4:] == alone[0, -4:]).all()


def test_packed_sequences():
    model, _ = _swapped("llama", "*")
    tokens, ends = _tokens(1, 12), [0, 5, 6, 12]
    alone = [model(tokens[:, a:b]).logits for a, b in pairwise(ends)]
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(ends)])[None]
    got = model(tokens, position_ids=positions, use_cache=False).logits
    _close(got, torch.cat(alone, 1))
    # With mode="beside" attention keeps its own mask.
    model, _ = _swapped("llama", "*", mode="beside")
    alone = [model(tokens[:, a:b]).logits for a, b in pairwise(ends)]
    got = model(tokens, position_ids=positions, use_cache=False).logits
    _close(got, torch.cat(alone, 1))


@pytest.mark.parametrize("name", HOSTS)
def test_beside_changes_nothing_until_trained(name):
    model, where = _host(name)
    tokens = _tokens(2, 9)
    before, names = model(tokens).logits, set(model.state_dict())
    replace(model, where.format("*"), "mag", mode="beside", window=5)
    assert torch.equal(model(tokens).logits, before)
    assert names < set(model.state_dict()), "the names of a checkpoint do not change"
    model.train()
    optimizer = torch.optim.AdamW((p for n, p in model.named_parameters() if "titans" in n), 1e-2)
    losses = []
    for _ in range(6):
        losses.append(model(tokens, labels=tokens).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert (model.eval()(tokens).logits != before).any()


def test_trained_saved_and_loaded():
    model, _ = _swapped("qwen2", variant="mac")
    tokens = _tokens(2, 9)
    model.train()(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    other = copy.deepcopy(model).eval()
    _close(other(tokens).logits, model.eval()(tokens).logits)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh, _ = _host("qwen2", seed=1)
    replace(fresh, "model.layers.[01].self_attn", "mac", segment=6, chunk_size=4)
    fresh.load_state_dict(torch.load(file))
    _close(fresh(tokens).logits, model(tokens).logits)


def test_gradient_checkpointing_of_the_host():
    gradients = []
    for on in (False, True):
        model, _ = _swapped("llama", mode="beside")
        if on:
            getattr(model, f"{checkpointing()}_enable")()
        tokens = _tokens(2, 9)
        model.train()(tokens, labels=tokens).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for got, expected in zip(*gradients, strict=True):
        _close(got, expected)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("mode", ["replace", "beside"])
def test_transformer_encoder(mode, batch_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=batch_first, dtype=torch.float64)
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=batch_first).eval()
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    padding = torch.tensor([[False] * 7, [False] * 5 + [True] * 2])

    def run(rows):
        out = encoder(rows if batch_first else rows.transpose(0, 1))
        return out if batch_first else out.transpose(0, 1)

    with torch.no_grad():  # where the layer would rather not call its attention at all
        before = run(x)
        names = replace(encoder, "layers.[12].self_attn", "lmm", mode=mode)
        assert names == ["layers.1.self_attn", "layers.2.self_attn"]
        assert torch.equal(run(x), before) == (mode == "beside")
        if mode == "beside":
            for n in names:
                nn.init.ones_(encoder.get_submodule(n).titans.gate.titans_gate)
        assert not torch.equal(run(x), before)
        given = x if batch_first else x.transpose(0, 1)
        got = encoder(given, src_key_padding_mask=padding)
        got = got if batch_first else got.transpose(0, 1)
        _close(got[:1], run(x[:1]))
        _close(got[1:, :5], run(x[1:, :5]))
        one = encoder.layers[1](x[0])  # [T, dim], no batch
        expected = encoder.layers[1](x[:1] if batch_first else x[:1].transpose(0, 1))
        _close(one, expected[0] if batch_first else expected[:, 0])
    encoder.train()(given).sum().backward()


class _Plain(nn.Module):
    """Attention as small models write it."""

    def __init__(self):
        super().__init__()
        self.qkv, self.n_head = nn.Linear(16, 48), 2

    def forward(self, x):
        return self.qkv(x)[..., :16]


def test_plain_modules_and_predicates():
    model = nn.Sequential(_Plain(), nn.Linear(16, 16), _Plain())
    x = torch.randn(1, 5, 16)
    before = model(x)
    assert replace(model, lambda _, m: isinstance(m, _Plain), "mac", mode="beside") == ["0", "2"]
    assert torch.equal(model(x), before)
    assert replace(model, "2", "lmm", heads=4) == ["2"]
    assert model[2].block.heads == 4 and model(x).shape == x.shape


class _Positional(nn.Module):
    """Attention whose arguments are positional, as in BERT."""

    def __init__(self):
        super().__init__()
        self.query, self.hidden_size, self.num_heads = nn.Linear(16, 16), 16, 2

    def forward(self, hidden_states, attention_mask=None, past=None, encoder_hidden_states=None):
        return self.query(hidden_states), None


@pytest.mark.parametrize("mode", ["replace", "beside"])
def test_hosts_that_tell_by_position(mode):
    model = nn.ModuleDict({"self": _Positional()}).to(torch.float64)
    replace(model, "self", "lmm", mode=mode)
    if mode == "beside":
        nn.init.ones_(model["self"].titans.gate.titans_gate)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0]]).bool()
    expected = model["self"](x[1:, real[1]])[0]
    added = torch.zeros(2, 5, dtype=x.dtype).masked_fill(~real, torch.finfo(x.dtype).min)
    row, added = real[:, None, None], added[:, None, None]
    for mask in (real, row, added, row.expand(-1, 1, 5, -1), added.expand(-1, 1, 5, -1)):
        _close(model["self"](x, mask)[0][1:, real[1]], expected)
    with pytest.raises(ValueError, match="encoder_hidden_states"):
        model["self"](x, None, None, x)
    with pytest.raises(ValueError, match=r"attention_mask: got \[2, 5, 5\]"):
        model["self"](x, torch.ones(2, 5, 5))
    with pytest.raises(TypeError, match="attention_mask: got str"):
        model["self"](x, "causal")


def test_the_convention_of_flash_linear_attention():
    torch.manual_seed(0)
    layer = TitansAttention(16, 2, "mal", layer_idx=1, window=4).to(torch.float64)
    x, cache = torch.randn(2, 9, 16, dtype=torch.float64), DynamicCache()
    expected, nothing, none = layer(x)
    assert nothing is None and none is None
    out = []
    for piece in x.split([4, 5], dim=1):
        y, _, same = layer(hidden_states=piece, past_key_values=cache, use_cache=True)
        assert same is cache
        out.append(y)
    _close(torch.cat(out, 1), expected)
    mask = torch.ones(2, 9)
    _close(layer(x, attention_mask=mask)[0], expected)
    mask[0, :3] = 0  # the same tensor, and now it says something else
    _close(layer(x, attention_mask=mask)[0][:1, 3:], layer(x[:1, 3:])[0])
    packed, _, _ = layer(x.flatten(0, 1)[None], cu_seqlens=torch.tensor([0, 9, 18]))
    _close(packed.view(2, 9, 16), expected)


def test_in_half_precision_and_on_meta():
    model, where = _host("llama")
    model.to(torch.bfloat16)
    replace(model, where.format(1), "mac")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(_tokens(1, 5)).logits.isfinite().all()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(HOSTS["llama"][0])
    replace(model, where.format("*"), "mag", mode="beside")
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_is_in_the_mode_of_what_it_replaces(training):
    model, where = _host("llama")
    model.train(training)
    replace(model, where.format("*"), "lmm")
    assert all(module.training == training for module in model.modules())


def test_what_is_refused():
    model, where = _host("llama")
    with pytest.raises(ValueError, match=r"where: got 'attn'.*model.layers.0.self_attn"):
        replace(model, "attn")
    with pytest.raises(TypeError, match="where: got None, takes a pattern or a function"):
        replace(model, None, "lmm")
    with pytest.raises(ValueError, match="mode: got 'both'"):
        replace(model, where.format(0), mode="both")
    with pytest.raises(ValueError, match="variant: got 'x'"):
        replace(model, where.format(0), "x")
    with pytest.raises(TypeError, match="windows"):
        replace(model, where.format(0), "mag", windows=3)
    with pytest.raises(TypeError, match=r"model\.rotary_emb is a LlamaRotaryEmbedding"):
        replace(model, "model.rotary_emb")
    with pytest.raises(ValueError, match="heads: 0 does not say it"):
        replace(nn.Sequential(nn.Linear(4, 4)), "0")
    assert all("titans" not in n for n in model.state_dict()), "what was refused left something"
    replace(model, where.format(0), "lmm", mode="beside")
    with pytest.raises(ValueError, match="has a memory already"):
        replace(model, where.format(0), "lmm", mode="beside")

    model, _ = _swapped("llama")
    tokens = _tokens(1, 4)
    cache = DynamicCache()
    _host("llama")[0](tokens, past_key_values=cache)
    with pytest.raises(ValueError, match="what another kind of layer left in layer 0"):
        model(tokens, past_key_values=cache)
    with pytest.raises(ValueError, match="got StaticCache"):
        model(tokens, past_key_values=StaticCache(config=model.config, max_cache_len=8))
    layer = TitansAttention(16, 2, "lmm")
    with pytest.raises(ValueError, match="without a layer_idx"):
        layer(torch.randn(1, 2, 16), past_key_values=DynamicCache())
    encoder = nn.TransformerEncoderLayer(16, 2)
    replace(encoder, "self_attn", "lmm")
    with pytest.raises(ValueError, match="got other tensors than query"):
        encoder.self_attn(torch.randn(3, 1, 16), torch.randn(3, 1, 16), torch.randn(3, 1, 16))

"""What hosts tell their attention and get back from it: understood, or refused by name."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    DynamicCache,
)

from titans_kernels import replace
from titans_kernels.adapt import TitansAttention, versions

V = 37
_IDS = {
    **{"vocab_size": V, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0},
    "initializer_range": 0.3,
}
_LLAMA = _IDS | {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64},
}
# Decoders whose attention calls its cache otherwise: model type, options, where.
OTHER_NAMES = {
    "gptj": (
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4, "n_positions": 64},
        "*.attn",
    ),
    "gpt_neo": (
        {
            **{"hidden_size": 16, "num_layers": 2, "num_heads": 2, "window_size": 4},
            **{"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64},
        },
        "*.attn.attention",
    ),
    "gpt_neox": (_LLAMA, "*.attention"),
    "bloom": ({"hidden_size": 16, "n_layer": 2, "n_head": 2}, "*.self_attention"),
}


def _tokens(*shape, seed=1):
    return torch.randint(1, V, shape, generator=torch.Generator().manual_seed(seed))


def _build(auto, kind, **options):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(_IDS | options))
    return auto.from_config(config).eval()


def _open(model):
    for name, parameter in model.named_parameters():
        if name.endswith("titans_gate"):
            nn.init.constant_(parameter, 0.5)
    return model


def _close(got, expected, atol=1e-10):
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("mode", ["replace", "beside"])
@pytest.mark.parametrize("kind", OTHER_NAMES)
def test_caches_under_other_names(kind, mode):
    options, where = OTHER_NAMES[kind]
    model = _build(AutoModelForCausalLM, kind, **options).double()
    replace(model, where, "lmm", mode=mode, chunk_size=4)
    _open(model)
    tokens, cache, pieces = _tokens(2, 9), DynamicCache(), []
    for piece in tokens.split([4, 1, 4], dim=1):
        pieces.append(model(piece, past_key_values=cache, use_cache=True).logits)
    # Their attention computes in float32 whatever the model is in.
    _close(torch.cat(pieces, 1), model(tokens, use_cache=False).logits, 1e-5)


def test_whisper_takes_a_cache_apart():
    model = _build(
        AutoModelForSpeechSeq2Seq,
        "whisper",
        **{"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16},
        **{"decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
        **{"num_mel_bins": 4, "max_source_positions": 8, "max_target_positions": 16},
        **{"decoder_start_token_id": 1, "init_std": 0.5},
    )
    replace(model, "model.decoder.layers.*.self_attn", "lmm", chunk_size=4)
    sound = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 5, "do_sample": False}
    tokens = model.generate(sound, **options)
    with pytest.raises(AttributeError, match=r"a memory leaves a state.*use_cache=False"):
        model.generate(sound, return_dict_in_generate=True, **options)
    named = model.generate(sound, return_dict_in_generate=True, use_cache=False, **options)
    assert torch.equal(named["sequences"][:, 1:], tokens)  # which are without the first


def test_the_residual_that_attention_adds():
    model = _build(AutoModelForCausalLM, "bloom", hidden_size=16, n_layer=1, n_head=2)
    replace(model, "transformer.h.0.self_attention", "lmm")
    layer = model.transformer.h[0].self_attention
    x, residual = torch.randn(1, 5, 16), torch.randn(1, 5, 16)
    out, weights = layer(x, residual, None, None)
    assert weights is None
    _close(out - residual, layer.block(x)[0], 1e-6)


_BART = {
    **{"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2},
    **{"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24},
    **{"max_position_embeddings": 64, "decoder_start_token_id": 0},
}
_T5 = {
    **{"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
    "decoder_start_token_id": 0,
}


@pytest.mark.parametrize("mode", ["replace", "beside"])
@pytest.mark.parametrize(
    "kind, options, where",
    [
        ("bart", _BART, "*.encoder_attn"),
        ("t5", _T5, "*.EncDecAttention"),
        ("t5", _T5, "decoder.block.1.layer.*.*Attention"),
    ],
)
def test_cross_attention_is_refused_before_anything_changes(kind, options, where, mode):
    model = _build(AutoModelForSeq2SeqLM, kind, **options)
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match="is cross-attention"):
        replace(model, where, "lmm", mode=mode)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert getattr(model.config, "titans_kernels", None) is None
    decoder = nn.TransformerDecoderLayer(16, 2)
    with pytest.raises(ValueError, match="multihead_attn is cross-attention"):
        replace(decoder, "*attn", "lmm", mode=mode)
    assert isinstance(decoder.self_attn, nn.MultiheadAttention)


def test_a_position_bias_goes_on_to_later_layers():
    model = _build(AutoModelForSeq2SeqLM, "t5", **_T5).double()
    with pytest.raises(ValueError, match="computes the position bias"):
        replace(model, "decoder.block.0.layer.0.SelfAttention", "lmm")
    [name] = replace(model, "decoder.block.1.layer.0.SelfAttention", "lmm", chunk_size=4)
    bias, seen = torch.randn(1, 2, 5, 5), model.get_submodule(name)
    out, passed_on, weights = seen(torch.randn(1, 5, 16).double(), None, None, bias)
    assert passed_on is bias and weights is None and out.shape == (1, 5, 16)
    source, target = _tokens(2, 7), _tokens(2, 6, seed=2)
    whole = model(source, decoder_input_ids=target, use_cache=False).logits
    half = model(source, decoder_input_ids=target[:, :3], use_cache=True)
    rest = model(
        encoder_outputs=(half.encoder_last_hidden_state,),
        decoder_input_ids=target[:, 3:],
        past_key_values=half.past_key_values,
    )
    _close(torch.cat([half.logits, rest.logits], 1), whole)


class _Attention(nn.Module):
    """Attention as small models write it."""

    def __init__(self, returns="tensor"):
        super().__init__()
        self.qkv, self.n_head, self.returns = nn.Linear(16, 48), 2, returns

    def forward(self, x, mask=None, kv_cache=None, scale=1.0, start_pos=0):
        out = self.qkv(x)[..., :16]
        return {"tensor": out, "weights": (out, out), "None": (out, None)}[self.returns]


@pytest.mark.parametrize("mode", ["replace", "beside"])
def test_plain_modules_refuse_what_they_do_not_understand(mode):
    model = nn.Sequential(_Attention())
    replace(model, "0", "lmm", mode=mode)
    x = torch.randn(2, 5, 16)
    expected = model[0](x)
    assert torch.equal(model[0](x, None, None, 1.0, 0), expected)
    assert torch.equal(model[0](x, mask=None, start_pos=0), expected)
    if mode == "beside":  # attention itself takes what it takes; the memory does not
        _open(model)
    for arguments, error in (
        ({"mask": torch.ones(2, 5)}, ValueError),
        ({"kv_cache": {}}, TypeError),
        ({"scale": 0.5}, ValueError),
        ({"start_pos": 3}, ValueError),
    ):
        with pytest.raises(error, match=rf"{next(iter(arguments))}: got .*, takes"):
            model[0](x, **arguments)
    if mode == "replace":
        with pytest.raises(ValueError, match="temperature: got 2"):
            model[0](x, temperature=2)
        with pytest.raises(TypeError, match="got 6 arguments, takes at most 5"):
            model[0](x, None, None, 1.0, 0, None)


@pytest.mark.parametrize("returns", ["tensor", "weights", "None"])
def test_plain_modules_return_the_same_form(returns):
    model = nn.Sequential(_Attention(returns))
    before = model[0](torch.randn(2, 5, 16))
    replace(model, "0", "lmm")
    after = model[0](torch.randn(2, 5, 16))
    if returns == "tensor":
        assert after.shape == before.shape
    else:
        assert [type(after), after[0].shape, after[1:]] == [tuple, (2, 5, 16), (None,)]


class _Residual(_Attention):
    def forward(self, x):
        residual = x
        return residual + self.qkv(x)[..., :16]


class _Needs(_Attention):
    def forward(self, hidden_states, layer_number):
        return self.qkv(hidden_states)[..., layer_number : layer_number + 16]


def test_modules_that_do_more_than_attention_are_refused():
    model = nn.Sequential(_Attention(), _Residual(), _Needs())
    with pytest.raises(ValueError, match="1 is a _Residual that adds its input"):
        replace(model, "[01]", "lmm")
    with pytest.raises(TypeError, match="2 is a _Needs that needs layer_number"):
        replace(model, "[02]", "lmm")
    with pytest.raises(ValueError, match="heads: got 0"):
        replace(model, "[0]", "lmm", heads=0)
    assert [type(m) for m in model] == [_Attention, _Residual, _Needs]
    bert = _build(AutoModel, "bert", **_ENCODER)
    with pytest.raises(ValueError, match="BertAttention that adds its input"):
        replace(bert, "encoder.layer.0.attention", "lmm", causal=True)


def test_one_refused_module_leaves_all_as_they_were():
    model = nn.Sequential(_Attention(), _Attention())
    replace(model, "1", "lmm", mode="beside")
    names = set(model.state_dict())
    with pytest.raises(ValueError, match="1 has a memory already"):
        replace(model, "[01]", "lmm", mode="beside")
    assert set(model.state_dict()) == names and not model[0]._forward_hooks


@pytest.mark.parametrize("mode", ["replace", "beside"])
def test_a_module_in_two_places_changes_in_both(mode):
    shared = _Attention()
    model = nn.ModuleList([nn.Sequential(shared), nn.Sequential(shared)])
    assert replace(model, "*.0", "lmm", mode=mode) == ["0.0", "1.0"]
    assert model[0][0] is model[1][0]
    assert isinstance(model[0][0], TitansAttention) == (mode == "replace")
    assert len(model[0][0]._forward_hooks) == (mode == "beside")


_ENCODER = {
    **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"intermediate_size": 24, "max_position_embeddings": 64},
}


def test_attention_that_sees_both_ways():
    where = "encoder.layer.*.attention.self"
    with pytest.warns(UserWarning, match=r"left to right in encoder\.layer\.0\.attention\.self;"):
        replace(_build(AutoModel, "bert", **_ENCODER), where, "lmm")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replace(_build(AutoModel, "bert", **_ENCODER), where, "lmm", causal=True)
        replace(_build(AutoModel, "bert", **_ENCODER), where, "lmm", mode="beside")
        replace(_build(AutoModelForCausalLM, "llama", **_LLAMA), "*.self_attn", "lmm")


def test_an_older_transformers_is_refused_by_number(monkeypatch):
    model = _build(AutoModelForCausalLM, "llama", **_LLAMA)
    monkeypatch.setattr(versions, "version", lambda name: "4.57.1")
    with pytest.raises(ImportError, match=r"transformers: got version 4\.57\.1, takes 5\.15"):
        replace(model, "*.self_attn", "lmm")
    monkeypatch.setattr(versions, "version", lambda name: "5.23.0")
    assert len(replace(model, "*.self_attn", "lmm")) == 2
    setup = Path(__file__).parents[1].joinpath("setup.py").read_text(encoding="utf-8")
    assert f"transformers>={'.'.join(map(str, versions.OLDEST))}" in setup

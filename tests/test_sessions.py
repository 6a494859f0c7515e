"""Conversations kept: to disk and back, moved, copied, for layers, models and hosts."""

import io

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, Qwen3Config

from titans_kernels import NeuralMemory, load_session, replace, save_session, sessions
from titans_kernels.adapt import TitansPytorchMemory
from titans_kernels.models import TitansConfig, TitansForCausalLM

_SIZE = {
    **{"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2},
    **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "initializer_range": 0.3},
    **{"intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8},
}
_SLIDING = {
    **{"use_sliding_window": True, "sliding_window": 4},
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
}
OPTIONS = {"max_new_tokens": 4, "do_sample": False}


def _titans(variant="mac"):
    options = {"num_heads": 2, "segment": 6, "window": 5, "chunk_size": 4, "n_persistent": 2}
    sizes = {k: v for k, v in _SIZE.items() if k in TitansConfig.__dataclass_fields__}
    return TitansForCausalLM(TitansConfig(variant=variant, **sizes, **options))


def _host(mode):
    kind, more = (LlamaConfig, {}) if mode == "replace" else (Qwen3Config, _SLIDING)
    model = AutoModelForCausalLM.from_config(kind(**_SIZE, **more))
    replace(model, "model.layers.[01].self_attn", "mag", mode=mode, window=5, chunk_size=4)
    for name, parameter in model.named_parameters():
        if name.endswith("titans_gate"):
            torch.nn.init.constant_(parameter, 0.5)
    return model


MODELS = {
    "mac": _titans,
    "lmm": lambda: _titans("lmm"),
    "replace": lambda: _host("replace"),
    "beside": lambda: _host("beside"),
}


def _model(name):
    torch.manual_seed(0)
    return MODELS[name]().double().eval()


def _through_disk(session):
    file = io.BytesIO()
    save_session(session, file)
    file.seek(0)
    return load_session(file, device="cpu")


def test_loading_takes_nothing_from_what_torch_may_load():
    before = set(torch.serialization.get_safe_globals())
    _through_disk(NeuralMemory(16, heads=2)(torch.randn(1, 5, 16))[1])
    assert set(torch.serialization.get_safe_globals()) == before


def _tokens(*shape, seed=1):
    return torch.randint(1, 37, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_conversation_goes_on_from_disk(name):
    model, text, more = _model(name), _tokens(2, 11), _tokens(2, 6, seed=2)
    expected = model.generate(torch.cat([text, more], 1), **OPTIONS)[:, 17:]
    cache = model(text, use_cache=True).past_key_values
    copied = sessions.clone(cache)
    loaded = _through_disk(cache)
    assert type(loaded) is type(cache) and loaded.get_seq_length() == 11
    mask = {"attention_mask": torch.ones(2, 17, dtype=torch.long)}
    for kept in (loaded, cache, copied):  # what goes on from one leaves the others as they were
        got = model.generate(more, past_key_values=kept, **mask, **OPTIONS)
        assert torch.equal(got[:, 6:], expected)
    assert all(t.is_meta for t in _tensors(sessions.move(copied, "meta")))


def _tensors(session):
    found = []
    sessions._mapped(session, lambda x: found.append(x) or x)
    assert found
    return found


@pytest.mark.parametrize("variant", ["mac", "mag", "mal", "lmm"])
@torch.no_grad()
def test_new_tokens_without_a_mask(variant):
    torch.manual_seed(0)
    model = _titans(variant).double().eval()
    text, more = _tokens(2, 9), _tokens(2, 5, seed=2)
    more[0, :2] = 0  # padding on the left of the new tokens of one row
    mask = torch.cat([torch.ones_like(text), more.ne(0).long()], 1)
    whole = torch.cat([text, more], 1)
    expected = model.generate(whole, attention_mask=mask, **OPTIONS)[:, 14:]
    for tokens in (more, whole):
        cache = model(text, use_cache=True).past_key_values
        got = model.generate(tokens, past_key_values=cache, **OPTIONS)
        assert torch.equal(got[:, tokens.shape[1] :], expected)


@torch.no_grad()
def test_more_new_tokens_than_were_read():
    """What begins as the text that was read is the whole text; all else is new."""
    model, text, more = _titans("lmm").double().eval(), _tokens(2, 4), _tokens(2, 9, seed=2)
    whole = torch.cat([text, more], 1)
    expected = model.generate(whole, **OPTIONS)[:, 13:]
    alone = model.generate(more, **OPTIONS)[:, 9:]
    assert not torch.equal(alone, expected)
    for tokens in (more, whole):
        cache = model(text[:, :3], use_cache=True).past_key_values
        model(text[:, 3:], past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        got = model.generate(tokens.flip(0), past_key_values=_through_disk(cache), **OPTIONS)
        assert torch.equal(got[:, tokens.shape[1] :].flip(0), expected)


def test_states_of_layers():
    layer = NeuralMemory(8, heads=2, chunk_size=4).double()
    theirs = TitansPytorchMemory(8, batch_size=4, mem_model_norm_add_residual=False).double()
    x = torch.randn(2, 11, 8, dtype=torch.float64, requires_grad=True)
    _, state = layer(x)
    _, other = theirs(x)
    session = {"ours": [state], "theirs": other, "turn": 3}
    loaded = _through_disk(session)
    assert loaded["turn"] == 3 and loaded["theirs"].seq_index == 11
    assert not any(t.requires_grad for t in _tensors(loaded))
    assert not any(t.requires_grad for t in _tensors(sessions.detach(session)))
    assert torch.equal(layer(x, loaded["ours"][0])[0], layer(x, state)[0])
    assert torch.equal(theirs(x, state=loaded["theirs"])[0], theirs(x, state=other)[0])


def test_a_session_is_as_large_as_what_it_holds():
    layer = NeuralMemory(8, heads=2)
    _, state = layer(torch.randn(64, 3, 8))
    whole, part = io.BytesIO(), io.BytesIO()
    save_session(state, whole)
    save_session(state.map(lambda x: x[:1]), part)
    assert part.tell() < whole.tell() / 16


def test_a_cache_that_has_read_nothing():
    model = _host("replace").eval()
    tokens = _tokens(1, 5)
    loaded = _through_disk(DynamicCache(config=model.config))
    with torch.no_grad():
        torch.testing.assert_close(
            model(tokens, past_key_values=loaded).logits, model(tokens).logits
        )

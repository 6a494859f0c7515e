"""The models for transformers: configuration, caches, padding, packing, saving, training."""

import re
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, StaticCache

from titans_kernels.adapt.versions import checkpointing
from titans_kernels.models import TitansCache, TitansConfig, TitansForCausalLM, TitansModel

VARIANTS = ["mac", "mag", "mal", "lmm", "tnt"]
TNT = {"global_chunk": 6, "local_chunks": [4, 3], "reset_every": 8}
V = 37


def _config(variant="mac", **options):
    tiny = {
        **{"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2},
        **{"segment": 6, "window": 5, "chunk_size": 4, "n_persistent": 2, "expansion": 2},
        **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0},
    }
    tiny |= TNT if variant == "tnt" else {}
    return TitansConfig(variant=variant, **(tiny | options))


def _model(variant="mac", seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    model = TitansForCausalLM(_config(variant, initializer_range=0.3, **options)).to(dtype)
    return model.eval()


def _tokens(*shape, seed=1):
    return torch.randint(1, V, shape, generator=torch.Generator().manual_seed(seed))


def _close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def _state_bytes(cache):
    leaves = pytree.tree_leaves([layer.state for layer in cache.layers])
    return sum(x.numel() * x.element_size() for x in leaves)


def test_auto_classes_know_titans():
    config = AutoConfig.for_model("titans", num_heads=2, hidden_size=16, num_hidden_layers=1)
    assert isinstance(config, TitansConfig) and config.num_attention_heads == 2
    assert isinstance(AutoModel.from_config(config), TitansModel)
    assert isinstance(AutoModelForCausalLM.from_config(config), TitansForCausalLM)


@pytest.mark.parametrize(
    "size, variant, millions",
    [
        *[("titans_170m", variant, 170) for variant in VARIANTS],
        ("titans_340m", "mac", 340),
        ("titans_340m", "lmm", 340),
        ("titans_760m", "mac", 760),
        ("titans_1_3b", "mac", 1300),
    ],
)
def test_sizes(size, variant, millions):
    with torch.device("meta"):
        model = TitansForCausalLM(getattr(TitansConfig, size)(variant))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert abs(count / 1e6 / millions - 1) < 0.03


@pytest.mark.parametrize("variant", VARIANTS)
def test_reading_in_pieces_is_reading(variant):
    model, tokens = _model(variant), _tokens(2, 17)
    expected = model(tokens, use_cache=False)
    assert expected.past_key_values is None
    cache, logits, sizes = None, [], set()
    for piece in tokens.split([7, 1, 1, 8], dim=1):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
        sizes.add(_state_bytes(cache))
    _close(torch.cat(logits, 1), expected.logits)
    assert len(sizes) == 1 and cache.get_seq_length() == 17


@pytest.mark.parametrize("variant", VARIANTS)
def test_generate(variant):
    model, tokens = _model(variant), _tokens(2, 7)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(tokens, use_cache=False, **options)
    assert expected.shape == (2, 13)
    assert (model.generate(tokens, **options) == expected).all()
    assert (model.generate(tokens, prefill_chunk_size=3, **options) == expected).all()
    for cache in (TitansCache(2), DynamicCache(), DynamicCache(config=model.config)):
        out = model.generate(tokens, past_key_values=cache, return_dict_in_generate=True, **options)
        assert (out.sequences == expected).all() and out.past_key_values is cache
    # On from where it stopped.
    more = model.generate(expected, past_key_values=cache, **options)
    assert (more == model.generate(expected, use_cache=False, **options)).all()


def test_generate_with_beams():
    model, tokens = _model("mag"), _tokens(2, 5)
    options = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    expected = model.generate(tokens, use_cache=False, **options)
    assert (model.generate(tokens, **options) == expected).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_generate_from_padded_prompts(variant):
    model = _model(variant)
    prompts = [_tokens(1, 4), _tokens(1, 9, seed=2)]
    padded = torch.cat([F.pad(p, (9 - p.shape[1], 0)) for p in prompts])
    mask = padded.ne(0).long()
    options = {"max_new_tokens": 5, "do_sample": False}
    got = model.generate(padded, attention_mask=mask, **options)
    for row, prompt in zip(got, prompts, strict=True):
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        assert (row[-5:] == alone[0, -5:]).all()


@pytest.mark.parametrize("variant", ["mac", "mal"])
def test_padding_anywhere(variant):
    model, tokens = _model(variant), _tokens(3, 10)
    mask = torch.tensor([[0] * 4 + [1] * 6, [1] * 7 + [0] * 3, [1, 0, 0, 1, 1, 0, 1, 1, 1, 0]])
    out = model(tokens, attention_mask=mask, output_hidden_states=True)
    assert [h.shape for h in out.hidden_states] == [(3, 10, 16)] * 3
    for row, real in enumerate(mask.bool()):
        alone = model(tokens[row : row + 1, real])
        _close(out.logits[row, real], alone.logits[0])
        assert not out.hidden_states[-1][row, ~real].any()
    # A finished row waits while the other goes on.
    later = torch.tensor([[1, 1], [0, 0], [1, 0]])
    cache, more = out.past_key_values, _tokens(3, 2, seed=3)
    out = model(more, attention_mask=torch.cat([mask, later], 1), past_key_values=cache)
    both = torch.cat([tokens[:1, 4:], more[:1]], 1)
    _close(out.logits[:1], model(both).logits[:, -2:])


@pytest.mark.parametrize("variant", ["mac", "mag"])
def test_packed_sequences(variant):
    model, tokens = _model(variant), _tokens(1, 12)
    ends = [0, 5, 6, 12]
    expected = torch.cat([model(tokens[:, a:b]).logits for a, b in pairwise(ends)], 1)
    cu_seqlens = torch.tensor(ends)
    positions = torch.cat([torch.arange(n) for n in cu_seqlens.diff()])[None]
    for how in (
        {"cu_seqlens": cu_seqlens},
        {"cu_seq_lens_q": cu_seqlens.int(), "cu_seq_lens_k": cu_seqlens.int()},
        {"position_ids": positions},
    ):
        _close(model(tokens, **how).logits, expected)


def test_saved_and_loaded(tmp_path):
    for tied in (False, True):
        folder = tmp_path / str(tied)
        model, tokens = _model(tie_word_embeddings=tied), _tokens(1, 9)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        model.save_pretrained(folder)
        assert (folder / "model.safetensors").exists()
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
        _close(loaded(tokens).logits, model(tokens).logits)
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert half(tokens).logits.dtype == torch.bfloat16
    # What a checkpoint lacks starts as it should, what it has is kept.
    model.model.save_pretrained(tmp_path / "base")
    fresh = TitansForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float64, tie_word_embeddings=False
    )
    assert 0.1 < fresh.lm_head.weight.std() < 0.5
    mixer, kept = (m.model.layers[1].mixer.state_dict() for m in (fresh, model))
    assert all(torch.equal(mixer[name], kept[name]) for name in kept)


def test_from_the_meta_device():
    config = _config("mac", tie_word_embeddings=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    torch.manual_seed(0)
    model.reset_parameters()
    other = TitansForCausalLM(config)
    torch.manual_seed(0)
    other.reset_parameters()
    assert not list(model.buffers())
    for (name, got), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(got, expected), name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.isfinite(model(_tokens(1, 8), labels=_tokens(1, 8)).loss)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(reentrant):
    gradients = []
    for on in (False, True):
        model, tokens = _model().train(), _tokens(2, 11)
        if on:
            getattr(model, f"{checkpointing()}_enable")({"use_reentrant": reentrant})
        first = model(tokens[:, :6], use_cache=True)
        loss = model(tokens[:, 6:], past_key_values=first.past_key_values.detach()).logits.square()
        loss.mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        if expected is not None:
            _close(gradients[1][name], expected)


def test_loss_and_training():
    model, tokens = _model(dtype=torch.float32).train(), _tokens(2, 12)
    out = model(tokens, labels=tokens, logits_to_keep=0)
    assert out.past_key_values is None, "a cache in training keeps the graph alive"
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    _close(model(tokens, logits_to_keep=2).logits, out.logits[:, -2:])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(10):
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None for p in model.parameters())
    assert loss < 0.7 * expected


def test_one_graph():
    model, tokens = _model("lmm", num_hidden_layers=1), _tokens(2, 8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    _close(compiled(tokens, use_cache=False).logits, model(tokens).logits)


def test_more_words():
    model, tokens = _model(tie_word_embeddings=True), _tokens(1, 8)
    before = model(tokens).logits
    model.resize_token_embeddings(V + 3)
    _close(model(tokens).logits[..., :V], before)
    assert model(tokens, labels=tokens).loss.isfinite()


def test_beams_and_rows_of_a_cache():
    model, tokens = _model("mal"), _tokens(2, 6)
    cache = model(tokens).past_key_values
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    cache.batch_select_indices(torch.tensor([0, 1]))
    step = model(tokens[:, :1][[1, 0]], past_key_values=cache).logits
    expected = model(torch.cat([tokens, tokens[:, :1]], 1)).logits[[1, 0], -1:]
    _close(step, expected)
    cache.reset()
    assert cache.get_seq_length() == 0
    _close(model(tokens, past_key_values=cache).logits, model(tokens).logits)


def test_what_is_refused():
    model, tokens = _model(), _tokens(2, 6)
    cache = model(tokens).past_key_values
    with pytest.raises(ValueError, match="cannot unlearn"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="past_key_values: got StaticCache"):
        model(tokens, past_key_values=StaticCache(config=model.config, max_cache_len=8))
    with pytest.raises(TypeError, match="past_key_values: got tuple"):
        model(tokens, past_key_values=())
    with pytest.raises(ValueError, match="input_ids, inputs_embeds: got both or neither"):
        model.model()
    with pytest.raises(ValueError, match=r"attention_mask: got \[2, 3\]"):
        model(tokens, attention_mask=torch.ones(2, 3))
    for name in ("hidden_size", "num_hidden_layers", "num_heads", "vocab_size"):
        with pytest.raises(ValueError, match=f"{name}: got 0, takes an int of at least 1"):
            TitansConfig(**{name: 0})
    with pytest.raises(ValueError, match="variant: got 'mak'"):
        _config("mak")
    for name, message in {
        "chunk_sise": "chunk_sise: unknown; did you mean chunk_size?",
        "memory_dpth": "memory_dpth: unknown; there are activation",
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            TitansConfig(**{name: 8})
    with pytest.raises(ValueError, match="windw: unknown; did you mean window"):
        TitansConfig.titans_170m("mag", windw=8)
    with pytest.raises(ValueError, match="use_cache: got True"):
        model(tokens, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]] * 2), use_cache=True)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(tokens[:1], assistant_model=model)


@pytest.mark.parametrize("name", sorted(TitansConfig.__annotations__))
def test_every_option_misspelt_is_refused(name):
    """By a letter too many or too few, in code or in a file."""
    for wrong in (name + "x", name[:-1], name.replace("_", "", 1) + "s"):
        with pytest.raises(ValueError, match=f"^{wrong}: unknown; did you mean {name[:4]}"):
            TitansConfig(**{wrong: 1})
        with pytest.raises(ValueError, match=f"^{wrong}: unknown; did you mean {name[:4]}"):
            TitansConfig.from_dict({wrong: 1})


def test_what_transformers_takes_besides_is_taken(tmp_path):
    config = TitansConfig(
        num_labels=3, torch_dtype="float32", output_attentions=False, max_length=9
    )
    config.note = "of a user"
    config.save_pretrained(tmp_path)
    loaded = TitansConfig.from_pretrained(tmp_path, window=7)
    assert (loaded.num_labels, loaded.note, loaded.window) == (3, "of a user", 7)


def test_local_chunks_of_a_configuration(tmp_path):
    config = TitansConfig(variant="tnt", local_chunks=(8, 4))
    config.save_pretrained(tmp_path)
    assert TitansConfig.from_pretrained(tmp_path).local_chunks == config.local_chunks == [8, 4]
    assert TitansConfig(variant="tnt").block_options()["local_chunks"] == [16]
    assert "local_chunks" not in TitansConfig().block_options()
    inside = _model("mag", local_chunks=[4], reset_every=8, num_hidden_layers=1)
    assert inside.model.layers[0].mixer.memory.reset_every == 8
    with pytest.raises(
        ValueError, match=r"local_chunks: got \[4\], the model has no local memories"
    ):
        _model("lmm", num_hidden_layers=1).set_local_chunks([4])


def test_a_configuration_scales_with_its_width():
    config = TitansConfig(hidden_size=64)
    assert config.initializer_range == 0.125
    assert config.intermediate_size == 192  # 8 / 3 of the width, in steps of 64

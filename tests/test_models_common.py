"""What transformers requires of every model, in more detail than its own tests do.

Those run too: test_transformers_own.py.
"""

import copy

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from titans_kernels.adapt.cache import MemoryLayer
from titans_kernels.adapt.versions import checkpointing
from titans_kernels.models import TitansConfig, TitansForCausalLM, TitansModel

VARIANTS = ["mac", "mag", "mal", "lmm", "tnt"]
TNT = {"global_chunk": 6, "local_chunks": [4, 3], "reset_every": 8}
V = 37
TINY = {
    **{"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2},
    **{"segment": 6, "window": 5, "chunk_size": 4, "n_persistent": 2, "expansion": 2},
    **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "initializer_range": 0.3},
}


def _model(variant="mac", cls=TitansForCausalLM, **options):
    torch.manual_seed(0)
    own = TNT if variant == "tnt" else {}
    return cls(TitansConfig(variant=variant, **(TINY | own | options))).double().eval()


def _tokens(*shape, seed=1):
    return torch.randint(1, V, shape, generator=torch.Generator().manual_seed(seed))


def _close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def _padded():
    tokens, mask = _tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    return tokens, mask


# --------------------------------------------------------------------------------- outputs


def _outputs_of(model, **how):
    return model(_tokens(2, 9), output_hidden_states=True, use_cache=True, **how)


def _embedded(model, **how):
    tokens, mask = _padded()
    return model(inputs_embeds=model.get_input_embeddings()(tokens), attention_mask=mask, **how)


def _each_alone(model):
    rows = [model(row[None]).logits for row in _tokens(2, 9)]
    return torch.cat(rows)


# Two ways to the same numbers.
SAME = {
    "the same call again": (lambda m: m(_tokens(2, 9)).logits, lambda m: m(_tokens(2, 9)).logits),
    "a batch, or each row alone": (lambda m: m(_tokens(2, 9)).logits, _each_alone),
    "embeddings for tokens": (
        lambda m: m(_padded()[0], attention_mask=_padded()[1]).logits,
        lambda m: _embedded(m).logits,
    ),
    "a tuple for a dict": (
        lambda m: pytree.tree_leaves([_outputs_of(m).logits, *_outputs_of(m).hidden_states]),
        lambda m: pytree.tree_leaves([(t := _outputs_of(m, return_dict=False))[0], *t[2]]),
    ),
    "a mask of ones for none": (
        lambda m: m(_tokens(2, 9)).logits,
        lambda m: m(_tokens(2, 9), attention_mask=torch.ones(2, 9, dtype=torch.bool)).logits,
    ),
    "the last of all logits": (
        lambda m: m(_tokens(2, 9)).logits[:, [3, 8]],
        lambda m: m(_tokens(2, 9), logits_to_keep=torch.tensor([3, 8])).logits,
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", SAME)
def test_two_ways(case, variant):
    model, (one, other) = _model(variant), SAME[case]
    _close(other(model), one(model))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cls", [TitansModel, TitansForCausalLM])
def test_hidden_states(cls, padded):
    tokens, mask = _padded()
    inputs = {"input_ids": tokens} | ({"attention_mask": mask} if padded else {})
    model = _model(cls=cls)
    by_argument = model(**inputs, output_hidden_states=True)
    assert model(**inputs).hidden_states is None
    model.config.output_hidden_states = True
    for out in (by_argument, model(**inputs)):
        assert [h.shape for h in out.hidden_states] == [(2, 9, 16)] * 3
        for h in out.hidden_states:
            h.retain_grad()
        out[0].sum().backward()
        assert all(h.grad is not None and h.grad.any() for h in out.hidden_states)
    _close(out[0], model(**inputs, output_hidden_states=False)[0])
    with pytest.raises(TypeError, match=r"output_hidden_states: got \[0\], takes True or False"):
        model(**inputs, output_hidden_states=[0])


def test_the_loss_takes_what_trainers_pass():
    model, tokens = _model(), _tokens(2, 9)
    mean = model(tokens, labels=tokens).loss
    _close(model(tokens, labels=tokens, num_items_in_batch=torch.tensor(32)).loss, mean / 2)
    shifted = nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
    _close(model(tokens, labels=tokens, shift_labels=shifted).loss, mean)


# ------------------------------------------------------------------- parameters and loading


def test_embeddings_are_found_and_set():
    model = _model()
    assert model.get_input_embeddings() is model.model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head
    model.set_input_embeddings(nn.Embedding(V, 16).double())
    model.set_output_embeddings(nn.Linear(16, V, bias=False).double())
    assert model(_tokens(1, 5)).logits.isfinite().all()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [V + 5, V - 5])
def test_resized_embeddings(size, tied):
    model, tokens = _model(tie_word_embeddings=tied), _tokens(1, 8) % (V - 5)
    before, kept = model(tokens).logits, min(size, V)
    embedding = model.resize_token_embeddings(size)
    assert embedding.num_embeddings == model.config.vocab_size == model.lm_head.out_features == size
    assert (model.lm_head.weight is embedding.weight) == tied
    _close(model(tokens).logits[..., :kept], before[..., :kept])


def test_it_starts_as_the_configuration_says():
    model = _model(hidden_size=32, initializer_range=0.2)
    for name, p in model.named_parameters():
        if ".mlp." in name or "embed" in name or "lm_head" in name:
            assert abs(p.std() - 0.2) < 0.02, name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("lacks", ["", "mlp.up_proj", "q_proj"])
def test_what_a_checkpoint_lacks_starts_as_it_does(lacks, variant, tmp_path):
    model = _model(variant).float()
    whole = model.state_dict()
    kept = {name: x for name, x in whole.items() if lacks and lacks not in name}
    kept["model.norm.weight"] = whole["model.norm.weight"]
    model.save_pretrained(tmp_path, state_dict={name: x + 1 for name, x in kept.items()})
    loaded, found = TitansForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert found["missing_keys"] == set(whole) - set(kept) and found["missing_keys"]
    for name, got in loaded.state_dict().items():
        expected = whole[name]
        if name in kept:
            assert torch.equal(got, expected + 1), name
        elif (expected == expected.flatten()[0]).all():
            assert torch.equal(got, expected), name
        elif got.numel() > 100:  # fewer random numbers say little
            assert 0.7 < got.std() / expected.std() < 1.4, name


def test_mismatched_shapes(tmp_path):
    _model().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        TitansForCausalLM.from_pretrained(tmp_path, vocab_size=V + 1)
    loaded = TitansForCausalLM.from_pretrained(
        tmp_path, vocab_size=V + 1, ignore_mismatched_sizes=True
    )
    assert loaded(_tokens(1, 5)).logits.shape == (1, 5, V + 1)


def test_every_way_to_load(tmp_path):
    model, tokens = _model(), _tokens(1, 9)
    expected = model(tokens).logits
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    with torch.device("cpu"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == torch.float64
    other = _model(initializer_range=0.5)
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    for one in (loaded, other, copy.deepcopy(model)):
        _close(one(tokens).logits, expected)
        assert all(p.is_contiguous() for p in one.parameters())


def test_the_configuration_comes_back(tmp_path):
    config = TitansConfig(variant="mal", window=7, eos_token_id=[3, 4], conv_size=None)
    config.save_pretrained(tmp_path)
    for other in (TitansConfig.from_pretrained(tmp_path), TitansConfig.from_dict(config.to_dict())):
        assert other.to_dict() == config.to_dict() and other.window == 7
        assert other.num_attention_heads == other.num_heads == config.num_heads


# --------------------------------------------------------------------------------- training


def test_checkpointing_is_switched():
    model = _model().train()
    layers = [model.model.layers[0], model.model.layers[1]]
    for on in (True, False):
        getattr(model, f"{checkpointing()}_{'enable' if on else 'disable'}")()
        assert getattr(model, f"is_{checkpointing()}") == on
        assert all(layer.gradient_checkpointing == on for layer in layers)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_inputs_of_a_frozen_model_require_gradients(checkpointed):
    """As adapters are trained: what is learned lies behind frozen layers."""
    model = _model().train().requires_grad_(False)
    if checkpointed:
        getattr(model, f"{checkpointing()}_enable")({"use_reentrant": True})
    model.enable_input_require_grads()
    model.model.layers[0].mlp.down_proj.weight.requires_grad_()
    model(_tokens(2, 9), labels=_tokens(2, 9)).loss.backward()
    assert model.model.layers[0].mlp.down_proj.weight.grad.any()


# ------------------------------------------------------------------------------- generation

MODES = {
    "greedy": {"do_sample": False},
    "sample": {"do_sample": True},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampled beams": {"do_sample": True, "num_beams": 3},
    "several for each": {"do_sample": True, "num_return_sequences": 3},
    "with processors": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", MODES)
def test_generation_needs_no_cache(mode, variant):
    model, (tokens, mask) = _model(variant), _padded()
    options = {"max_new_tokens": 6, "attention_mask": mask, "return_dict_in_generate": True}
    options |= {"output_scores": True, "output_logits": True, "output_hidden_states": True}
    outs = []
    for use_cache in (False, True):
        torch.manual_seed(3)
        outs.append(model.generate(tokens, use_cache=use_cache, **options, **MODES[mode]))
    without, cached = outs
    assert without.past_key_values is None
    assert torch.equal(cached.sequences, without.sequences)
    _close(torch.stack(cached.logits), torch.stack(without.logits))
    rows = len(cached.logits[0])
    assert len(cached.scores) == len(cached.hidden_states) == 6
    assert cached.hidden_states[0][-1].shape == (rows, 9, 16)
    assert cached.hidden_states[1][-1].shape == (rows, 1, 16)
    for layer in cached.past_key_values.layers:
        assert isinstance(layer, MemoryLayer) and layer.get_seq_length() == 14
        assert all(len(x) == rows for x in pytree.tree_leaves(layer.state))


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_from_embeddings(beams):
    model, (tokens, mask) = _model(), _padded()
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    embedded = model.get_input_embeddings()(tokens)
    expected = model.generate(tokens, attention_mask=mask, **options)
    got = model.generate(inputs_embeds=embedded, attention_mask=mask, **options)
    assert torch.equal(got, expected[:, 9:])
    both = model.generate(tokens, inputs_embeds=embedded, attention_mask=mask, **options)
    assert torch.equal(both, expected)


def test_generation_from_nothing():
    assert _model().generate(bos_token_id=1, max_new_tokens=5, do_sample=False).shape == (1, 6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_prefix_for_many_continuations(variant):
    model, tokens = _model(variant), _tokens(2, 9)
    with torch.no_grad():  # what belongs to a graph cannot be copied
        prefix = model(tokens[:, :7], use_cache=True).past_key_values
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(tokens, **options)
    for _ in range(2):
        got = model.generate(tokens, past_key_values=copy.deepcopy(prefix), **options)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_in_front_of_a_continuation(variant):
    model, tokens, mask = _model(variant), _tokens(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[1, 6:9] = 0
    whole = model(tokens, attention_mask=mask).logits
    first = model(tokens[:, :6], attention_mask=mask[:, :6], use_cache=True)
    second = model(tokens[:, 6:], attention_mask=mask, past_key_values=first.past_key_values)
    _close(second.logits[:, -1], whole[:, -1])
    alone = model(tokens[1:, mask[1].bool()]).logits
    _close(second.logits[1, -1], alone[0, -1])


def test_candidates_cannot_be_taken_back():
    model, tokens = _model(), _tokens(1, 9)
    for how in ({"assistant_model": _model()}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(ValueError, match="stateful"):
            model.generate(tokens, max_new_tokens=4, do_sample=False, **how)


def test_the_pipeline():
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<pad>": 0} | {chr(ord("a") + i): 1 + i for i in range(26)}
    whole = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    whole.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=whole, pad_token="<pad>")
    tokenizer.padding_side = "left"
    write = pipeline("text-generation", model=_model(vocab_size=27), tokenizer=tokenizer)
    options = {"max_new_tokens": 4, "do_sample": False, "return_full_text": False}
    together = write(["a b c", "t i t a n s"], batch_size=2, **options)
    for text, found in zip(["a b c", "t i t a n s"], together, strict=True):
        assert write(text, **options) == found


def test_the_trainer(tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in _tokens(8, 9)]
    options = {"max_steps": 3, "report_to": [], "use_cpu": True, checkpointing(): True}
    arguments = TrainingArguments(str(tmp_path), **options)
    trainer = Trainer(_model().float(), arguments, train_dataset=rows, eval_dataset=rows)
    assert trainer.train().global_step == 3
    assert trainer.evaluate()["eval_loss"] > 0

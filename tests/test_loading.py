"""Models that `replace` changed: saved, loaded by one call, changed back, offloaded, quantised."""

import copy
import logging
import os
import subprocess
import sys

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, LlamaConfig

from titans_kernels import from_pretrained, replace, restore
from titans_kernels.models import TitansConfig, TitansForCausalLM

_SIZE = {
    **{"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2},
    **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "initializer_range": 0.3},
}
HOSTS = {
    "llama": (LlamaConfig(**_SIZE, intermediate_size=24), "model.layers.{}.self_attn"),
    "gpt2": (GPT2Config(**_SIZE, n_positions=64), "transformer.h.{}.attn"),
}
X = torch.randint(1, 37, (2, 9), generator=torch.Generator().manual_seed(1))


def _host(name="llama", dtype=torch.float32):
    torch.manual_seed(0)
    config, where = HOSTS[name]
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype).eval(), where


def _open(model):
    for name, parameter in model.named_parameters():
        if name.endswith("titans_gate"):
            nn.init.constant_(parameter, 0.5)


def _changed(mode, name="llama"):
    model, where = _host(name)
    # Two recipes, one of them given from inside the model.
    replace(model, where.format(0), "mag", mode=mode, window=5, chunk_size=4)
    replace(model.base_model, lambda n, _: where.format(2).endswith(n), "lmm", mode=mode)
    _open(model)
    return model


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("mode", ["replace", "beside"])
@torch.no_grad()
def test_saved_loaded_and_restored(mode, name, tmp_path, caplog):
    before, _ = _host(name)
    model = _changed(mode, name)
    expected = model(X).logits
    assert (expected - before(X).logits).abs().max() > 1e-2
    model.save_pretrained(tmp_path)

    loaded = from_pretrained(str(tmp_path))
    assert type(loaded) is type(before) and not loaded.training
    torch.testing.assert_close(loaded(X).logits, expected)
    options = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(loaded.generate(X, **options), model.generate(X, **options))
    loaded.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(from_pretrained(str(tmp_path / "again"))(X).logits, expected)
    half = from_pretrained(str(tmp_path), dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}

    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    finally:
        logger.removeHandler(caplog.handler)
    assert "load_this_with_titans_kernels_from_pretrained" in caplog.text

    where = HOSTS[name][1]
    assert restore(copy.deepcopy(model)) == [where.format(0), where.format(2)]
    restore(model)
    assert torch.equal(model(X).logits, before(X).logits)
    assert model.state_dict().keys() == before.state_dict().keys()
    model.save_pretrained(tmp_path / "restored")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "restored")
    torch.testing.assert_close(plain(X).logits, before(X).logits)
    if mode == "replace":
        with pytest.raises(ValueError, match="loaded with memories in place of"):
            restore(loaded)


def test_what_is_not_kept_with_the_model():
    model = _changed("replace")
    count = sum(p.numel() for p in model.parameters())
    assert count == sum(v.numel() for v in model.state_dict().values())
    assert restore(model) and restore(model) == []


@pytest.mark.parametrize("mode", ["replace", "beside"])
def test_one_module_in_two_places_is_restored_in_both(mode):
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    model = nn.ModuleDict({"a": attention, "b": attention})
    replace(model, "[ab]", "lmm", mode=mode)
    if mode == "replace":  # and replaced once more
        replace(model, "a", "mag", window=5)
    assert restore(model) == ["a", "b"]
    assert model["a"] is attention and model["b"] is attention
    assert not attention._forward_hooks and not hasattr(attention, "titans")


def test_memories_inside_adapters_are_not_restored():
    model, where = _host()
    replace(model, where.format(0), "lmm", mode="beside")
    options = {"target_modules": ["q_proj"], "exclude_modules": ".*titans.*"}
    adapted = get_peft_model(model, LoraConfig(modules_to_save=["titans"], **options))
    with pytest.raises(ValueError, match=r"one with adapters around .*titans"):
        restore(adapted)
    assert restore(adapted.merge_and_unload()) == [where.format(0)]


def test_a_checkpoint_without_a_recipe_is_refused(tmp_path):
    _host()[0].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no titans_kernels, takes what replace changed"):
        from_pretrained(str(tmp_path))


@pytest.mark.slow
def test_titans_models_in_a_process_that_has_imported_nothing(tmp_path):
    sizes = {"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2}
    TitansForCausalLM(TitansConfig(variant="lmm", **sizes)).save_pretrained(tmp_path)
    assert isinstance(from_pretrained(str(tmp_path)), TitansForCausalLM)
    code = f"""
import transformers
load = transformers.AutoModelForCausalLM.from_pretrained
try:
    load({str(tmp_path)!r})
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
else:
    raise AssertionError("loaded")
model = load({str(tmp_path)!r}, trust_remote_code=True)
assert type(model).__module__ == "titans_kernels.models.modeling", type(model)
"""
    env = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("mode", ["replace", "beside"])
@torch.no_grad()
def test_layers_in_an_offloaded_host(mode, tmp_path):
    plain = _changed(mode)
    model, where = _host()
    model = accelerate.disk_offload(model, str(tmp_path), torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())
    replace(model, where.format(0), "mag", mode=mode, window=5, chunk_size=4)
    replace(model, where.format(2), "lmm", mode=mode)
    new = [(n, p) for n, p in model.named_parameters() if ".block." in n or "titans" in n]
    assert new and not any(p.is_meta for _, p in new)
    weights = dict(plain.named_parameters())
    for n, p in new:
        p.copy_(weights[n])
    torch.testing.assert_close(model(X).logits, plain(X).logits)


class _Quantised(nn.Module):
    """Attention whose weights are integers, as bitsandbytes keeps them."""

    def __init__(self, compute_dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16, 16, dtype=torch.int8), requires_grad=False)
        self.hidden_size, self.num_heads, self.compute_dtype = 16, 2, compute_dtype

    def forward(self, hidden_states):
        return hidden_states @ self.weight.to(hidden_states.dtype), None


@pytest.mark.parametrize("compute_dtype", [None, torch.float32])
@pytest.mark.parametrize("mode", ["replace", "beside"])
def test_layers_in_a_quantised_host_have_its_compute_dtype(mode, compute_dtype):
    host = nn.ModuleDict({"attn": _Quantised(compute_dtype), "norm": nn.LayerNorm(16)})
    host.to(torch.bfloat16)
    replace(host, "attn", "lmm", mode=mode)
    layer = host["attn"] if mode == "replace" else host["attn"].titans
    expected = compute_dtype or torch.bfloat16
    assert {p.dtype for p in layer.parameters()} == {expected}
    out, _ = host["attn"](torch.randn(1, 5, 16, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


BITS = {
    8: ({"load_in_8bit": True}, torch.float32),
    4: ({"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16}, torch.bfloat16),
}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("mode", ["replace", "beside"])
def test_layers_in_a_host_of_bitsandbytes(mode, bits, tmp_path):
    """Its linear layers of 8 or 4 bits; ours have the dtype that these compute in, and train."""
    options, dtype = BITS[bits]
    config = LlamaConfig(**_SIZE | {"hidden_size": 64}, intermediate_size=64)  # whole blocks of 32
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    where = HOSTS["llama"][1]
    quantised = BitsAndBytesConfig(**options)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantised, device_map="cpu"
    )
    assert type(model.model.layers[0].self_attn.q_proj).__module__.startswith("bitsandbytes.")
    before = model(X).logits
    replace(model, where.format(0), "mag", mode=mode, window=5, chunk_size=4)
    if mode == "beside":
        assert torch.equal(model(X).logits, before)
    _open(model)
    layer = model.model.layers[0].self_attn
    new = dict((layer if mode == "replace" else layer.titans).named_parameters())
    assert {p.dtype for p in new.values()} == {dtype}
    whole = model(X).logits
    parts = model(X[:, :6], use_cache=True)
    last = model(X[:, 6:], past_key_values=parts.past_key_values).logits
    # Activations are rounded too, by scales of the tokens that come together.
    assert (last - whole[:, 6:]).norm() < 0.02 * whole.norm() < (whole - before).norm()
    model.train()(X, labels=X).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in new.values())


@pytest.mark.parametrize("mode", ["replace", "beside"])
def test_a_layer_in_float32_trains_in_a_half_precision_host(mode):
    model, where = _host(dtype=torch.bfloat16)
    replace(model, where.format(1), "mag", mode=mode, window=5, dtype=torch.float32)
    model.train()(X, labels=X).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.dtype == torch.float32}
    assert grads and all(g is not None and g.isfinite().all() for g in grads.values())

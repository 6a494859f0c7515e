"""PEFT: adapters on models with Titans layers train, save, load and merge; the gates among them."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from titans_kernels import replace

# Where the memory is, what trains whole, what LoRA adapts. LoRA alone would leave a gate shut.
CASES = {
    "beside: whole": ("beside", ["titans"], r".*model\.layers\.\d\.self_attn\.[qv]_proj"),
    "beside: LoRA and gates": ("beside", ["titans.gate"], "all-linear"),
    "replace: whole": ("replace", ["block"], ["down_proj"]),
    "replace: LoRA": ("replace", None, "all-linear"),
}


def _host(mode, dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    replace(model, "model.layers.[01].self_attn", "mag", mode=mode, window=5, chunk_size=4)
    return model


def _trained(mode, whole, adapted, steps=4):
    model = get_peft_model(
        _host(mode),
        LoraConfig(r=2, target_modules=adapted, modules_to_save=whole, task_type="CAUSAL_LM"),
    ).train()
    tokens = torch.randint(1, 37, (2, 13), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(steps):
        losses.append(model(input_ids=tokens, labels=tokens).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    return model.eval(), tokens


@pytest.mark.parametrize("case", CASES)
def test_adapters_train_save_load_and_merge(case, tmp_path):
    mode, whole, adapted = CASES[case]
    model, tokens = _trained(mode, whole, adapted)
    if mode == "beside":
        gates = [
            parameter
            for name, parameter in model.named_parameters()
            if name.endswith("titans_gate") and "modules_to_save" in name
        ]
        assert len(gates) == 2 and all(gate.abs().max() > 1e-3 for gate in gates)
    with torch.no_grad():
        trained = model(input_ids=tokens).logits
        with model.disable_adapter():
            base = model(input_ids=tokens).logits
        torch.testing.assert_close(base, _host(mode)(tokens).logits)
        assert (trained - base).abs().max() > 1e-2

        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(_host(mode), tmp_path).eval()
        torch.testing.assert_close(loaded(input_ids=tokens).logits, trained)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(tokens).logits, trained, rtol=1e-3, atol=1e-3)
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = merged.generate(tokens, use_cache=False, **options)
    assert (merged.generate(tokens, **options) == expected).all()

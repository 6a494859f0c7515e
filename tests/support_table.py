"""What works in which decoder of transformers, found by trying: `PYTHONPATH=tests python -m
support_table > docs/support.md` writes the page."""

import copy
import inspect
import tempfile
import warnings
from functools import partial

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from titans_kernels import from_pretrained, replace

V = 37
TOKENS = {"vocab_size": V, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
SIZE = TOKENS | {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
GPT = TOKENS | {"n_embd": 16, "n_layer": 2, "n_positions": 64}
LLAMA = SIZE | {"intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8}
LLAMA |= {"max_position_embeddings": 64}
MIXED = LLAMA | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
LOCAL = {"num_local_experts": 2, "num_experts_per_tok": 1}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
FAMILIES = {
    "gpt2": GPT | {"n_head": 2},
    "gpt_neo": TOKENS
    | {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "window_size": 4}
    | {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64},
    "gptj": GPT | {"n_head": 2, "rotary_dim": 4},
    "codegen": GPT | {"n_head": 4, "rotary_dim": 4},
    "gpt_neox": LLAMA,
    "opt": SIZE | {"word_embed_proj_dim": 16, "ffn_dim": 24, "max_position_embeddings": 64},
    "bloom": TOKENS | {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "falcon": SIZE | {"new_decoder_architecture": False, "alibi": False},
    "mpt": TOKENS | {"d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 64},
    **dict.fromkeys(("llama", "qwen2", "qwen3", "phi"), LLAMA),
    "mistral": LLAMA | {"sliding_window": 4},
    **dict.fromkeys(("gemma2", "gemma3_text"), MIXED),
    "mixtral": LLAMA | LOCAL,
    "gpt_oss": MIXED | LOCAL,
    **dict.fromkeys(("stablelm", "olmo2", "cohere", "granite", "smollm3", "glm4"), LLAMA),
    **dict.fromkeys(("ernie4_5", "helium", "persimmon", "nemotron", "phi3", "starcoder2"), LLAMA),
    **dict.fromkeys(("olmo3", "cohere2", "exaone4"), MIXED),
    "qwen3_moe": LLAMA | EXPERTS,
    "biogpt": SIZE | {"intermediate_size": 24, "max_position_embeddings": 64},
    "xglm": TOKENS
    | {"d_model": 16, "num_layers": 2, "attention_heads": 2, "ffn_dim": 24, "init_std": 0.3},
    "llama4_text": LLAMA | LOCAL | {"intermediate_size_mlp": 24, "attention_chunk_size": 4},
    "deepseek_v3": LLAMA
    | {"kv_lora_rank": 4, "q_lora_rank": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
    | {"v_head_dim": 8, "head_dim": 4, "num_key_value_heads": 2, "n_routed_experts": 4}
    | {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    | {"first_k_dense_replace": 1, "num_mtp_layers": 0},
    "bamba": LLAMA
    | {"mamba_n_heads": 4, "mamba_d_state": 4, "mamba_chunk_size": 4, "attn_layer_indices": [1]},
    "qwen3_next": LLAMA
    | EXPERTS
    | {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
    | {"linear_num_value_heads": 2, "shared_expert_intermediate_size": 8}
    | {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2": LLAMA | {"layer_types": ["conv", "full_attention"]},
}
ESSENTIAL = ("gpt2", "bloom", "gemma3_text")
ATTENTION = ("attn", "self_attn", "attention", "self_attention")
HEAD = """# What works in which model

Each cell was found by trying a small model of the family, with random weights: a Titans layer
(`lmm`) in place of the attention of every layer (`replace`) or in parallel with it, its gate open
(`beside`). Tests find the page anew and fail when it differs. "no" means that an error says so.

- cached: `generate` with a cache gives the logits that it gives without.
- padding: a prompt padded on the left gives the logits of the prompt alone.
- training: every parameter of the memories has a gradient, and padding changes none of the loss.
- compile: `torch.compile(fullgraph=True)` gives the same logits, of a padded batch.
- saving: `save_pretrained`, then `titans_kernels.from_pretrained`, gives the same logits.

| family | mode | cached | padding | training | compile | saving |
|---|---|---|---|---|---|---|
"""


def _is_attention(name, module):
    wraps = type(module).__name__ == "GPTNeoAttention"  # around the attention of a layer
    return name.rpartition(".")[2] in ATTENTION and not wraps


def _host(family):
    torch.manual_seed(0)
    options = dict(FAMILIES[family])
    config = AutoConfig.for_model(family, **options, initializer_range=0.3)
    config._attn_implementation = "eager"
    return AutoModelForCausalLM.from_config(config).eval()


def changed(family, mode):
    model = _host(family)
    replace(model, _is_attention, "lmm", mode=mode, chunk_size=4)
    for name, parameter in model.named_parameters():
        if name.endswith("titans_gate"):
            torch.nn.init.constant_(parameter, 0.5)
    return model


def _memories(model):
    return {n: p for n, p in model.named_parameters() if ".block." in n}


def _generated(model, x, mask, use_cache=True):
    options = {"max_new_tokens": 4, "do_sample": False, "use_cache": use_cache}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    return torch.stack(model.generate(x, attention_mask=mask, **options).logits)


def _padded(x):
    pads = torch.zeros(len(x), 3, dtype=torch.long)
    return torch.cat([pads, x], 1), torch.cat([pads, torch.ones_like(x)], 1)


def _cached(model, x):
    ones = torch.ones_like(x)
    return _generated(model, x, ones), _generated(model, x, ones, use_cache=False)


def _padding(model, x):
    return _generated(model, *_padded(x)), _generated(model, x, torch.ones_like(x))


def _training(model, x):
    model = copy.deepcopy(model).train()
    model(x, labels=x).loss.backward()
    without = [n for n, p in _memories(model).items() if p.grad is None or not p.grad.any()]
    assert _memories(model) and not without, without
    model.eval()  # without dropout
    padded, mask = _padded(x)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    labels = padded.where(mask.bool(), -100)
    labels[:, padded.shape[1] - x.shape[1]] = -100  # alone, nothing stands before it
    named = {"attention_mask": mask, "labels": labels}
    if "position_ids" in inspect.signature(model.forward).parameters:
        named["position_ids"] = positions
    return model(padded, **named).loss.detach(), model(x, labels=x).loss.detach()


def _compile(model, x):
    torch._dynamo.reset()
    padded, mask = _padded(x)
    one_graph = torch.compile(model, backend="eager", fullgraph=True)
    named = {"attention_mask": mask, "use_cache": False}
    return _real(one_graph(padded, **named), x), _real(model(padded, **named), x)


def _real(output, x):
    return output.logits[:, -x.shape[1] :]


def _saving(model, x):
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = from_pretrained(folder).eval()
    return loaded(x).logits, model(x).logits


CHECKS = (_cached, _padding, _training, _compile, _saving)


def _tried(check, model, x):
    grad = torch.enable_grad() if check is _training else torch.no_grad()
    try:
        with grad:
            got, expected = check(model, x)
    except (ValueError, TypeError) as refusal:
        return f"no: {str(refusal).splitlines()[0]}"
    worst = float((got - expected).abs().max())
    assert worst <= 1e-4 * (1 + float(expected.abs().max())), (check.__name__, worst)
    return "yes"


def rows(family):
    """The lines of a family, one a mode."""
    for mode in ("replace", "beside"):
        x = torch.randint(1, V, (2, 7), generator=torch.Generator().manual_seed(1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cells = map(partial(_tried, model=changed(family, mode), x=x), CHECKS)
            yield f"| {family} | {mode} | {' | '.join(cells)} |"


def page(families=FAMILIES):
    return HEAD + "".join(f"{row}\n" for family in families for row in rows(family))


if __name__ == "__main__":
    print(page(), end="")

"""Masks that hosts pass: read right, or refused by name; nothing is kept on the user's tensors."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, StaticCache

from titans_kernels import replace
from titans_kernels.adapt import TitansAttention

V, LOW = 37, torch.finfo(torch.float64).min
_LLAMA = {
    **{"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0},
    **{"bos_token_id": None, "eos_token_id": None, "initializer_range": 0.3},
}


def _tokens(*shape, seed=1):
    return torch.randint(1, V, shape, generator=torch.Generator().manual_seed(seed))


def _close(got, expected, atol=1e-10):
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


def _layer():
    torch.manual_seed(0)
    layer = TitansAttention(16, 2, "lmm", chunk_size=4).double()
    return layer, torch.randn(2, 6, 16, dtype=torch.float64)


REAL = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()
SQUARE = REAL[:, None, None] & torch.ones(6, 6).tril().bool()


def _added(mask, low, dtype=torch.float32):
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, low)


@pytest.mark.parametrize(
    "mask",
    [
        *(REAL.to(dtype) for dtype in (torch.uint8, torch.int32, torch.float32, torch.bfloat16)),
        *(SQUARE.to(dtype) for dtype in (torch.bool, torch.uint8, torch.int64)),
        *(_added(SQUARE, low) for low in (-1e4, -1e9, -65504.0, -torch.inf)),
        _added(SQUARE, -1e4, torch.bfloat16),
        _added(SQUARE, -1e4, torch.float16),
        _added(REAL[:, None, None], -1e9),
        _added(REAL, -1e4),
        SQUARE.expand(-1, 3, -1, -1),
        SQUARE & torch.ones(6, 6).triu(-2).bool(),  # a window of three
    ],
    ids=lambda mask: f"{str(mask.dtype).removeprefix('torch.')}-{list(mask.shape)}",
)
def test_padding_in_every_dtype_and_scale(mask):
    layer, x = _layer()
    out = layer(x, attention_mask=mask)[0]
    _close(out[0, 2:], layer(x[:1, 2:])[0][0])
    _close(out[1], layer(x[1:])[0][0])
    assert not out[0, :2].any()


def _without(mask, *where):
    mask = mask.clone()
    mask[where] = False
    return mask


@pytest.mark.parametrize(
    "mask, why",
    [
        (torch.tensor([[1, 1, 1, 2, 2, 2]] * 2), "values from 1 to 2"),
        (SQUARE.float(), "values|hides"),
        (torch.full((2, 6), 0.5), "values from 0.5 to 0.5"),
        (~torch.ones(2, 1, 6, 6).tril().bool(), "shows no token itself"),
        (_without(SQUARE, 1, 0, 5, 3), "hides tokens between"),
        (~_without(~SQUARE, 0, 0, 5, 1), "shows padding"),
        (torch.stack([SQUARE[:, 0], _without(SQUARE, 1, 0, 5, 0)[:, 0]], 1), "one head"),
    ],
    ids=["segments", "float of 0 and 1", "half", "inverted", "hole", "padding seen", "heads"],
)
def test_masks_that_say_something_else_are_refused(mask, why):
    layer, x = _layer()
    if why == "values|hides":  # to be added, or of 0 and 1? Read as the latter
        return _close(layer(x, attention_mask=mask)[0], layer(x, attention_mask=SQUARE)[0])
    with pytest.raises(ValueError, match=rf"attention_mask: .*{why}"):
        layer(x, attention_mask=mask)


def test_a_mask_beside_cu_seqlens():
    layer, x = _layer()
    x, ends = x[:1], torch.tensor([0, 2, 6])
    expected = layer(x, cu_seqlens=ends)[0]
    blocks = torch.block_diag(torch.ones(2, 2), torch.ones(4, 4)).tril().bool()[None, None]
    for mask in (torch.ones(1, 6), blocks):
        assert torch.equal(layer(x, attention_mask=mask, cu_seqlens=ends)[0], expected)
    assert torch.equal(layer(x, attention_mask=blocks)[0], expected)
    for mask in (REAL[:1], SQUARE[1:], torch.block_diag(*[torch.ones(3, 3)] * 2)[None, None]):
        with pytest.raises(ValueError, match="attention_mask: together with cu_seqlens it takes"):
            layer(x, attention_mask=mask, cu_seqlens=ends)
    with pytest.raises(ValueError, match="cu_seq_lens_k: got another cu_seqlens"):
        layer(x, cu_seq_lens_q=ends, cu_seq_lens_k=torch.tensor([0, 3, 6]))


def test_a_mask_stays_the_users():
    layer, x = _layer()
    mask = REAL.long()
    with torch.inference_mode():
        expected = layer(x, attention_mask=mask)[0]
    layer(x, attention_mask=mask)[0].sum().backward()  # what inference found serves training
    assert not vars(mask)
    file = io.BytesIO()
    torch.save({"attention_mask": mask}, file)
    file.seek(0)
    assert torch.equal(torch.load(file)["attention_mask"], mask)
    assert torch.equal(copy.deepcopy(mask), mask)
    _close(layer(x, attention_mask=mask)[0], expected)
    mask.numpy()[0] = 1
    assert torch.equal(layer(x, attention_mask=mask)[0], layer(x)[0])
    mask.data[1, :3] = 0
    _close(layer(x, attention_mask=mask)[0][1, 3:], layer(x[1:, 3:])[0][0])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_static_cache_beside(kind, padded):
    torch.manual_seed(0)
    window = {"sliding_window": 6} if kind == "gemma2" else {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **_LLAMA, **window)).eval()
    if kind == "llama":  # in float64 the eager attention of transformers makes NaN of padding
        model.double()
    tokens = _tokens(2, 8)
    mask = torch.ones_like(tokens)
    if padded:
        tokens[0, :3], mask[0, :3] = 0, 0
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": mask}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    before = model.generate(tokens, cache_implementation="static", **options)
    replace(model, "model.layers.*.self_attn", "lmm", mode="beside", chunk_size=4)
    model._cache = None
    shut = model.generate(tokens, cache_implementation="static", **options)
    assert torch.equal(torch.stack(shut.logits), torch.stack(before.logits))
    assert shut.past_key_values.is_compileable
    for name, parameter in model.named_parameters():
        if name.endswith("titans_gate"):
            nn.init.constant_(parameter, 0.5)
    expected = torch.stack(model.generate(tokens, use_cache=False, **options).logits)
    got = torch.stack(model.generate(tokens, cache_implementation="static", **options).logits)
    assert not torch.equal(got, torch.stack(before.logits))
    _close(got, expected, 1e-4 if kind == "gemma2" else 1e-10)


def test_a_static_cache_in_the_place_of_attention_is_refused():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**_LLAMA))
    replace(model, "model.layers.0.self_attn", "lmm")
    with pytest.raises(ValueError, match="past_key_values: got StaticCache"):
        model(_tokens(1, 4), past_key_values=StaticCache(config=model.config, max_cache_len=8))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_memory_goes_on_over_the_chunks_of_attention(attention):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama4_text",
        **_LLAMA,
        **{"attention_chunk_size": 4, "num_local_experts": 2, "intermediate_size_mlp": 24},
        **{"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]},
    )
    config._attn_implementation = attention
    model = AutoModelForCausalLM.from_config(config).eval()
    [name] = replace(model, "model.layers.0.self_attn", "lmm", chunk_size=4)
    layer, seen = model.get_submodule(name), []
    layer.register_forward_hook(
        lambda _, args, named, out: seen.append((named["hidden_states"], out[0])), with_kwargs=True
    )
    with torch.no_grad():
        model(_tokens(2, 11), use_cache=False)
        _close(seen[0][1], layer.block(seen[0][0])[0], 1e-5)
        packed = torch.cat([torch.arange(8), torch.arange(3)])[None]
        model(_tokens(1, 11), position_ids=packed, use_cache=False)
        _close(seen[1][1][:, 8:], layer.block(seen[1][0][:, 8:])[0], 1e-5)
        _close(seen[1][1][:, :8], layer.block(seen[1][0][:, :8])[0], 1e-5)


def _multihead(causal=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.MultiheadAttention(16, 2, batch_first=True, dtype=torch.float64))
    replace(model, "0", "lmm", chunk_size=4, causal=causal)
    return model[0], torch.randn(2, 6, 16, dtype=torch.float64)


def test_masks_of_multihead_attention():
    layer, x = _multihead()
    halves = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)) == 0
    expected = torch.cat([layer(half, half, half)[0] for half in x.split(3, dim=1)], 1)
    added = torch.zeros(6, 6).masked_fill(halves, -1e9)
    for mask in (halves, added, halves | ~torch.ones(6, 6).tril().bool(), halves.expand(4, -1, -1)):
        _close(layer(x, x, x, attn_mask=mask)[0], expected)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(6)
    got = layer(x, x, x, key_padding_mask=padding, attn_mask=causal, is_causal=True)[0]
    _close(got[1, :4], layer(x[1:, :4], x[1:, :4], x[1:, :4])[0][0])
    holes = torch.eye(6).roll(-2, 1).tril().bool()
    holes[5, 2] = True
    with pytest.raises(ValueError, match="hides tokens between"):
        layer(x, x, x, attn_mask=holes)
    with pytest.raises(ValueError, match=r"attn_mask: got \[5, 5\], takes \[T, T\]"):
        layer(x, x, x, attn_mask=torch.zeros(5, 5))


def test_the_same_query_key_and_value_in_other_tensors():
    layer, x = _multihead()
    expected = layer(x, x, x)[0]
    assert torch.equal(layer(x, x.view_as(x), x.clone())[0], expected)
    for module in layer.modules():
        module.register_full_backward_hook(lambda *_: None)
    row = x.clone().requires_grad_()
    got = checkpoint(lambda *qkv: layer(*qkv)[0], row, row, row, use_reentrant=True)
    _close(got, expected)
    got.sum().backward()
    other = x.clone().requires_grad_()
    layer(other, other, other)[0].sum().backward()
    _close(row.grad, other.grad)
    with pytest.raises(ValueError, match="key: got other tensors than query"):
        layer(x, x + 1, x)


def test_multihead_attention_that_sees_both_ways():
    layer, x = _multihead(causal=False)
    with pytest.warns(UserWarning, match="nn.MultiheadAttention without a mask; .*causal=True"):
        layer(x, x, x)


@pytest.mark.parametrize("mode", ["replace", "beside"])
def test_a_mask_that_is_true_at_what_it_hides(mode):
    config = AutoConfig.for_model("mpt", vocab_size=V, d_model=16, n_layers=1, n_heads=2)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    plain, block = copy.deepcopy(model), None
    replace(model, "*.attn", "lmm", mode=mode, chunk_size=4)
    for layer in model.modules():
        if isinstance(layer, TitansAttention):
            block = layer.block
            if layer.gate is not None:
                nn.init.ones_(layer.gate.titans_gate)
    seen = []
    block.register_forward_hook(lambda _, args, out: seen.append((args[0], out[0])))
    tokens = _tokens(2, 6)
    tokens[0, :2] = 0
    with torch.no_grad():
        model(tokens, attention_mask=REAL.long(), use_cache=False)
        normed = plain.transformer.blocks[0].norm_1(plain.transformer.wte(tokens))
    [(read, found)] = seen
    _close(read[0], normed[REAL])  # the tokens alone, one sequence after the other
    assert found.abs().min() > 0

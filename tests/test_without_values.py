"""Shapes without numbers: FakeTensorMode and the meta device, through blocks, models and hosts."""

import pytest
import torch
from block_cases import BLOCKS
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaConfig

from titans_kernels import replace
from titans_kernels.models import TitansConfig, TitansForCausalLM

SIZE = {"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def _block(name, **options):
    kind, own = BLOCKS[name]
    return kind(8, heads=2, chunk_size=4, **own, **options)


def _shapes(block, x, cu_seqlens=None):
    """Of the outputs of two calls, the state after them, and gradients."""
    x = x.detach().requires_grad_()
    _, state = block(x, None, cu_seqlens)
    out, state = block(x, state, cu_seqlens)
    out.sum().backward()
    tensors = out, x.grad, *torch.utils._pytree.tree_leaves(state)
    return [(y.shape, y.dtype) for y in (*tensors, *(p.grad for p in block.parameters()))]


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name):
    expected = _shapes(_block(name), torch.randn(2, 13, 8))
    assert _shapes(_block(name, device="meta"), torch.randn(2, 13, 8, device="meta")) == expected
    with FakeTensorMode():
        assert _shapes(_block(name), torch.randn(2, 13, 8)) == expected


@pytest.mark.parametrize("name", BLOCKS)
def test_packed_sequences(name):
    ends = [0, 2, 13]
    expected = _shapes(_block(name), torch.randn(1, 13, 8), torch.tensor(ends))
    with FakeTensorMode():
        inputs = _block(name), torch.randn(1, 13, 8), torch.tensor(ends)
        if name == "MAC":
            with pytest.raises(ValueError, match="cu_seqlens: got one without values"):
                _shapes(*inputs)
            return
        assert _shapes(*inputs) == expected


@pytest.mark.parametrize("kind", ["mac", "replace", "beside"])
def test_models_and_hosts(kind):
    with FakeTensorMode():
        if kind == "mac":
            model = TitansForCausalLM(TitansConfig(**SIZE, segment=6))
        else:
            model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZE, intermediate_size=24))
            replace(model, "*.self_attn", "mag", mode=kind, window=5)
        tokens = torch.randint(37, (2, 13))
        mask = torch.ones_like(tokens)
        found = model(tokens, attention_mask=mask, labels=tokens, use_cache=False)
        found.loss.backward()
        assert found.logits.shape == (2, 13, 37)
        assert all(p.grad.shape == p.shape for p in model.parameters())

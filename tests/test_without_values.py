"""Shapes without numbers: FakeTensorMode and the meta device, through blocks, models and hosts."""

import pytest
import torch
from block_cases import BLOCKS, make_block
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaConfig

from titans_kernels import replace
from titans_kernels.models import TitansConfig, TitansForCausalLM

SIZE = {"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def _x(*shape, **where):
    return torch.randn(*shape, 6, dtype=torch.float64, **where)


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
    expected = _shapes(make_block(name), _x(2, 7))
    assert _shapes(make_block(name, device="meta"), _x(2, 7, device="meta")) == expected
    with FakeTensorMode():
        assert _shapes(make_block(name), _x(2, 7)) == expected


@pytest.mark.parametrize("name", BLOCKS)
def test_packed_sequences(name):
    ends = [0, 2, 9]
    expected = _shapes(make_block(name), _x(1, 9), torch.tensor(ends))
    with FakeTensorMode():
        inputs = make_block(name), _x(1, 9), torch.tensor(ends)
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

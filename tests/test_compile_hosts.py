"""Hosts with Titans layers compiled in one graph, and exported; more hosts: test_support.py."""

import io

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from titans_kernels import replace

V = 37
IDS = {"vocab_size": V, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
LLAMA = LlamaConfig(
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8, **IDS},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3},
)


@pytest.fixture(autouse=True)
def _forget():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _model(mode="replace", variant="lmm"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LLAMA).double().eval()
    replace(model, "*.self_attn", variant, mode=mode, chunk_size=4)
    for name, parameter in model.named_parameters():
        if name.endswith("titans_gate"):
            nn.init.constant_(parameter, 0.5)
    return model


def _batch(T, padding=0, seed=1):
    x = torch.randint(1, V, (2, T), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(x)
    x[0, :padding], mask[0, :padding] = 0, 0
    return x, {"attention_mask": mask, "use_cache": False}


def _close(got, expected, real):
    torch.testing.assert_close(got[real], expected[real], rtol=0, atol=1e-10)


@pytest.mark.parametrize("mode, variant", [("replace", "mag"), ("beside", "lmm")])
def test_padded_batches_in_one_graph(mode, variant):
    """A graph for the first length, one for all others; padding is read when it runs."""
    model = _model(mode, variant)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for T, padding in ((9, 3), (17, 0), (12, 11), (31, 1)):
            x, named = _batch(T, padding)
            real = named["attention_mask"].bool()
            _close(compiled(x, **named).logits, model(x, **named).logits, real)
    assert counter.frame_count <= 2


def test_gradients_of_a_padded_batch_in_one_graph():
    model = _model()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x, named = _batch(9, 3)
    labels = x.masked_fill(named["attention_mask"] == 0, -100)
    found = []
    for function in (compiled, model):
        model.zero_grad()
        function(x, labels=labels, **named).loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=0, atol=1e-12, msg=name)


@torch.no_grad()
def test_what_one_graph_does_not_take_is_refused_when_it_runs():
    model = _model()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x, _ = _batch(8)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]).expand(2, -1)
    with pytest.raises(ValueError, match="attention_mask: got several sequences in a row"):
        compiled(x, position_ids=positions, use_cache=False)
    x, named = _batch(8, 3)
    named |= {"use_cache": True, "past_key_values": DynamicCache()}
    with pytest.raises(ValueError, match="attention_mask: got padding together with a cache"):
        compiled(x, **named)


@torch.no_grad()
def test_graphs_that_may_break_take_several_sequences_in_a_row():
    model = _model()
    x, _ = _batch(8)
    named = {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]).expand(2, -1)}
    named["use_cache"] = False
    expected = model(x, **named).logits
    alone = model(x[:, 3:], use_cache=False).logits
    torch.testing.assert_close(expected[:, 3:], alone, rtol=0, atol=1e-10)
    found = torch.compile(model, backend="eager")(x, **named).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["replace", "beside"])
def test_a_host_is_exported_for_any_length(mode):
    model = _model(mode)
    x, named = _batch(9, 3)
    length = {1: torch.export.Dim("T", min=2, max=64)}
    shapes = {"input_ids": length, "attention_mask": length, "use_cache": None}
    program = torch.export.export(
        model, (), {"input_ids": x, **named}, dynamic_shapes=shapes, strict=False
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for T, padding in ((9, 0), (17, 2), (33, 30)):
        x, named = _batch(T, padding)
        real = named["attention_mask"].bool()
        got = loaded(input_ids=x, **named).logits
        _close(got, model(x, **named).logits, real)

"""The models against their composition in the reference, at small sizes and at lengths of use."""

import pytest
import torch
import torch.nn.functional as F

from reference import models as reference
from reference.blocks import Options
from titans_kernels.models import TitansConfig, TitansForCausalLM

SMALL = {
    **{"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2},
    **{"segment": 6, "window": 5, "chunk_size": 4, "n_persistent": 2, "expansion": 2},
    **{"initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None},
}


def _model(variant, dtype=torch.float64, **options):
    """Every parameter off its initial value, so that each of them matters."""
    torch.manual_seed(0)
    model = TitansForCausalLM(TitansConfig(variant=variant, **(SMALL | options)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1 or "norm" in name:
                p.add_(0.2 * torch.randn_like(p))
    return model.to(dtype)


def _tokens(length):
    return torch.randint(37, (length,), generator=torch.Generator().manual_seed(1))


def _reference(model, tokens, dtype=torch.float64):
    config = model.config
    p = {name: x.to(dtype) for name, x in model.named_parameters()}
    span = config.segment if config.variant == "mac" else config.window
    chunk = config.chunk_size
    if config.variant == "tnt":
        span, chunk = (config.local_chunks, config.reset_every, config.project), config.global_chunk
    options = Options(chunk, rotary=config.rotary)
    return reference.logits(tokens, p, config.variant, span, config.rms_norm_eps, options)


CASES = {
    "mac": ("mac", {}),
    "mag": ("mag", {}),
    "mal": ("mal", {}),
    "lmm": ("lmm", {}),
    "tnt": ("tnt", {"global_chunk": 5, "local_chunks": [3, 4], "reset_every": 6}),
    "a large eps": ("lmm", {"rms_norm_eps": 0.5, "num_hidden_layers": 1}),
    "tied embeddings": ("lmm", {"tie_word_embeddings": True, "num_hidden_layers": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_model_is_the_composition_of_its_parts(case):
    """Logits, and the gradient of every parameter."""
    variant, options = CASES[case]
    model, tokens = _model(variant, **options), _tokens(14)
    found = []
    for logits in (model(tokens[None]).logits[0], _reference(model, tokens)):
        loss = F.cross_entropy(logits[:-1], tokens[1:])
        named = dict(model.named_parameters())
        found.append([logits, *torch.autograd.grad(loss, named.values())])
    for name, got, want in zip(["logits", *named], *found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10, msg=lambda m: f"{name}: {m}")  # noqa: B023


# Variant, its window or segment, tokens, dtype, and the error at most: RMS, relative.
LENGTHS = {
    "a window of 1,024, bfloat16": ("mag", {"window": 1024}, 1100, torch.bfloat16, 0.02),
    "a segment of 512, float32": ("mac", {"segment": 512}, 600, torch.float32, 1e-5),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", LENGTHS)
@torch.no_grad()
def test_at_lengths_of_use(case):
    variant, options, length, dtype, bound = LENGTHS[case]
    model = _model(variant, dtype, num_hidden_layers=1, chunk_size=16, **options)
    tokens = _tokens(length)
    want = _reference(model, tokens)
    error = (model(tokens[None]).logits[0].double() - want).square().mean().sqrt()
    relative = float(error / want.square().mean().sqrt())
    assert relative <= bound, f"{case}: {relative:.1e}"


@pytest.mark.parametrize("padding", [None, 3])
def test_the_embedding_of_padding_is_not_trained(padding):
    model = _model("lmm", num_hidden_layers=1, pad_token_id=padding)
    tokens = torch.tensor([[3, 5, 3, 7]])
    model(tokens, labels=tokens).loss.backward()
    trained = model.model.embed_tokens.weight.grad.any(-1)
    assert trained.nonzero().flatten().tolist() == [i for i in (3, 5) if i != padding]  # 7 is last

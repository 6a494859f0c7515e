"""The loss of a language model in pieces: the same numbers in fewer bytes."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad

from titans_kernels.models import TitansConfig, TitansForCausalLM
from titans_kernels.models.loss import next_token_loss

SIZE = {
    **{"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2},
    **{"variant": "lmm", "chunk_size": 4, "expansion": 2, "tie_word_embeddings": True},
}


def _model(loss_chunk=None):
    torch.manual_seed(0)
    return TitansForCausalLM(TitansConfig(**SIZE, loss_chunk=loss_chunk))


def _tokens(*shape, seed=1):
    tokens = torch.randint(37, shape, generator=torch.Generator().manual_seed(seed))
    return tokens, tokens.masked_fill(torch.arange(shape[1]) < 2, -100)


def _gradients(model, tokens, labels, **named):
    out = model(tokens, labels=labels, **named)
    out.loss.backward()
    return out, [out.loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("chunk", [1, 5, 18, 1000])
@pytest.mark.parametrize("named", ["", "num_items_in_batch", "shift_labels"])
def test_the_loss_and_its_gradients_are_those_of_all_logits(chunk, named):
    tokens, labels = _tokens(2, 9)
    values = {"num_items_in_batch": torch.tensor(40), "shift_labels": _tokens(2, 9, seed=2)[1]}
    named = {named: values[named]} if named else {}
    out, found = _gradients(_model(chunk), tokens, labels, **named)
    plain, expected = _gradients(_model(), tokens, labels, **named)
    assert out.logits is None and plain.logits.shape == (2, 9, 37)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)


def test_logits_that_are_wanted_are_there():
    tokens, labels = _tokens(2, 9)
    model = _model(4).eval()
    assert model(tokens).logits.shape == (2, 9, 37)
    assert model(tokens, labels=labels[:, -3:], logits_to_keep=3).logits.shape == (2, 3, 37)
    assert model.generate(tokens, max_new_tokens=2, eos_token_id=None).shape == (2, 11)
    with pytest.raises(ValueError, match="loss_chunk: got 0, takes an int of at least 1"):
        _model(0)


def test_no_tensor_holds_the_logits_of_more_tokens_than_a_piece():
    """Of all that is made or kept on the way to the gradients, at a vocabulary of 32,000."""
    hidden = torch.randn(1, 64, 8, requires_grad=True)
    weight = torch.randn(32_000, 8, requires_grad=True)
    labels = torch.randint(32_000, (1, 64))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            tensors = torch.utils._pytree.tree_leaves(out)
            sizes = [x.numel() for x in tensors if isinstance(x, torch.Tensor)]
            largest = max([largest, *sizes])
            return out

    with Watch():
        next_token_loss(lambda x: F.linear(x, weight), hidden, labels, 16).backward()
    assert largest == 16 * 32_000


def test_with_transforms_of_torch_func_and_a_second_derivative():
    model, (tokens, labels) = _model(5).double(), _tokens(1, 7)
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def loss(p):
        return functional_call(model, p, (tokens,), {"labels": labels}).loss

    _, expected = _gradients(_model(5).double(), tokens, labels)
    for got, wanted in zip(grad(loss)(parameters).values(), expected[1:], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-13)
    hidden = torch.randn(1, 7, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 4, dtype=torch.float64)
    targets = torch.randint(9, (1, 7))
    torch.autograd.gradgradcheck(
        lambda x: next_token_loss(lambda y: F.linear(y, weight), x, targets, 3), hidden
    )

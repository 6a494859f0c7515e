"""What tests of the layer share: a small layer, tensors by seed, comparison by relative error."""

import itertools

import torch

from titans_kernels import NeuralMemory

SMALL = {"heads": 2, "dim_head": 4, "expansion": 2, "dtype": torch.float64}


def small_layer(seed=0, dim=10, **options):
    torch.manual_seed(seed)
    layer = NeuralMemory(dim, **(SMALL | options))
    with torch.no_grad():  # off their initial values, so that each of them matters
        for name, p in layer.named_parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn_like(p))
            elif "norm" in name:
                p.add_(0.1 * p.abs().max().clamp(0.1) * torch.randn_like(p))
        layer.alpha_bias.add_(2)
    return layer


def randn(*shape, seed=1, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def close(name, actual, expected, tolerance):
    assert actual.shape == expected.shape, f"{name}: {actual.shape} is not {expected.shape}"
    if actual.numel():
        error = (actual - expected).abs().max().item()
        bound = tolerance * expected.abs().max().item() + 1e-300
        assert error <= bound, f"{name}: error {error:.1e}, bound {bound:.1e}"


def all_close(name, actual, expected, tolerance):
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        close(f"{name}[{i}]", x, y, tolerance)


def cotangent(tensors):
    """A scalar that weighs every entry of the tensors differently."""
    return sum((x * randn(*x.shape, seed=i)).sum() for i, x in enumerate(tensors))


def gradients(layer, outputs, *others):
    """Gradients of the parameters and of other leaves, by name."""
    named = dict(layer.named_parameters()) | {f"input {i}": x for i, x in enumerate(others)}
    outputs = [x for x in outputs if x.is_floating_point()]
    # A memory that goes on from a state does not read M_0: no gradient, that is, zeros.
    found = torch.autograd.grad(cotangent(outputs), named.values(), materialize_grads=True)
    return dict(zip(named, found, strict=True))


def same_gradients(actual, expected, tolerance):
    for name, value in actual.items():
        close(f"d {name}", value, expected[name], tolerance)


def ends_of(lengths):
    return itertools.accumulate(lengths)

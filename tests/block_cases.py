"""The Titans blocks that tests build, and their twins in the reference."""

import itertools

import torch

from reference import blocks
from reference.tnt import tnt
from titans_kernels.layers import TitansLMM, TitansMAC, TitansMAG, TitansMAL, TitansTNT
from titans_kernels.layers.learner import Learner

SMALL = {"heads": 2, "dim_head": 4, "expansion": 2, "chunk_size": 4, "dtype": torch.float64}
BLOCKS = {
    "LMM": (TitansLMM, {"n_persistent": 3}),
    "MAC": (TitansMAC, {"n_persistent": 3, "segment": 6}),
    "MAG": (TitansMAG, {"n_persistent": 3, "window": 5}),
    "MAL": (TitansMAL, {"n_persistent": 3, "window": 5}),
    "TNT": (
        TitansTNT,
        {"n_persistent": 3, "global_chunk": 5, "local_chunks": (4, 3), "reset_every": 10},
    ),
}


def make_block(name, dim=6, **options):
    """A block of that name, every parameter off its initial value, so that each of them matters."""
    torch.manual_seed(0)
    kind, own = BLOCKS[name]
    options = SMALL | own | options
    if "local_chunks" in options:
        del options["chunk_size"]
    block = kind(dim, **options)
    with torch.no_grad():
        for name, p in block.named_parameters():
            if p.dim() == 1 or "norm" in name:
                p.add_(0.2 * torch.randn_like(p))
        for part in block.modules():
            if isinstance(part, Learner):
                part.alpha_bias.add_(4)
    return block


def twin(name, block, x):
    """What the reference makes of one sequence [T, dim]."""
    if name == "TNT":
        return twin_of_tnt(block, x)[0]
    p = dict(block.named_parameters())
    memory = block.memory
    options = blocks.Options(
        memory.chunk_size,
        memory.activation,
        memory.residual,
        memory.max_learning_rate,
        name == "LMM" or block.attention.rotary,
    )
    if name == "LMM":
        return blocks.lmm(x, p, options)
    if name == "MAC":
        return blocks.mac(x, p, block.segment, options)
    run = blocks.mag if name == "MAG" else blocks.mal
    return run(x, p, block.attention.window, options)


def twin_of_tnt(block, x):
    """The same, and the states of its memories."""
    p, memory = dict(block.named_parameters()), block.memory
    options = blocks.Options(
        memory.global_chunk, memory.activation, memory.residual, memory.max_learning_rate
    )
    return tnt(x, p, memory.local_chunks, memory.reset_every, memory.project, options)


def randn(*shape, seed=1, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def ends(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)])


def assert_close(name, actual, expected, tolerance, *, scale=0.0):
    """Relative to the largest value expected, or to `scale` where none is."""
    assert actual.shape == expected.shape, f"{name}: {actual.shape} is not {expected.shape}"
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype} is not {expected.dtype}"
    if actual.numel():
        error = (actual - expected).abs().max().item()
        bound = tolerance * (expected.abs().max().item() or scale)
        assert error <= bound, f"{name}: error {error:.1e}, bound {bound:.1e}"


def assert_all_close(name, actual, expected, tolerance):
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        assert_close(f"{name}[{i}]", x, y, tolerance)


def gradients(block, outputs, *others):
    """Gradients of the parameters and of other leaves, by name; every entry weighs differently."""
    named = dict(block.named_parameters()) | {f"input {i}": x for i, x in enumerate(others)}
    outputs = [x for x in outputs if x.is_floating_point()]
    total = sum((x * randn(*x.shape, seed=i)).sum() for i, x in enumerate(outputs))
    found = torch.autograd.grad(total, named.values(), materialize_grads=True)
    return dict(zip(named, found, strict=True))


def assert_same_gradients(actual, expected, tolerance):
    """One that vanishes, as of a query with one key, is rounding of what others are made of."""
    largest = max(g.abs().max().item() for g in expected.values() if g.numel())
    for name, value in actual.items():
        assert_close(f"d {name}", value, expected[name], tolerance, scale=1e-4 * largest)

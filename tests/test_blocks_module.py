"""The Titans blocks as modules among others: parameters, copies, dtypes, what they refuse."""

import copy
import dataclasses
import io
import pickle

import pytest
import torch
from block_cases import BLOCKS, assert_close, gradients, make_block, randn
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from titans_kernels import NeuralMemory
from titans_kernels.layers import TitansLMM, TitansMAC, TitansMAG, TitansMAL, TitansTNT
from titans_kernels.layers.attention import WindowAttention
from titans_kernels.layers.block import Gate

every_block = pytest.mark.parametrize("name", BLOCKS)


@every_block
@pytest.mark.parametrize("P", [0, 5])
def test_parameter_count_is_the_formula(name, P):
    dim, heads, dim_head = 12, 3, 6
    options = {"local_chunks": (16, 16)} if name == "TNT" else {}
    block = BLOCKS[name][0](dim, heads=heads, dim_head=dim_head, n_persistent=P, **options)
    expected = sum(
        p.numel() for p in NeuralMemory(dim, heads=heads, dim_head=dim_head).parameters()
    )
    expected += P * dim
    expected += 0 if name in ("LMM", "TNT") else 4 * dim * heads * dim_head
    if name == "TNT":  # 2 local memories
        inner = heads * dim_head
        expected += 2 * (3 * heads * (dim + 1) + 8 * dim_head * inner + 2 * inner)
    expected += 2 * dim if name in ("MAC", "MAG") else 0
    assert sum(p.numel() for p in block.parameters()) == expected


@every_block
def test_every_parameter_is_used(name):
    block = make_block(name)
    found = gradients(block, [block(randn(2, 15, 6))[0]])
    assert all(value.any() for value in found.values())


@every_block
def test_state_dict_and_copies_hold_everything(name):
    block, x = make_block(name), randn(1, 15, 6)
    out, _ = block(x)
    other = make_block(name)
    other.reset_parameters()
    assert not torch.equal(other(x)[0], out)
    buffer = io.BytesIO()
    torch.save(block.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for same in (other, copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(same(x)[0], out)


@every_block
def test_a_saved_state_goes_on(name):
    block, x = make_block(name), randn(2, 20, 6)
    with torch.no_grad():
        _, state = block(x[:, :9])
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=True)
        assert isinstance(loaded, block.state_type)
        expected, _ = block(x[:, 9:], state)
        assert torch.equal(block(x[:, 9:], loaded)[0], expected)
        swapped = state.index_select(torch.tensor([1, 0]))
        assert_close("swapped", block(x[:, 9:].flip(0), swapped)[0].flip(0), expected, 1e-13)
    _, state = block(x)
    assert any(y.requires_grad for y in tree_leaves(state))
    assert not any(y.requires_grad for y in tree_leaves(state.detach()))


@every_block
def test_meta_device_then_initialised_as_ever(name):
    kind, own = BLOCKS[name]
    meta, block = kind(16, heads=2, **own, device="meta"), kind(16, heads=2, **own)
    assert all(p.is_meta for p in meta.parameters())
    meta.to_empty(device="cpu")
    for module in (meta, block):
        with torch.no_grad():
            for p in module.parameters():
                p.fill_(float("nan"))
        torch.manual_seed(3)
        module.reset_parameters()
    for (key, p), expected in zip(meta.named_parameters(), block.parameters(), strict=True):
        assert torch.equal(p, expected), key
        if key.startswith("gate.") or key.endswith("_bias"):
            assert p._no_weight_decay
    out, _ = meta(randn(1, 9, 16).float())
    assert out.isfinite().all()


@every_block
@pytest.mark.parametrize("autocast", [False, True], ids=["module", "autocast"])
def test_bfloat16_runs_and_streams(name, autocast):
    kind, own = BLOCKS[name]
    torch.manual_seed(0)
    block, x = kind(32, heads=2, **own), randn(2, 20, 32).float()
    exact = copy.deepcopy(block).double()(x.double())[0]
    if not autocast:
        block, x = block.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out, _ = block(x)
        first, state = block(x[:, :9])
        second, state = block(x[:, 9:], state)
        token, state = block.step(x[:, 0], state)
        packed, _ = block(x.view(1, 40, 32), cu_seqlens=torch.tensor([0, 20, 40]))
    assert out.dtype == token.dtype == torch.bfloat16
    assert all(y.isfinite().all() for y in (token, *tree_leaves(state)))
    for y in (out, torch.cat([first, second], 1), packed.view(2, 20, 32)):
        assert (y - exact).norm() < 0.05 * exact.norm()
    out.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in block.parameters())


@every_block
def test_float16_is_a_dtype_too(name):
    kind, own = BLOCKS[name]
    block = kind(16, heads=2, **own, dtype=torch.float16)
    out, state = block(randn(1, 9, 16).half())
    assert out.dtype == torch.float16 and out.isfinite().all()
    assert block.step(randn(1, 16).half(), state)[0].isfinite().all()


def test_repr_names_the_sizes():
    assert "16, heads=2, n_persistent=4" in repr(TitansMAG(16, heads=2))
    assert "16, heads=2, n_persistent=4, segment=512" in repr(TitansMAC(16, heads=2))
    assert "heads=2, dim_head=8, rotary=True, window=512" in repr(TitansMAL(16, heads=2))


# What does not fit.

OPTIONS = [
    (TitansLMM, {"n_persistent": -1}, ValueError, "n_persistent: got -1, takes an int of at least"),
    (TitansMAC, {"n_persistent": 1.0}, TypeError, "n_persistent: got 1.0, takes an int"),
    (TitansMAC, {"segment": 0}, ValueError, "segment: got 0, takes an int of at least 1"),
    (TitansMAG, {"window": 0}, ValueError, "window: got 0, takes an int of at least 1"),
    (TitansMAL, {"window": None}, TypeError, "window: got None, takes an int of at least 1"),
    (TitansMAC, {"segment": 10**9}, ValueError, "segment: got 1000000000, takes at most 65536"),
    (TitansMAG, {"window": 10**9}, ValueError, "window: got 1000000000, takes at most 65536 where"),
    (TitansMAL, {"chunk_size": 10**9}, ValueError, "chunk_size: got 1000000000, takes at most"),
    (TitansMAL, {"rotary": 1}, TypeError, "rotary: got 1, takes True or False"),
    (TitansMAC, {"dim_head": 3}, ValueError, "dim_head: got 3, takes an even number together with"),
    (TitansMAG, {"heads": 3}, ValueError, "heads: got 3, takes a divisor of dim = 8"),
    (TitansLMM, {"depth": 0}, ValueError, "depth: got 0, takes an int of at least 1"),
    (TitansLMM, {"dtype": torch.int8}, TypeError, "dtype: got torch.int8, takes None or one of"),
    (TitansLMM, {"window": 8}, TypeError, "'window'"),
    (TitansMAG, {"segment": 8}, TypeError, "'segment'"),
    (TitansMAL, {"dim_heads": 4}, TypeError, "'dim_heads'"),
    (TitansTNT, {"local_chunks": ()}, TypeError, "local_chunks: got none, takes a tuple of at"),
    (TitansTNT, {"local_chunks": 16}, TypeError, "local_chunks: got 16, takes a tuple of at least"),
    (TitansTNT, {"local_chunks": (4, 0)}, ValueError, "local_chunks[1]: got 0, takes an int of at"),
    (TitansTNT, {"local_chunks": (True,)}, TypeError, "local_chunks[0]: got True, takes an int of"),
    (
        TitansTNT,
        {"local_chunks": (10**9,)},
        ValueError,
        "local_chunks[0]: got 1000000000, takes",
    ),
    (TitansTNT, {"global_chunk": 10**9}, ValueError, "global_chunk: got 1000000000, takes at most"),
    (TitansTNT, {"global_chunk": None}, TypeError, "global_chunk: got None, takes an int of at"),
    (TitansTNT, {"reset_every": 0}, ValueError, "reset_every: got 0, takes an int of at least 1"),
    (
        TitansTNT,
        {"reset_every": None},
        TypeError,
        "reset_every: got None, takes an int of",
    ),
    (
        TitansTNT,
        {"reset_every": True},
        TypeError,
        "reset_every: got True, takes an int of",
    ),
    (
        TitansTNT,
        {"project": "all"},
        ValueError,
        "project: got 'all', takes one of 'shard', 'chunk",
    ),
    (TitansTNT, {"chunk_size": 16}, TypeError, "chunk_size: got 16, takes global_chunk together"),
    (
        TitansMAG,
        {"reset_every": 16},
        TypeError,
        "reset_every: got 16, takes local_chunks as well",
    ),
]


@pytest.mark.parametrize("kind, options, error, message", OPTIONS, ids=[m for *_, m in OPTIONS])
def test_options_that_do_not_fit(kind, options, error, message):
    with pytest.raises(error) as caught:
        kind(**({"dim": 8, "heads": 2} | options))
    assert message in str(caught.value)


X = randn(2, 5, 6)


def _with(state, **changes):
    """A state with other keys, values or length."""
    if hasattr(state, "attention"):
        return dataclasses.replace(state, attention=_with(state.attention, **changes))
    return dataclasses.replace(state, **changes)


INPUTS = [
    ("LMM", lambda s: (X[0],), ValueError, "x: got shape [5, 6], takes [B, T, dim] with dim = 6"),
    ("MAC", lambda s: (X[..., 1:],), ValueError, "x: got shape [2, 5, 5], takes [B, T, dim]"),
    ("MAG", lambda s: (X.float(),), TypeError, "x: got dtype torch.float32, takes that of the"),
    ("MAL", lambda s: (3,), TypeError, "x: got int, takes a torch.Tensor"),
    ("MAC", lambda s: (X, None, torch.tensor([0, 5])), ValueError, "x: got batch 2, takes 1"),
    ("MAG", lambda s: (X[:1], None, torch.tensor([0, 4])), ValueError, "cu_seqlens: got 0 first"),
    ("LMM", lambda s: (X, 3), TypeError, "state: got int, takes a LayerState or None"),
    ("MAC", lambda s: (X, s.memory), TypeError, "got LayerState, takes a ContextState or None"),
    ("MAG", lambda s: (X, s.attention), TypeError, "got WindowState, takes a HybridState or None"),
    (
        "MAL",
        lambda s: (X, dataclasses.replace(s, attention=s.memory)),
        TypeError,
        "state.attention: got LayerState, takes a WindowState",
    ),
    (
        "MAC",
        lambda s: (X[:1], s),
        ValueError,
        "state.length: got shape [2], takes [N] = [1]",
    ),
    (
        "MAC",
        lambda s: (X, _with(s, keys=s.keys[:, :, 1:])),
        ValueError,
        "state.keys: got shape [2, 2, 5, 8], takes [N, 2, segment, heads * dim_head] = [2, 2, 6,",
    ),
    ("MAC", lambda s: (X, _with(s, values=s.keys.float())), TypeError, "state.values: got dtype"),
    (
        "MAC",
        lambda s: (X, _with(s, length=s.length + 3)),
        ValueError,
        "state.length: got [8, 8], takes values from 0 to 5",
    ),
    (
        "MAC",
        lambda s: (X, _with(s, length=s.length.double())),
        TypeError,
        "state.length: got dtype",
    ),
    (
        "MAL",
        lambda s: (X, _with(s, keys=s.attention.keys[:, 1:])),
        ValueError,
        "state.attention.keys: got shape [2, 3, 8], takes [N, window - 1, heads * dim_head] = [2,",
    ),
    (
        "MAG",
        lambda s: (X, _with(s, length=s.attention.length[:1])),
        ValueError,
        "state.attention.length: got shape [1], takes [N] = [2]",
    ),
]


@pytest.mark.parametrize(
    "name, arguments, error, message", INPUTS, ids=[f"{n} {m}" for n, *_, m in INPUTS]
)
def test_inputs_that_do_not_fit(name, arguments, error, message):
    block = make_block(name)
    _, state = block(X)
    with pytest.raises(error) as caught:
        block(*arguments(state))
    assert message in str(caught.value)


@every_block
def test_a_state_of_another_block_is_refused(name):
    block = make_block(name)
    _, state = make_block(name, heads=1)(X)
    with pytest.raises(ValueError, match=r"state.*: got shape \[2.*takes"):
        block(X, state)
    with pytest.raises(TypeError, match="state: got dict, takes a"):
        block(X, {})
    with pytest.raises(ValueError, match=r"x: got shape \[2, 5, 6\], takes \[B, dim\]"):
        block.step(X)


@every_block
def test_states_are_pytrees(name):
    _, state = make_block(name)(X)
    doubled = tree_map(lambda y: 2 * y, state)
    assert type(doubled) is type(state)
    assert all(map(torch.equal, tree_leaves(doubled), [2 * y for y in tree_leaves(state)]))


# What bfloat16 must not round.


def test_rotary_positions_are_not_rounded():
    """At the windows that models have: bfloat16 holds no odd number above 256."""
    torch.manual_seed(0)
    exact = WindowAttention(32, 1, 32, True, 1024)
    for name in ("q_proj", "k_proj"):  # scores that tell positions apart
        nn.init.normal_(getattr(exact, name).weight, std=0.5)
    x = torch.randn(1, 1100, 32).bfloat16()
    rounded = copy.deepcopy(exact).bfloat16()
    exact.load_state_dict({n: p.float() for n, p in rounded.state_dict().items()})
    want, got = exact(x.float())[0], rounded(x)[0].float()
    assert (got - want).square().mean().sqrt() < 0.03 * want.square().mean().sqrt()


def test_the_gate_is_the_equation():
    torch.manual_seed(0)
    gate = Gate(16, dtype=torch.float64)
    for parameter in gate.parameters():
        nn.init.normal_(parameter)
    y, m = randn(2, 3, 5, 16)

    def rms(x):
        return x / x.square().mean(-1, keepdim=True).sqrt()

    want = gate.attention_norm * rms(y) * torch.sigmoid(gate.memory_norm * rms(m))
    assert_close("gate", gate(y, m), want, 1e-5)  # unit() has an eps


def test_the_gate_rounds_once():
    """Its output: not its parameters times sqrt(dim), nor what it multiplies."""
    torch.manual_seed(0)
    gate = Gate(15, dtype=torch.bfloat16)
    for parameter in gate.parameters():
        nn.init.normal_(parameter)
    exact = Gate(15, dtype=torch.float64)
    exact.load_state_dict({n: p.double() for n, p in gate.state_dict().items()})
    y, m = randn(2, 3, 500, 15).bfloat16()
    want, got = exact(y.double(), m.double()), gate(y, m).double()
    assert ((got - want).abs() <= 2.0**-8 * want.abs() * 1.01).all()


def test_persistent_tokens_start_with_unit_variance():
    torch.manual_seed(0)
    tokens = TitansMAC(64, heads=2, n_persistent=100).persistent
    assert abs(tokens.std() - 1) < 0.03 and abs(tokens.mean()) < 0.04
